"""Whole sweeps on Ray: run, killed and gone on with, of a population, submitted as a job; and the page in a real browser.

All but the first are slow. The last two need a Chromium in the path (Debian: `apt-get install chromium`) and install nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from conftest import tiny_plain
from PIL import Image
from test_sweep import record

from ecocseg import config, sweep_page
from ecocseg.sweep_report import Record
from ecocseg.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def write_space(folder: Path, data: Path, space: dict[str, Any], changes: dict[str, Any], **more: Any) -> Path:
    """A sweep over the tiny recipe, with runs in a folder."""
    plain = tiny_plain(data, folder / "runs", train__panels_every=0, **changes)
    del plain["run"]["name"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(plain))
    (folder / "space.yaml").write_text(yaml.safe_dump({"config": str(folder / "tiny.yaml"), "space": space, **more}))
    return folder / "space.yaml"


def start(space: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(ROOT / "tune/sweep.py"), "--space", str(space), "--name", "s", *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=ROOT)


def finish(process: subprocess.Popen[str], timeout: int = 900) -> str:
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, output
    return output


def read_record(url: Path) -> Record:
    return Record.from_json((url / "results.json").read_bytes())


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL a driver and its Ray, as a node that is switched off."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()
    psutil.wait_procs(everyone, timeout=20)


def test_two_trials_run_side_by_side(tiny: Path, tmp_path: Path) -> None:
    space = write_space(tmp_path, tiny, {"coding.codebook.length": [7, 9]}, {"train__steps": 4, "train__eval_every": 2},
                        search={"algorithm": "grid"}, objectives={"miou": "max", "step_seconds": "min"})
    output = finish(start(space, "launch.cpus_per_worker=0.5"))
    found = read_record(tmp_path / "runs/s")
    assert [(trial.state, trial.step, len(trial.curve)) for trial in found.trials] == [("done", 4, 2)] * 2, output
    for trial in found.trials:
        run = tmp_path / "runs/s" / trial.name
        assert config.load(None, str(run / "config.yaml")).coding.codebook.length == trial.values["coding.codebook.length"]
        logged = {r["step"]: r["val/student/miou"] for r in read_metrics(run) if "val/student/miou" in r}
        assert dict(trial.curve) == pytest.approx(logged) and trial.metrics["step_seconds"] > 0
        assert json.loads((run / "result.json").read_text())["step"] == 4
    best = config.load(None, str(tmp_path / "runs/s/best.yaml"))
    assert best.coding.codebook.length in (7, 9) and "--config" in output
    assert yaml.safe_load((tmp_path / "runs/s/sweep.yaml").read_text())["concurrent"] >= 1
    other = start(space, "launch.cpus_per_worker=0.5", "--resume", "concurrent=99")
    assert "with other settings (concurrent: 99)" in other.communicate()[0] and other.returncode == 2


@pytest.mark.slow
def test_a_killed_sweep_is_gone_on_with_and_keeps_its_history(tmp_path: Path) -> None:
    """Eight trials with ASHA over the demo's code length and loss weights, short; about six minutes on two cores."""
    words = ["train.steps=24", "train.eval_every=6", "scheduler.every=6", "train.log_every=2", "optim.warmup_steps=2",
             f"run.directory={tmp_path}"]
    space, url = ROOT / "tune/spaces/demo_code.yaml", tmp_path / "s"
    process = start(space, *words)
    deadline = time.monotonic() + 600
    while not (url / "results.json").exists() or sum(t.state in ("done", "stopped") for t in read_record(url).trials) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.5)
    time.sleep(8)  # Tune saves its own state every five seconds
    kill_all(process)
    before = read_record(url)
    ended = {trial.name: trial for trial in before.trials if trial.state in ("done", "stopped")}
    output = finish(start(space, "--resume", *words))
    after = read_record(url)
    assert len(after.trials) == 8 and {trial.state for trial in after.trials} <= {"done", "stopped"}, output
    assert {name: after.find(name) for name in ended} == ended  # not run again
    assert not [name for name in ended if f"{name} begins" in output]
    went_on = [t for t in before.trials if t.state == "running" and t.curve and after.find(t.name)]
    for trial in went_on:
        assert after.find(trial.name).curve[:len(trial.curve)] == trial.curve  # type: ignore[union-attr]
    assert all(len({step for step, _ in trial.curve}) == len(trial.curve) for trial in after.trials)
    assert any(trial.state == "stopped" for trial in after.trials), output


@pytest.mark.slow
def test_a_sweep_that_is_told_to_stop_leaves_in_good_order(tiny: Path, tmp_path: Path) -> None:
    space = write_space(tmp_path, tiny, {"coding.codebook.length": [7, 9]}, {"train__steps": 120, "train__eval_every": 20},
                        search={"algorithm": "grid"})
    process, url = start(space), tmp_path / "runs/s"
    deadline = time.monotonic() + 300
    while not (url / "results.json").exists() or not any(trial.curve for trial in read_record(url).trials):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "go on with --resume" in output and "Traceback" not in output, output
    before = read_record(url)
    output = finish(start(space, "--resume"))
    after = read_record(url)
    assert [(trial.state, trial.step) for trial in after.trials] == [("done", 120)] * 2, output
    assert all(b.curve == a.curve[:len(b.curve)] for a, b in zip(after.trials, before.trials, strict=True))
    for trial in after.trials:  # every step is there once
        assert [r["step"] for r in read_metrics(url / trial.name) if "loss/labeled" in r] == list(range(1, 121))


@pytest.mark.slow
def test_a_population_of_two_copies_the_better_one(tiny: Path, tmp_path: Path) -> None:
    space = write_space(
        tmp_path, tiny, {"optim.lr": {"loguniform": [1e-9, 1e-2]}, "coding.bce_weight": {"uniform": [0.5, 4]}},
        {"train__steps": 60, "train__eval_every": 10}, search={"algorithm": "random", "trials": 2},
        scheduler={"kind": "pbt", "every": 10}, objectives={"val/student/accuracy": "max"})
    output = finish(start(space, "launch.cpus_per_worker=0.5"))
    found, url = read_record(tmp_path / "runs/s"), tmp_path / "runs/s"
    assert [trial.state for trial in found.trials] == ["done", "done"], output
    copies = [path for path in url.glob("trial-*") if re.fullmatch(r"trial-\w+-[0-9a-f]{8}", path.name)]
    assert copies, output
    values = [config.load(None, str(path / "config.yaml")).optim.lr for path in copies]
    assert all(1e-9 <= value <= 1e-2 for value in values)
    assert all(min(r["step"] for r in read_metrics(path)) > 1 for path in copies)  # from a checkpoint, not from nothing


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of one node and two CPUs, apart from any other on this machine: the environment to reach it with."""
    folder = tempfile.mkdtemp(prefix="ec", dir="/tmp")  # sockets lie in it, whose paths must be short
    port, dashboard = free_port(), free_port()
    environment = ENVIRONMENT | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    ray = str(Path(sys.executable).parent / "ray")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
         "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--disable-usage-stats"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 90
        while subprocess.run([ray, "job", "list", "--address", f"http://127.0.0.1:{dashboard}"], env=environment,
                             capture_output=True).returncode:
            assert time.monotonic() < deadline and head.poll() is None
            time.sleep(1)
        yield environment | {"ADDRESS": f"127.0.0.1:{port}", "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    finally:
        below = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        psutil.wait_procs([psutil.Process(head.pid), *below], timeout=20)
        for one in below:
            if one.is_running():
                one.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_sweep_runs_on_a_cluster_and_as_a_job(tiny: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    space = write_space(tmp_path, tiny, {"coding.codebook.length": [7, 9]}, {"train__steps": 4, "train__eval_every": 2},
                        search={"algorithm": "grid"})
    ray = str(Path(sys.executable).parent / "ray")
    submitted = subprocess.run(
        [ray, "job", "submit", "--address", cluster["DASHBOARD"], "--working-dir", str(ROOT), "--runtime-env-json",
         json.dumps({"excludes": ["data/", "runs/", ".venv/", ".git/"]}), "--", sys.executable, "tune/sweep.py", "--space",
         str(space), "--name", "job"], env=cluster, capture_output=True, text=True, timeout=300)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert [trial.state for trial in read_record(tmp_path / "runs/job").trials] == ["done", "done"]
    connected = subprocess.run(
        [sys.executable, str(ROOT / "tune/sweep.py"), "--space", str(space), "--name", "more", "concurrent=3"],
        env=cluster | {"RAY_ADDRESS": cluster["ADDRESS"]}, capture_output=True, text=True)
    assert connected.returncode == 2, connected.stdout + connected.stderr  # the cluster's size, not this machine's
    assert "concurrent: 3 trials of 1 worker(s) do not fit into 2 CPU(s)" in connected.stderr


PROBE = """<script>
const failures = []; window.onerror = message => failures.push(message);
window.addEventListener('load', () => {
  const names = selector => [...document.querySelectorAll(selector)].map(e => e.dataset.trial);
  const found = {requests: performance.getEntriesByType('resource').length, rows: names('tbody tr')};
  const button = [...document.querySelectorAll('th button')].find(b => b.textContent === 'step_seconds');
  button.click(); found.sorted = names('tbody tr'); button.click(); found.reversed = names('tbody tr');
  const line = document.querySelector('polyline[data-trial=trial-c]');
  line.dispatchEvent(new MouseEvent('mouseenter')); found.lit = names('.lit');
  line.dispatchEvent(new MouseEvent('mouseleave')); found.after = names('.lit');
  const brush = document.querySelectorAll('.brush')[2], box = brush.getBoundingClientRect();
  const at = (type, share) => brush.dispatchEvent(new PointerEvent(type, {pointerId: 1, clientX: box.x + 5,
    clientY: box.y + share * box.height}));
  brush.setPointerCapture = () => {};
  at('pointerdown', 0.3); at('pointermove', 0.8); at('pointerup', 0.8); found.out = [...new Set(names('.out'))].sort();
  at('pointerdown', 0.1); at('pointerup', 0.1); found.in = names('.out');
  const boxes = [...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('text')].map(
    text => [text.textContent, text.getBoundingClientRect()]));
  found.overlaps = boxes.flatMap(all => all.flatMap(([a, one], i) => all.slice(i + 1).filter(([b, two]) =>
    one.left < two.right - 1 && two.left < one.right - 1 && one.top < two.bottom - 4 && two.top < one.bottom - 4)
    .map(([b]) => a + ' / ' + b)));
  found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  found.failures = failures;
  const out = document.createElement('pre'); out.id = 'probe'; out.textContent = JSON.stringify(found);
  document.body.append(out);
});</script></body>"""


def browse(page: Path, *options: str) -> str:
    """Open a page in a headless Chromium; its document afterwards."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser, "this test needs a Chromium in the path; it installs none"
    return subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,1700", *options,
                           page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    (tmp_path / "probed.html").write_text(sweep_page.page(record()).replace("</body>", PROBE))
    document = browse(tmp_path / "probed.html", "--dump-dom")
    found = json.loads(re.search(r'<pre id="probe">(.*)</pre>', document)[1])  # type: ignore[index]
    assert found["failures"] == [] and found["requests"] == 0 and not found["wide"]
    assert "".join(name[-1] for name in found["rows"]) == "abcdfe"
    assert "".join(name[-1] for name in found["sorted"])[:4] == "dbac"
    assert "".join(name[-1] for name in found["reversed"]).endswith("cabd")
    assert set(found["lit"]) == {"trial-c"} and len(found["lit"]) == 4 and found["after"] == []  # two lines, a dot and a row
    assert found["out"] == ["trial-c", "trial-d", "trial-e", "trial-f"] and found["in"] == []  # 0.5 and 0.45 of 0.4 .. 0.6
    assert found["overlaps"] == []


@pytest.mark.slow
def test_the_page_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(sweep_page.page(record()))
    browse(tmp_path / "page.html", f"--screenshot={tmp_path / 'page.png'}")
    picture_HWC = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    red, _, blue = np.moveaxis(picture_HWC.astype(int), 2, 0)
    assert (blue - red > 60).sum() > 1000 and (red - blue > 60).sum() > 1000  # trials, and the best one

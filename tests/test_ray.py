"""Whole runs as a user starts them: Ray Train workers under DeepSpeed, fed by Ray Data; killed, stopped, gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import tiny_plain

ROOT = Path(__file__).resolve().parent.parent
TWO_WORKERS = {"data__loader": "ray", "engine__kind": "deepspeed", "engine__zero_stage": 1, "engine__channels_last": True,
               "launch__workers": 2, "train__steps": 18, "train__keep_checkpoints": 4}
STEPS = TWO_WORKERS["train__steps"]

FIFTH, TENTH = (f"checkpoints/step_{step:08d}/complete.json" for step in (5, 10))


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "jobs/train_uda.py"), "--config", str(config), *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                            start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    return output


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], saved: str = "metrics.jsonl") -> None:
    """Wait until a run has logged a step, and written a file."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if run.joinpath("metrics.jsonl").exists() and len(run.joinpath("metrics.jsonl").read_text().splitlines()) >= step and (
                run.joinpath(saved).exists()):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in time")


def curve(run: Path) -> dict[int, dict[str, Any]]:
    """Logged losses by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: {k: v for k, v in r.items() if k.startswith(("loss", "pseudo"))} for r in records if "loss/labeled" in r}


def write_config(folder: Path, plain: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(plain))
    return folder / "tiny.yaml"


def train_workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training workers below a command, by start time."""
    children = psutil.Process(process.pid).children(recursive=True)
    workers = []
    for child in children:
        try:
            if any("RayTrainWorker" in part for part in child.cmdline()):
                workers.append(child)
        except psutil.Error:
            continue
    return sorted(workers, key=lambda worker: worker.create_time())


@pytest.fixture(scope="module")
def whole_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 18 steps on 2 workers, nothing going wrong."""
    folder = tmp_path_factory.mktemp("whole")
    output = finish(start(write_config(folder, tiny_plain(tiny, folder, **TWO_WORKERS))))
    assert "mIoU" in output and "written:" in output
    assert json.loads((folder / "run/result.json").read_text())["step"] == STEPS
    return folder / "run"


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> dict[int, dict[str, Any]]:
    """Its curve."""
    found = curve(whole_run)
    assert list(found) == list(range(1, STEPS + 1))
    return found


def test_a_killed_worker_is_replaced_then_sigterm_saves_and_a_new_process_ends_the_run_bit_for_bit(
        tiny: Path, tmp_path: Path, whole: dict[int, dict[str, Any]]) -> None:
    config = write_config(tmp_path, tiny_plain(tiny, tmp_path, **TWO_WORKERS))
    process = start(config)
    wait_for_step(tmp_path / "run", 6, process, FIFTH)
    workers = train_workers(process)
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    wait_for_step(tmp_path / "run", 10, process, TENTH)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and service managers do: Ray's own processes are sent it as well
    output = process.communicate(timeout=600)[0]
    assert "going on from step 5" in output
    assert process.returncode == 1 and "go on with --resume" in output, output
    saved = max(int(path.parent.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step_*/complete.json"))
    assert 10 <= saved < STEPS
    output = finish(start(config, "--resume"))
    assert f"going on from step {saved}" in output and curve(tmp_path / "run") == whole


@pytest.mark.slow
def test_one_worker_goes_on_from_two(tiny: Path, tmp_path: Path, whole_run: Path, whole: dict[int, dict[str, Any]]) -> None:
    plain = tiny_plain(tiny, tmp_path, **TWO_WORKERS)
    config = write_config(tmp_path, plain)
    shutil.copytree(whole_run, tmp_path / "run")  # as it was before step 10 was saved
    for step in (10, 15, STEPS):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:08d}")
    output = finish(start(config, "--resume", "launch.workers=1"))
    assert "going on from step 5 on 1 worker(s)" in output
    after = curve(tmp_path / "run")
    assert list(after) == list(range(1, STEPS + 1))
    assert {step: after[step] for step in range(1, 6)} == {step: whole[step] for step in range(1, 6)}
    # the same images from there on; batch norm sees them in one batch instead of two, so losses are near and not equal
    assert abs(after[6]["loss/labeled"] - whole[6]["loss/labeled"]) < 0.5 * whole[6]["loss/labeled"]

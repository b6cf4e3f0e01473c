"""cluster/: its scripts run, against SLURM's programs and metadata servers that are replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORD = '#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n'
SRUN = RECORD + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = RECORD + 'if [[ $1 == show ]]; then printf "one\\ntwo\\nthree\\n"; fi\n'
RAY = RECORD + '''echo "token ${{RAY_AUTH_MODE:-}} ${{#RAY_AUTH_TOKEN}}" >> "$CALLS"
if [[ $1 == start ]]; then exec sleep 60; fi
'''
PYTHON = RECORD + '''if [[ $1 == -c ]]; then exec {python} "$@"; fi
if [[ $1 == cluster/wait_for_nodes.py ]]; then exit "${{NODES_CODE:-0}}"; fi
trap 'sleep 1; echo saved >> "$CALLS"; exit 1' TERM
echo started >> "$CALLS"
for _ in $(seq "${{TENTHS:-1}}"); do sleep 0.1; done
exit "${{CODE:-0}}"
'''


class Slurm:
    """cluster/slurm.sh in an allocation of three nodes, whose programs write down how they were called."""

    def __init__(self, folder: Path) -> None:
        (folder / "venv/bin").mkdir(parents=True)
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ray", RAY), ("python", PYTHON)):
            path = folder / "venv/bin" / name
            path.write_text(text.format(name=name, python=sys.executable))
            path.chmod(0o755)
        self.env = os.environ | {
            "CALLS": str(self.calls_file), "ECOCSEG_VENV": str(folder / "venv"), "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "eco", "SLURM_JOB_NODELIST": "[one-three]", "SLURM_CPUS_PER_TASK": "8",
            "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT)}
        self.env.pop("RAY_ADDRESS", None)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", str(ROOT / "cluster/slurm.sh"), *words], env=self.env | env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                # a shell that runs the tests in the background has them ignore it, and so would bash here
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def run(self, *words: str, **env: str) -> int:
        process = self.start(*words, **env)
        output, _ = process.communicate(timeout=60)
        assert process.returncode is not None, output
        return process.returncode

    def calls(self, program: str) -> list[list[str]]:
        return [line.split()[1:] for line in self.calls_file.read_text().splitlines() if line.split()[0] == program]

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 60
        while text not in self.calls_file.read_text():
            assert time.monotonic() < end, self.calls_file.read_text()
            time.sleep(0.05)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_slurm_script_parses() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "cluster/slurm.sh")], check=True)
    directives = [line for line in (ROOT / "cluster/slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:TERM@120" in directives and "#SBATCH --requeue" in directives


def test_slurm_starts_a_head_and_workers_and_runs_the_command(slurm: Slurm) -> None:
    assert slurm.run("jobs/train_uda.py", "--recipe", "demo") == 0
    (_, head, others) = slurm.calls("srun")
    assert "--nodelist=one" in head and "--nodes=1" in head and "--head" in head
    assert "--nodelist=two,three" in others and "--nodes=2" in others and "--ntasks-per-node=1" in others
    (address,) = [word.removeprefix("--address=") for word in others if word.startswith("--address=")]
    assert address.endswith(":24711")  # 20000 and the job's number
    assert all({"--num-cpus=8", "--num-gpus=4", "--block"} <= set(step) for step in (head, others))
    assert ["jobs/train_uda.py", "--recipe", "demo", "run.name=eco-4711", "--resume", "auto"] in slurm.calls("python")
    assert set(map(tuple, slurm.calls("token"))) == {("token", "64")}
    assert ["requeue", "4711"] not in slurm.calls("scontrol")


def test_slurm_leaves_given_names_and_other_commands_alone(slurm: Slurm) -> None:
    slurm.run("jobs/train_uda.py", "run.name=mine", "--resume")
    slurm.run("tune/sweep.py", "--space", "tune/spaces/uda.yaml")
    slurm.run("jobs/evaluate.py", "runs/mine")
    commands = [words for words in slurm.calls("python") if words[0] not in ("-c", "cluster/wait_for_nodes.py")]
    assert commands == [["jobs/train_uda.py", "run.name=mine", "--resume"],
                        ["tune/sweep.py", "--space", "tune/spaces/uda.yaml", "--name", "eco-4711", "--resume", "auto"],
                        ["jobs/evaluate.py", "runs/mine"]]


@pytest.mark.parametrize("code", (1, 2))
def test_slurm_passes_failures_on_and_does_not_try_again(slurm: Slurm, code: int) -> None:
    assert slurm.run("jobs/train_uda.py", CODE=str(code)) == code
    assert ["requeue", "4711"] not in slurm.calls("scontrol")


def test_slurm_without_its_nodes_does_not_train(slurm: Slurm) -> None:
    assert slurm.run("jobs/train_uda.py", NODES_CODE="1") == 1
    assert "started" not in slurm.calls_file.read_text()


@pytest.mark.parametrize(("number", "again"), ((signal.SIGTERM, True), (signal.SIGINT, False)))
def test_slurm_saves_before_the_time_limit_and_queues_again(slurm: Slurm, number: int, again: bool) -> None:
    process = slurm.start("jobs/train_uda.py", TENTHS="300")
    slurm.wait_for("started")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 1
    lines = slurm.calls_file.read_text().splitlines()
    assert "saved" in lines and (lines.index("saved") < len(lines) - 1) == again
    assert (["requeue", "4711"] in slurm.calls("scontrol")) == again


DRIVER = """
import os, signal, sys, time
import ray
ray.init(log_to_driver=False)
def save(*_):
    print("saved", flush=True)
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
print("nodes", len(ray.nodes()), sys.argv[1:], flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_slurm_with_rays_own_programs(tmp_path: Path) -> None:
    """Two Ray nodes on this machine, a driver that saves when told, the job queued again, and nothing left behind."""
    slurm = Slurm(tmp_path)
    slurm.env["ECOCSEG_VENV"] = str(tmp_path / "other")
    (tmp_path / "other/bin").mkdir(parents=True)
    for name in ("srun", "scontrol"):
        (tmp_path / "venv/bin" / name).rename(tmp_path / "other/bin" / name)
    (tmp_path / "other/bin/scontrol").write_text((tmp_path / "other/bin/scontrol").read_text().replace("\\nthree", ""))
    number = str(10_000 + os.getpid())
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = slurm.start(str(driver), PATH=path, SLURM_JOB_ID=number, SLURM_CPUS_PER_TASK="1", SLURM_GPUS_ON_NODE="0")
    assert process.stdout is not None
    output = []
    too_long = threading.Timer(240, lambda: os.killpg(process.pid, signal.SIGKILL))
    too_long.start()
    for line in process.stdout:
        output.append(line)
        if line.startswith("nodes"):
            process.send_signal(signal.SIGTERM)
    too_long.cancel()
    assert process.wait(60) == 1, "".join(output)
    assert any(line.startswith("nodes 2") for line in output) and "saved\n" in output, "".join(output)
    assert ["requeue", number] in slurm.calls("scontrol")
    left = subprocess.run(["pgrep", "-f", f"/tmp/ray-{number}/"], capture_output=True, text=True).stdout
    shutil.rmtree(f"/tmp/ray-{number}", ignore_errors=True)
    assert not left, left


@pytest.fixture
def metadata() -> Iterator[tuple[str, dict[str, str], list[tuple[str, str, dict[str, str]]]]]:
    """A metadata server: its URL, what it answers by path, and what it was asked."""
    answers: dict[str, str] = {}
    asked: list[tuple[str, str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, "").encode())

        do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers, asked
    server.shutdown()
    server.server_close()


def watch(url: str, cloud: str, slurm: Slurm) -> subprocess.Popen[bytes]:
    path = f"{Path(slurm.env['ECOCSEG_VENV']) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen([sys.executable, str(ROOT / "cluster/spot_watch.py"), cloud, "--metadata", url],
                            env=slurm.env | {"PATH": path}, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("cloud", ("aws", "gcp"))
def test_spot_notice_drains_the_node(cloud: str, metadata: Any, slurm: Slurm) -> None:
    url, answers, asked = metadata
    answers["/latest/api/token"] = "secret"
    answers["/computeMetadata/v1/instance/preempted"] = "FALSE"
    process = watch(url, cloud, slurm)
    try:
        end = time.monotonic() + 60
        while not any("preempted" in path or "instance-action" in path for _, path, _ in asked):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not slurm.calls("ray")
        when = (datetime.now(UTC) + timedelta(seconds=119)).strftime("%Y-%m-%dT%H:%M:%SZ")
        answers["/latest/meta-data/spot/instance-action"] = json.dumps({"action": "terminate", "time": when})
        answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
        assert process.wait(60) == 0
    finally:
        process.kill()
    (call,) = slurm.calls("ray")
    assert call[0] == "drain-node" and call[call.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
    left = int(call[call.index("--deadline-remaining-seconds") + 1])
    assert left == 30 if cloud == "gcp" else 0 < left <= 119
    for _, path, headers in asked:
        if path.startswith("/computeMetadata"):
            assert headers["metadata-flavor"] == "Google"
        elif path != "/latest/api/token":
            assert headers["x-aws-ec2-metadata-token"] == "secret"


@pytest.mark.slow
def test_spot_notice_reaches_ray(metadata: Any, slurm: Slurm) -> None:
    import ray
    from ray.cluster_utils import Cluster

    url, answers, _ = metadata
    answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        working = ray.remote(num_cpus=1)(type("Working", (), {"ping": lambda self: None})).remote()
        ray.get(working.ping.remote())  # a node without work goes at once
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([sys.executable, str(ROOT / "cluster/spot_watch.py"), "gcp", "--metadata", url], timeout=120, check=True,
                       env=os.environ | {"PATH": path, "RAY_ADDRESS": cluster.address})
        assert list(ray._private.state.state.get_draining_nodes()) == [ray.get_runtime_context().get_node_id()]
    finally:
        ray.shutdown()
        cluster.shutdown()

"""Runs on several Ray nodes of one machine, submitted as jobs, with data and runs in a bucket: what is lost with a node.

Each proof prints a line for the README: seconds lost, steps done again. They take minutes each:

    python -m pytest -m slow tests/test_nodes.py -s
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import torch
import yaml
from conftest import tiny_plain
from moto.server import ThreadedMotoServer
from nodes import ROOT, Cluster, Node

from ecocseg import launch, loop
from ecocseg.config import load
from ecocseg.engine import World
from ecocseg.storage import Storage

pytestmark = pytest.mark.slow
AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
PATIENCE = 1200


class Place:
    """A cluster, a bucket that its nodes reach, and jobs on it."""

    def __init__(self, cluster: Cluster, port: int, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.endpoint, self.storage = f"http://{cluster.address}:{port}", Storage(endpoint=f"http://127.0.0.1:{port}")
        self.nodes: list[Node] = []

    def need(self, count: int) -> list[Node]:
        """Exactly so many nodes of two CPUs, room for one worker and its reader each."""
        self.nodes = [node for node in self.nodes if node.process.poll() is None]
        while len(self.nodes) > count:
            self.nodes.pop().kill()
        while len(self.nodes) < count:
            self.nodes.append(self.cluster.add(2))
        return self.nodes

    def config(self, name: str, **changes: Any) -> str:
        """The tiny recipe in the bucket; one worker a node."""
        plain = tiny_plain(self.folder, self.folder, **{
            "launch__workers": 2, "launch__cpus_per_worker": 1.5, "train__panels_every": 0, "train__steps": 24,
            "train__checkpoint_every": 6, "optim__schedule": "constant", **changes})
        plain["data"] |= {"labeled": "s3://bucket/tiny/source", "unlabeled": "s3://bucket/tiny/target",
                          "eval": {"val": "s3://bucket/tiny/val"}}
        plain |= {"run": {"directory": "s3://bucket/runs", "name": name}, "storage": {"endpoint": self.endpoint}}
        path = self.folder / f"{name}-{time.time_ns()}.yaml"
        path.write_text(yaml.safe_dump(plain))
        return str(path)

    def job(self, *words: str, **environment: str) -> Job:
        return Job(self.cluster, words, environment)

    def curve(self, name: str) -> dict[int, dict[str, Any]]:
        """Logged losses by step; every step must be there once."""
        records = [json.loads(line) for line in self.storage.read_bytes(f"s3://bucket/runs/{name}/metrics.jsonl").splitlines()]
        losses = [(r["step"], {key: value for key, value in r.items() if key.startswith(("loss", "pseudo", "gradient"))})
                  for r in records if "loss/labeled" in r]
        assert [step for step, _ in losses] == list(range(1, len(losses) + 1))
        return dict(losses)

    def result(self, name: str) -> dict[str, Any]:
        return json.loads(self.storage.read_bytes(f"s3://bucket/runs/{name}/result.json"))


class Job:
    """A submitted job and the lines it prints, each with its time."""

    def __init__(self, cluster: Cluster, words: tuple[str, ...], environment: dict[str, str]) -> None:
        self.cluster, self.lines = cluster, [(0.0, "")]
        self.process = cluster.submit(sys.executable, *words, **environment)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def find(self, pattern: str, after: float = 0.0) -> tuple[float, str] | None:
        return next(((at, line) for at, line in self.lines if at > after and re.search(pattern, line)), None)

    def wait_for(self, pattern: str, after: float = 0.0) -> tuple[float, str]:
        """Time and text of the first line that has a pattern."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.find(pattern, after)) is None:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text() + self.cluster.logs()
            time.sleep(0.1)
        return found

    def finish(self, code: int = 0) -> str:
        self.process.wait(timeout=PATIENCE)
        self.thread.join()
        assert self.process.returncode == code, self.text()
        return self.text()

    @property
    def id(self) -> str:
        return self.wait_for("raysubmit_")[1].split("'")[1]


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="0.0.0.0", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    before = {key: os.environ.get(key) for key in AWS}
    os.environ.update(AWS)
    cluster = Cluster(**AWS)
    try:
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1").create_bucket(Bucket="bucket")
        found = Place(cluster, port, tmp_path_factory.mktemp("nodes"))
        found.storage.upload_dir(str(tiny), "s3://bucket/tiny")
        print("\nnodes have addresses of their own" if cluster.network else "\nnodes share this machine's address")
        yield found
    finally:
        cluster.close()
        server.stop()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


@pytest.fixture(scope="module")
def whole(place: Place) -> dict[int, dict[str, Any]]:
    """The curve of two workers on two nodes, nothing going wrong; by RAY_ADDRESS instead of a job, from another folder."""
    place.need(2)
    done = subprocess.run([sys.executable, str(ROOT / "jobs/train_uda.py"), "--config", place.config("whole")],
                          env=place.cluster.environment | {"RAY_ADDRESS": f"{place.cluster.address}:{place.cluster.port}"},
                          cwd=place.folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.result("whole")["step"] == 24
    return place.curve("whole")


def workers_of(node: Node) -> list[psutil.Process]:
    return [process for process in node.family() if "RayTrainWorker" in " ".join(process.cmdline())]


def wait_until(done: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline and job.process.poll() is None, job.text()
        time.sleep(0.2)


def lost_steps(job: Job, since: float) -> tuple[float, int, int]:
    """Seconds from a failure to training again, the step reached before, and the one gone on from."""
    reached = re.search(r"after step (\d+)", job.wait_for("starting again", since)[1])
    at, line = job.wait_for("going on from step", since)
    begun = re.search(r"going on from step (\d+)", line)
    assert reached is not None and begun is not None
    return at - since, int(reached[1]), int(begun[1])


def say(what: str, seconds: float, steps: int) -> None:
    print(f"\n{what}: {seconds:.0f} s until training went on, {steps} step(s) done again")


def test_a_node_that_is_killed_is_replaced_and_the_curve_goes_on_bit_for_bit(
        place: Place, whole: dict[int, dict[str, Any]]) -> None:
    first, second = place.need(2)
    job = place.job("jobs/train_uda.py", "--config", place.config("killed"))
    job.wait_for("saved .*step_00000006")
    assert len(workers_of(first)) == len(workers_of(second)) == 1
    job.wait_for(r"step (9|1\d)/24")
    killed = time.monotonic()
    second.kill()
    job.wait_for(r"no worker is training for .* 2 worker\(s\) with 1.5 CPU each wait .* nodes: .*2 CPUs", killed)
    place.need(2)
    seconds, reached, begun = lost_steps(job, killed)
    output = job.finish()
    assert re.search(r"lost node .*\(number 1, launch.max_preemptions is", output)
    assert 0 < begun < reached and place.result("killed")["step"] == 24 and place.curve("killed") == whole
    say("a node killed with -9 and replaced, 2 workers", seconds, reached - begun)


def gone_on_with_here(place: Place, config: str, name: str, step: int, folder: Path) -> dict[int, float]:
    """Labelled loss of the three steps after a checkpoint of a run, as one worker in this process has them."""
    checkpoint = f"checkpoints/step_{step:08d}"
    place.storage.download_dir(f"s3://bucket/runs/{name}/{checkpoint}", str(folder / "run" / checkpoint))
    here = load(None, config, [f"train.steps={step + 3}", f"run.directory={folder}", "run.name=run", "launch.workers=1",
                               f"storage.endpoint={place.storage.endpoint}"])
    url = str(folder / "run")
    torch.set_num_threads(1)
    loop.run_worker(here, url, World(), lambda message: False, launch.tracker_factory(here, url))
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss/labeled"] for r in records if "loss/labeled" in r}


def test_an_elastic_run_loses_a_node_and_gets_one(place: Place, tmp_path: Path) -> None:
    """2 workers, 1, 2. The model has no batch norm: the same batches give the same losses, but for rounding, at any size."""
    _, second = place.need(2)
    config = place.config(
        "elastic", launch__workers=[1, 2], launch__resize_seconds=5.0, train__steps=5000, train__checkpoint_every=5,
        train__keep_checkpoints=9999, method__kind="supervised", model__encoder="convnext_atto", model__head="dpt",
        model__dropout=0.0)
    job = place.job("jobs/train_uda.py", "--config", config, RAY_JOB_STOP_WAIT_TIME_S="300")
    job.wait_for("saved .*step_00000005")
    killed = time.monotonic()
    second.kill()
    seconds, reached, begun = lost_steps(job, killed)
    assert f"from step {begun} on 1 worker" in job.wait_for("going on from step", killed)[1]
    say("elastic, a node killed with -9: 2 workers to 1", seconds, reached - begun)
    place.need(2)
    added = time.monotonic()
    asked, _ = job.wait_for("room for 2 worker", killed)
    again, line = job.wait_for(r"going on from step \d+ on 2 worker", asked)
    resized = int(line.split("from step ")[1].split()[0])
    assert job.find(f"saved .*step_{resized:08d}", asked) is not None  # nothing was done again
    say(f"elastic, a node more: 1 worker to 2, noticed {asked - added:.0f} s after it came", again - asked, 0)
    job.wait_for(rf"step \d+/5000|saved .*step_{resized + 5:08d}", again)
    place.cluster.ray("job", "stop", job.id)  # nobody knows how many steps a node takes to come
    steps = int(place.storage.list_dirs("s3://bucket/runs/elastic/checkpoints")[-1][-8:]) + 4
    place.job("jobs/train_uda.py", "--config", config, "--resume", "auto", f"train.steps={steps}").finish()
    found = {step: record["loss/labeled"] for step, record in place.curve("elastic").items()}
    assert place.result("elastic")["step"] == len(found) == steps
    for step in (begun, resized):
        here = gone_on_with_here(place, config, "elastic", step, tmp_path / str(step))
        assert here == pytest.approx({number: found[number] for number in here}, rel=1e-3) and len(here) == 3


def test_a_stopped_job_saves_and_a_new_one_goes_on_bit_for_bit(place: Place, whole: dict[int, dict[str, Any]]) -> None:
    place.need(2)
    words = ("jobs/train_uda.py", "--config", place.config("stopped", train__checkpoint_every=0))
    job = place.job(*words, RAY_JOB_STOP_WAIT_TIME_S="120")
    job.wait_for(r"step ([5-9]|1\d)/24")
    began = time.monotonic()
    place.cluster.ray("job", "stop", job.id)
    seconds = time.monotonic() - began
    assert "was stopped" in place.cluster.ray("job", "status", job.id)
    saved = place.storage.list_dirs("s3://bucket/runs/stopped/checkpoints")
    assert len(saved) == 1, job.text()
    again = place.job(*words, "--resume", "auto")
    assert f"going on from step {int(saved[0][-8:])} on 2 worker" in again.finish()
    assert place.curve("stopped") == whole
    say(f"ray job stop, {seconds:.0f} s to save and end, then submitted again", 0, 0)


def test_an_elastic_run_leaves_a_node_that_will_be_taken_away(place: Place) -> None:
    """A notice as autoscalers give it for spot nodes: the run saves and goes on elsewhere; nothing is done again."""
    _, second = place.need(2)
    job = place.job("jobs/train_uda.py", "--config", place.config(
        "noticed", launch__workers=[1, 2], train__steps=300, train__checkpoint_every=0))
    job.wait_for(r"step \d+/300")
    listed = json.loads(place.cluster.ray("list", "nodes", "--address", place.cluster.dashboard, "--format", "json"))
    (node,) = [node["node_id"] for node in listed if node["state"] == "ALIVE" and node["node_ip"] == second.address]
    told = time.monotonic()
    place.cluster.ray("drain-node", "--address", f"{place.cluster.address}:{place.cluster.port}", "--node-id", node, "--reason",
                      "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "120")
    saved, line = job.wait_for("saved", told)
    again, _ = job.wait_for(rf"going on from step {int(line[-8:])} on 1 worker", told)
    second.kill()
    say(f"a notice of 120 s, elastic: saved after {saved - told:.0f} s, 2 workers to 1", again - told, 0)
    job.finish()
    assert len(place.curve("noticed")) == 300
    assert "launch.max_" not in job.text(), job.text()


def test_a_new_head_goes_on_from_the_bucket(place: Place, whole: dict[int, dict[str, Any]]) -> None:
    """The driver lives on the head: without it the job ends, and is submitted again to the next."""
    place.need(2)
    words = ("jobs/train_uda.py", "--config", place.config("head"))
    job = place.job(*words)
    job.wait_for("saved .*step_00000006")
    lost = time.monotonic()
    place.cluster.lose_head()
    for node in place.nodes:
        node.kill()
    job.process.wait(timeout=PATIENCE)
    place.cluster.start_head()
    place.need(2)
    again = place.job(*words, "--resume", "auto")
    at, line = again.wait_for("going on from step")
    say("the head and all nodes killed, a new cluster, submitted again", at - lost, 0)
    again.finish()
    assert place.curve("head") == whole


def test_failures_reach_who_submits_them(place: Place) -> None:
    place.need(2)
    job = place.job("jobs/train_uda.py", "--config", place.config("refused", launch__workers=4))
    output = job.finish(1)
    assert "failed with exit code 2" in output
    assert re.search(r"error: launch.workers: 4 worker\(s\) x 1.5 CPU .* exceed", output.split("exit code 2")[1]), output
    job = place.job("jobs/train_uda.py", "--config", place.config("lost", launch__max_failures=0, train__steps=400))
    job.wait_for(r"step \d\d+/400")
    workers_of(place.nodes[0])[0].kill()
    status = job.finish(1).split("failed with exit code 1")[1]
    assert "failed: worker" in status and "launch.max_failures is 0" in status
    assert "run folder: s3://bucket/runs/lost" in status


def test_folders_that_other_nodes_do_not_have_are_refused(place: Place, tiny: Path, tmp_path: Path) -> None:
    if place.cluster.network is None:
        pytest.skip("nodes without namespaces of their own have all folders")
    place.need(1)
    place.nodes.append(place.cluster.add(2, hidden=str(tmp_path)))
    job = place.job("jobs/train_uda.py", "--config", place.config("local"), f"run.directory={tmp_path}/runs")
    output = job.finish(1)
    assert "failed with exit code 2" in output and f"run.directory: {tmp_path}/runs/local is a folder of this node" in output
    place.need(0)


def test_the_demo_as_a_job_reads_with_ray_and_survives_a_node(place: Place) -> None:
    """The demo, made in the bucket, on two nodes under DeepSpeed and Ray Data; once whole, once with a node killed."""
    short = ("train.steps=24", "train.checkpoint_every=8", "train.eval_every=0", "train.log_every=1", "train.panels_every=0",
             "train.compare_with_source_only=false", "train.labeled_batch=2", "train.unlabeled_batch=2", "data.crop=[64,64]",
             "optim.warmup_steps=2", "launch.workers=2", "launch.cpus_per_worker=1.5", "engine.threads=1",
             "eval.resize=[64,128]", "data.labeled=s3://bucket/demo/source", "data.unlabeled=s3://bucket/demo/target",
             "data.eval={target: s3://bucket/demo/target_eval}", "run.directory=s3://bucket/runs",
             f"storage.endpoint={place.endpoint}")
    place.need(2)
    place.job("jobs/train_uda.py", "--recipe", "demo", *short, "run.name=demo").finish()
    _, second = place.need(2)
    job = place.job("jobs/train_uda.py", "--recipe", "demo", *short, "run.name=demo-killed")
    job.wait_for("saved .*step_00000008")
    job.wait_for(r"step (1[0-9])/24")
    killed = time.monotonic()
    second.kill()
    place.need(2)
    seconds, reached, begun = lost_steps(job, killed)
    job.finish()
    assert place.result("demo-killed")["step"] == 24 and place.curve("demo-killed") == place.curve("demo")
    say("the demo: a node killed with -9 and replaced, 2 workers", seconds, reached - begun)

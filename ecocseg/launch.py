"""From a configuration to a finished run: pre-flight, Ray, workers, what a person sees, and leaving in good order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecocseg import checkpoint, loop
from ecocseg.config import RunConfig
from ecocseg.engine import World
from ecocseg.errors import InputError
from ecocseg.storage import Storage, is_remote, join

TEACHER = "teacher"
"""Folder of the first of ST++'s runs, in the folder of them all."""
LEAST_CPU = 0.1
"""Smallest CPU share a worker is placed with; Ray counts it, the operating system does not enforce it."""


WORKER_ENV = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824",
              "MALLOC_TOP_PAD_": "67108864", "OMP_WAIT_POLICY": "passive"}
"""What a worker's C libraries are told. glibc: keep freed memory; Ray Train runs the loop in a second thread, where it is
by default given back after every operation and faulted in again, half of a CPU step's time. OpenMP: threads that wait
sleep; when another process holds a core, spinning ones make a step twenty times slower."""


@dataclass(frozen=True)
class Resources:
    """What a run takes of a cluster: workers, CPUs and GPUs of each, CPUs left to ingest."""

    workers: int
    cpus_per_worker: float
    gpu: bool
    ingest_cpus: float
    threads: int

    def describe(self) -> str:
        what = "1 GPU" if self.gpu else f"{self.threads} threads"
        return (f"{self.workers} worker(s) with {self.cpus_per_worker:g} CPU and {what} each, "
                f"{self.ingest_cpus:g} CPU for ingest")


def plan_resources(config: RunConfig, cpus: float, gpus: int) -> Resources:
    """Fit workers and ingest into `cpus` and `gpus`, or say what does not fit.

    Ray Data and Ray Train would wait for ever for what a cluster does not have, so this is decided before either starts.

    Raises:
        InputError: with the numbers, naming the key to change.
    """
    use_gpu = gpus > 0 if config.launch.gpu is None else config.launch.gpu
    if use_gpu and gpus < 1:
        raise InputError("launch.gpu: true, and the cluster has no GPU; use launch.gpu=null to train on CPUs")
    workers = config.launch.workers or (gpus if use_gpu else 1)
    if use_gpu and workers > gpus:
        raise InputError(f"launch.workers: {workers} workers need {workers} GPUs, the cluster has {gpus}; "
                         f"use {gpus} or fewer, or launch.gpu=false")
    if not use_gpu and workers > cpus:
        raise InputError(f"launch.workers: {workers} workers need {workers} CPU cores, the cluster has {cpus:g}; "
                         f"use {int(cpus)} or fewer")
    loop.micro_batches(config, workers)
    data = config.data
    per_stream = data.read_cpus + (data.decode_threads if data.decode == "ray" else 0)
    ingest = max(1.0, workers * len(config.streams) * per_stream) if data.loader == "ray" else 0.0
    share = config.launch.cpus_per_worker or min(4.0, int((cpus - ingest) / workers * 100) / 100)
    if share < LEAST_CPU or workers * share + ingest > cpus + 1e-9:
        raise InputError(f"launch.workers: {workers} worker(s) x {share:g} CPU + {ingest:g} CPU for ingest exceed the "
                         f"cluster's {cpus:g} CPUs; use fewer workers, a smaller launch.cpus_per_worker, "
                         "data.read_cpus or data.decode_threads")
    # Not more threads than the worker's share: spinning threads and Ray's own would fight for the cores.
    threads = config.engine.threads or max(1, int(share))
    return Resources(workers, share, use_gpu, ingest, threads)


def cluster_size() -> tuple[float, int]:
    """CPUs and GPUs of the Ray cluster this process is connected to, or of this machine."""
    import ray

    if ray.is_initialized():
        total = ray.cluster_resources()
        return float(total.get("CPU", 0)), int(total.get("GPU", 0))
    return float(_own_cores()), torch.cuda.device_count()


def _own_cores() -> int:
    """Cores this process may run on: `taskset` and containers give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_ray() -> None:
    """Connect to the cluster in RAY_ADDRESS, or start one on this machine, with Ray's own noise turned down."""
    quiet = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_TQDM": "0",
             "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    import logging

    import ray

    if ray.is_initialized():
        return
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([package] + [p for p in [os.environ.get("PYTHONPATH")] if p])
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"address": "local", "include_dashboard": False, "num_cpus": _own_cores(),
                    "runtime_env": {"env_vars": {"PYTHONPATH": path, **quiet}}}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(**options)
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Board:
    """What workers tell the driver and the driver asks of workers; a Ray actor without resources."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.stop = False
        self.failure: dict[str, str] | None = None

    def post(self, message: dict[str, Any]) -> bool:
        self.messages.append(message)
        return self.stop

    def take(self) -> list[dict[str, Any]]:
        taken, self.messages = self.messages, []
        return taken

    def request_stop(self) -> None:
        self.stop = True

    def fail(self, kind: str, text: str) -> None:
        self.failure = self.failure or {"kind": kind, "text": text}

    def failed(self) -> dict[str, str] | None:
        return self.failure


def worker_main(payload: dict[str, Any]) -> None:
    """What every Ray Train worker runs. Errors nobody can retry away are posted, so that a restart ends at once; others, a
    lost worker or `StorageUnavailable`, are gone on from at the newest checkpoint, up to launch.max_failures times."""
    import ray
    import ray.train.torch

    board = payload["board"]
    if ray.get(board.failed.remote()) is not None:
        return
    config = RunConfig.model_validate(payload["config"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(payload["threads"])
    world = World(context.get_world_rank(), context.get_world_size(), device)

    def report(message: dict[str, Any]) -> bool:
        return ray.get(board.post.remote(message))

    try:
        final = loop.run_worker(config, payload["run_url"], world, report, tracker_factory(config, payload["run_url"]))
    except loop.Stopped as stopped:
        board.fail.remote("stopped", str(stopped))
        return
    except (InputError, FloatingPointError) as error:
        ray.get(board.fail.remote("input" if isinstance(error, InputError) else "failed", str(error)))
        raise
    if world.rank == 0:
        report({"kind": "final", **final})


def tracker_factory(config: RunConfig, run_url: str) -> loop.TrackerFactory:
    """Makes the tracker of rank 0, which writes into the run's folder, or into a local one first when that is a bucket."""
    from ecocseg.tracking import METRICS_FILE, Tracker

    def make(start_step: int, console: Callable[[dict[str, Any]], None]) -> Tracker:
        local = run_url if not is_remote(run_url) else tempfile.mkdtemp(prefix="ecocseg-")
        if is_remote(run_url) and start_step > 1:  # the curve so far goes on
            with contextlib.suppress(FileNotFoundError):
                before = checkpoint.build_storage(config).read_bytes(join(run_url, METRICS_FILE))
                Path(local, METRICS_FILE).write_bytes(before)
        return Tracker(local, config.train.steps, start_step, console, tensorboard=config.tracking.tensorboard)

    return make


@dataclass
class RunResult:
    """How a run ended: its folder, last step and, by evaluation set and model, the results."""

    run_url: str
    step: int
    results: dict[str, Any]
    classes: list[str]
    final: dict[str, Any]

    def miou(self, which: str = "student") -> float:
        """mIoU on the first evaluation set, in [0, 1]."""
        return next(iter(self.results.values()))[which]["miou"]


class RunFailed(RuntimeError):
    """The run ended before its last step; the message says where and how to go on."""


class RunStopped(RunFailed):
    """Somebody asked for the end, by Ctrl-C or SIGTERM."""


def choose_run(config: RunConfig, resume: str | None) -> tuple[RunConfig, str]:
    """Name the run and find its folder. `resume` is None (new), "yes" (there must be one) or "auto".

    Raises:
        InputError: when a new run's folder already holds checkpoints, or there is nothing to resume.
    """
    storage = checkpoint.build_storage(config)
    root, name = config.run.directory, config.run.name
    if not is_remote(root):
        root = str(Path(root).resolve())
    storage.check(root)
    if name is None and resume is not None:
        named = re.compile(re.escape(config.recipe) + r"-\d{8}-\d{6}")
        runs = sorted(n for n in storage.list_dirs(root) if named.fullmatch(n))
        runs = [n for n in runs if _started(join(root, n), storage)]
        name = runs[-1] if runs else None
        if name is None and resume == "yes":
            raise InputError(f"--resume: no run of '{config.recipe}' with a checkpoint under {root}; start without it, or "
                             "name the run with run.name=")
    name = name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    url = join(root, name)
    there = _started(url, storage)
    if there and resume is None:
        raise InputError(f"run.name: {url} already holds checkpoints; go on with --resume, or choose another run.name")
    if not there and resume == "yes":
        raise InputError(f"--resume: {url} holds no complete checkpoint; start without it")
    return config.updated(run={"name": name}), url


def _started(run_url: str, storage: Storage) -> bool:
    return any(checkpoint.Checkpoints(url, storage).complete() for url in (run_url, join(run_url, TEACHER)))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run with local paths made absolute: workers start in a folder of their own."""
    def absolute(path: str | None) -> str | None:
        return path if path is None or is_remote(path) else str(Path(path).resolve())

    data, book = config.data, config.coding.codebook
    pretrained = config.model.pretrained
    if pretrained is not None and Path(pretrained).exists():
        pretrained = absolute(pretrained)
    return config.updated(
        data={"labeled": absolute(data.labeled), "unlabeled": absolute(data.unlabeled),
              "eval": {name: absolute(url) for name, url in data.eval.items()}},
        coding={"codebook": book.model_dump() | {"path": absolute(book.path), "embeddings": absolute(book.embeddings)}},
        model={"pretrained": pretrained}, run={"directory": absolute(config.run.directory)})


def preflight(config: RunConfig, run_url: str) -> None:
    """Everything that can be checked before a worker is placed: data, output, model and coding.

    Raises:
        InputError: naming the key or file and the remedy.
    """
    from ecocseg.data.shards import check_files

    storage = checkpoint.build_storage(config)
    for url in (config.data.labeled, config.data.unlabeled, *config.data.eval.values(), run_url):
        if url is not None:
            storage.check(url)
    prepare_data(config, storage)
    manifests = loop.load_manifests(config)
    for manifest in manifests.values():
        check_files(manifest, storage)
    storage.check_writable(run_url)
    classes = manifests["labeled"].classes
    bad = [c for c in config.method.feature_distance_classes if c >= classes.num_classes]
    if bad:
        raise InputError(f"method.feature_distance_classes: {bad} are no ids of '{classes.name}', which has "
                         f"{classes.num_classes} classes")
    book = checkpoint.build_codebook(config.coding, classes)
    loop.check_codebooks(config, manifests, book)
    coding = checkpoint.build_coding(config.coding, book, classes.num_classes)
    with torch.device("meta"):
        checkpoint.build_model(config.model, coding.num_outputs, pretrained=False)


def prepare_data(config: RunConfig, storage: Storage) -> None:
    """Make the built-in data set where the recipe wants it and it is not yet."""
    if config.data.prepare is None or storage.exists(join(str(config.data.labeled), "manifest.json")):
        return
    from ecocseg.data.sources import demo

    root = str(config.data.labeled).rstrip("/").rpartition("/")[0]
    print(f"making the demo scenes in {root}")
    demo.prepare(root, demo.SSL_PARTS if config.data.prepare == "demo_ssl" else demo.PARTS, storage=storage)


def write_run_files(config: RunConfig, run_url: str) -> None:
    """What is needed to run it again: resolved config, codebook, versions, commit, data hashes."""
    storage, manifests = checkpoint.build_storage(config), loop.load_manifests(config)
    book = checkpoint.build_codebook(config.coding, manifests["labeled"].classes)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True,
                                cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    facts = {"commit": commit, "seed": config.train.seed, "versions": checkpoint.versions(),
             "manifests": {name: {"url": m.url, "hash": m.hash, "rows": m.num_rows} for name, m in manifests.items()}}
    storage.write_bytes(join(run_url, "config.yaml"), config.to_yaml().encode())
    storage.write_bytes(join(run_url, "environment.json"), json.dumps(facts, indent=1).encode())
    if book is not None:
        storage.write_bytes(join(run_url, "codebook.json"), json.dumps(book.to_dict()).encode())


def train(config: RunConfig, resume: str | None = None, display: Any = None,
          stop: threading.Event | None = None) -> RunResult:
    """Run a configuration to its end with Ray Train; once `stop` is set, it saves and ends as after Ctrl-C.

    Raises:
        InputError: for bad input, before or during training.
        RunFailed: when the run was lost (RunStopped: stopped); what was saved can be gone on from.
    """
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config, run_url = choose_run(with_absolute_paths(config), resume)
    preflight(config, run_url)
    if config.launch.wait:
        from ecocseg import scale

        scale.wait_for_room(config, lambda text: display and display.update({"kind": "message", "text": text}))
    start_ray()
    resources = plan_resources(config, *cluster_size())
    write_run_files(config, run_url)
    board = ray.remote(num_cpus=0)(Board).remote()
    storage_path, filesystem = join(run_url, ".ray"), None
    if is_remote(run_url):
        filesystem, storage_path = checkpoint.build_storage(config).open(storage_path)
    trainer = TorchTrainer(
        worker_main,
        train_loop_config={"config": config.model_dump(mode="json"), "run_url": run_url, "board": board,
                           "threads": resources.threads},
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.gpu else {})}),
        run_config=RayRunConfig(name=f"train-{time.time_ns()}", storage_path=storage_path, storage_filesystem=filesystem,
                                worker_runtime_env={"env_vars": WORKER_ENV},  # type: ignore[call-arg]
                                failure_config=FailureConfig(max_failures=config.launch.max_failures)))
    if display is not None:
        display.restart(config.run.name or config.recipe)
        display.update({"kind": "message", "text": f"{config.recipe}: {resources.describe()}; run folder {run_url}"})
    final = watch(trainer.fit, board, display, stop)
    result = RunResult(run_url, final["step"], final["results"], final["classes"], final)
    checkpoint.build_storage(config).write_bytes(join(run_url, "result.json"), json.dumps(
        {"recipe": config.recipe, "seed": config.train.seed, **final}, indent=1).encode())
    return result


def watch(fit: Callable[[], Any], board: Any, display: Any, stop: threading.Event | None = None) -> dict[str, Any]:
    """Run `fit` beside this thread, show what arrives, pass Ctrl-C, SIGTERM and `stop` on as a request to save and stop."""
    import ray

    error: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as caught:  # noqa: BLE001 - carried to the main thread
            error.append(caught)

    asked: list[float] = []
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda s, frame: _on_signal(asked, board))
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    final: dict[str, Any] | None = None
    try:
        while True:
            alive = thread.is_alive()
            for message in ray.get(board.take.remote()):
                if message["kind"] == "final":
                    final = message
                if display is not None:
                    display.update(message)
            if not alive:
                break
            if stop is not None and stop.is_set() and not asked:
                asked.append(time.monotonic())
                board.request_stop.remote()
            thread.join(0.3)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    failure = ray.get(board.failed.remote())
    if final is not None:
        return final
    if failure is not None and failure["kind"] == "input":
        raise InputError(failure["text"])
    cause = failure["text"] if failure is not None else _cause(error)
    raise (RunStopped if asked else RunFailed)(cause) from (error[0] if error and failure is None else None)


def _on_signal(asked: list[float], board: Any) -> None:
    """First: save and stop. Again: stop at once; a copy of the first, as `timeout` sends it, is not "again"."""
    asked.append(time.monotonic())
    if asked[-1] - asked[0] < 2 and len(asked) > 1:
        return
    if len(asked) == 1:
        print("\nstopping: saving a checkpoint first (again to stop at once)", file=sys.stderr, flush=True)
        board.request_stop.remote()
    else:
        os._exit(130)


def _cause(error: list[BaseException]) -> str:
    if not error:
        return "the workers ended without a result; go on with --resume"
    failures = getattr(error[0], "worker_failures", None) or {}
    lines = [f"worker {rank}: {str(what).strip().splitlines()[-1]}" for rank, what in failures.items()]
    return "; ".join(lines) or f"{type(error[0]).__name__}: {error[0]}"

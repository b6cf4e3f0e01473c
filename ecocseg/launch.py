"""From a configuration to a finished run: pre-flight, Ray, workers, what a person sees, and leaving in good order."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ecocseg import checkpoint, cluster, loop, runfiles, scale, trackers
from ecocseg.cluster import cluster_nodes, cluster_size, start_ray
from ecocseg.config import RunConfig
from ecocseg.engine import World
from ecocseg.errors import InputError, Restart, StorageUnavailable
from ecocseg.owner import owned
from ecocseg.preflight import preflight
from ecocseg.resources import Resources, ingest_cpus, plan_on_nodes, plan_resources
from ecocseg.storage import Storage, is_remote, join
from ecocseg.watch import RunFailed, RunStopped, Vigil, make_board, watch

__all__ = ["Resources", "RunFailed", "RunResult", "RunStopped", "choose_run", "cluster_nodes", "cluster_size", "plan_on_nodes",
           "plan_resources", "preflight", "start_ray", "train", "with_absolute_paths"]

TEACHER = "teacher"
"""Folder of the first of ST++'s runs, in the folder of them all."""
WORKER_ENV = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824",
              "MALLOC_TOP_PAD_": "67108864", "OMP_WAIT_POLICY": "passive"}
"""What a worker's C libraries are told. glibc: keep freed memory; Ray Train runs the loop in a second thread, where it is
by default given back after every operation and faulted in again, half of a CPU step's time. OpenMP: threads that wait
sleep; when another process holds a core, spinning ones make a step twenty times slower."""


def worker_main(payload: dict[str, Any]) -> None:
    """What every Ray Train worker runs. Errors nobody can retry away are posted, so that a restart ends at once; others, a
    lost worker or `StorageUnavailable`, are gone on from at the newest checkpoint, as `restarts.Retries` decides."""
    import ray
    import ray.train.torch

    board, run_url = payload["board"], payload["run_url"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if ray.get(board.begin.remote(rank, ray.get_runtime_context().get_node_id())) is not None:
        return
    config = RunConfig.model_validate(payload["config"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(payload["threads"])
    world = World(rank, context.get_world_size(), device)

    def report(message: dict[str, Any]) -> str:
        return ray.get(board.post.remote(message))

    notice = _preemption_notice(isinstance(config.launch.workers, tuple)) if payload["preemptible"] else None
    try:
        final = loop.run_worker(config, run_url, world, report, tracker_factory(config, run_url), notice)
    except loop.Stopped as stopped:
        if rank == 0:
            ray.get(board.fail.remote("stopped", str(stopped)))
        return
    except Restart:
        raise
    except (InputError, FloatingPointError) as error:
        ray.get(board.fail.remote("input" if isinstance(error, InputError) else "failed", str(error)))
        raise
    except Exception as error:
        ray.get(board.note.remote({"rank": rank, "kind": type(error).__name__, "text": f"{type(error).__name__}: {error}",
                                   "step": getattr(error, "step", None), "passes": isinstance(error, StorageUnavailable)}))
        raise
    if rank == 0:
        report({"kind": "final", **final})


def _preemption_notice(elastic: bool) -> loop.Notice:
    """What to do when Ray has been told that a node of theirs will be taken away: an elastic run saves and goes on without
    it; another one needs as many nodes, so it stays until the end, and saves at every log line."""
    import ray.train

    def notice() -> str:
        told = ray.train.get_preemption_info()  # a collective of Ray's own
        return "" if told is None else "restart" if elastic else "save"

    return notice


def tracker_factory(config: RunConfig, run_url: str) -> loop.TrackerFactory:
    """Makes the tracker of rank 0, which writes into the run's folder, or into a local one first when that is a bucket."""
    from ecocseg.tracking import METRICS_FILE, Tracker

    def make(start_step: int, console: Callable[[dict[str, Any]], None]) -> Tracker:
        storage = checkpoint.build_storage(config)
        local = run_url if not is_remote(run_url) else tempfile.mkdtemp(prefix="ecocseg-")
        if is_remote(run_url) and start_step > 1:  # the curve so far goes on
            with contextlib.suppress(FileNotFoundError):
                Path(local, METRICS_FILE).write_bytes(storage.read_bytes(join(run_url, METRICS_FILE)))
        tags = runfiles.tags(runfiles.read(run_url, storage), config.recipe)
        info = trackers.RunInfo(config.run.name or config.recipe, config, tags, Path(local), run_url, storage)
        sinks = trackers.sinks(info, lambda text: console({"kind": "message", "text": text}))
        return Tracker(local, config.train.steps, start_step, console, tensorboard=config.tracking.tensorboard, sinks=sinks)

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


def choose_run(config: RunConfig, resume: str | None) -> tuple[RunConfig, str]:
    """Name the run and find its folder. `resume` is None (new), "yes" (there must be one) or "auto".

    Raises:
        InputError: when a new run's folder already holds checkpoints, or there is nothing to resume.
    """
    storage = checkpoint.build_storage(config)
    root, name = config.run.directory, config.run.name
    root = cluster.absolute(root)
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
        return None if path is None else cluster.absolute(path)

    data, book = config.data, config.coding.codebook
    pretrained = config.model.pretrained
    if pretrained is not None and Path(pretrained).exists():
        pretrained = absolute(pretrained)
    return config.updated(
        data={"labeled": absolute(data.labeled), "unlabeled": absolute(data.unlabeled),
              "eval": {name: absolute(url) for name, url in data.eval.items()}},
        coding={"codebook": book.model_dump() | {"path": absolute(book.path), "embeddings": absolute(book.embeddings)}},
        model={"pretrained": pretrained}, run={"directory": absolute(config.run.directory)})


def train(config: RunConfig, resume: str | None = None, display: Any = None,
          stop: threading.Event | None = None) -> RunResult:
    """Run a configuration to its end with Ray Train; once `stop` is set, it saves and ends as after Ctrl-C.

    Raises:
        InputError: for bad input, before or during training.
        RunFailed: when the run was lost (RunStopped: stopped); what was saved can be gone on from.
    """
    def say(text: str) -> None:
        if display is not None:
            display.update({"kind": "message", "text": text})

    config, run_url = choose_run(with_absolute_paths(config), resume)
    planned = None if config.launch.wait else plan_on_nodes(config, cluster_nodes())
    preflight(config, run_url, planned.possible if planned else ())
    if config.launch.wait:
        scale.wait_for_room(config, say)
    start_ray()
    resources = plan_on_nodes(config, cluster_nodes())
    stop = stop or threading.Event()

    def lost() -> None:
        say("another driver has taken this run over; stopping")
        stop.set()

    with owned(run_url, checkpoint.build_storage(config), lost, say):
        check_shared(config, run_url)
        runfiles.write(config, run_url)
        final = run_workers(config, run_url, resources, display, stop)
        result = RunResult(run_url, final["step"], final["results"], final["classes"], final)
        checkpoint.build_storage(config).write_bytes(join(run_url, "result.json"), json.dumps(
            {"recipe": config.recipe, "seed": config.train.seed, **final}, indent=1).encode())
    return result


def run_workers(config: RunConfig, run_url: str, resources: Resources, display: Any, stop: threading.Event) -> dict[str, Any]:
    """Place workers, show what they tell, and wait for their end; returns what the last step gave."""
    board = make_board()
    trainer = make_trainer(config, run_url, resources, board)
    if display is not None:
        display.restart(config.run.name or config.recipe)
        display.update({"kind": "message", "text": f"{config.recipe}: {resources.describe()}; run folder {run_url}"})
    try:
        return watch(trainer.fit, board, display, stop, Vigil(board, lambda: lacking(resources)))
    except RunFailed as failure:
        failure.run_url = run_url
        raise
    except InputError as error:
        raise InputError(f"{error} (run folder {run_url})") from None


def lacking(resources: Resources) -> str:
    """What a run without workers waits for, beside what the cluster has."""
    each = f"{resources.cpus_per_worker:g} CPU{' and 1 GPU' if resources.gpu else ''}"
    there = ", ".join(f"{cpus:g} CPUs{f' and {gpus} GPUs' if gpus else ''}" for cpus, gpus in cluster_nodes()) or "none"
    return (f"{min(resources.possible)} worker(s) with {each} each wait for free room; the cluster's nodes: {there}. "
            "The run goes on by itself as soon as there is room")


def check_shared(config: RunConfig, run_url: str) -> None:
    """See that the other nodes of a cluster find what is local. InputError naming the key."""
    data = {"data.labeled": config.data.labeled, "data.unlabeled": config.data.unlabeled if config.needs_unlabeled else None,
            **{f"data.eval.{name}": url for name, url in config.data.eval.items()}}
    manifests = {key: join(url, "manifest.json") for key, url in data.items() if url is not None and not is_remote(url)}
    cluster.check_shared(None if is_remote(run_url) else run_url, manifests)


def make_trainer(config: RunConfig, run_url: str, resources: Resources, board: Any) -> Any:
    """Ray's trainer of this run, with our view of when to begin again and of how many workers there may be."""
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, ScalingConfig
    from ray.train.v2.api.config import RunConfig as RayRunConfig

    from ecocseg.restarts import Retries, Sizes, Trainer

    launch, sizes = config.launch, resources.sizes
    scaling = ScalingConfig(
        num_workers=(sizes[0], sizes[-1]) if sizes else resources.workers, use_gpu=resources.gpu,
        elastic_resize_monitor_interval_s=launch.resize_seconds,
        resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.gpu else {})})
    failures = FailureConfig(max_failures=launch.max_failures, max_preemption_failures=launch.max_preemptions)
    policies: dict[str, Any] = {"failure_policy": Retries(board, failures)}
    if sizes:
        plans = {size: replace(resources, workers=size, ingest_cpus=ingest_cpus(config, size)) for size in sizes}
        policies["scaling_policy"] = Sizes(board, scaling, plans)
    storage_path, filesystem = join(run_url, ".ray"), None
    if is_remote(run_url):
        filesystem, storage_path = checkpoint.build_storage(config).open(storage_path)
    return Trainer(
        worker_main, policies=policies,
        train_loop_config={"config": config.model_dump(mode="json"), "run_url": run_url, "board": board,
                           "threads": resources.threads, "preemptible": cluster.is_preemptible()},
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo"), scaling_config=scaling,
        run_config=RayRunConfig(name=f"train-{time.time_ns()}", storage_path=storage_path, storage_filesystem=filesystem,
                                worker_runtime_env={"env_vars": WORKER_ENV},
                                failure_config=failures))

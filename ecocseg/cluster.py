"""The Ray cluster a command runs on: connecting, sending the code along, its nodes, and what local paths mean there.

A command runs unchanged on this machine, on the cluster in RAY_ADDRESS, or as a job (`ray job submit`). On a cluster the
driver's machine is one node among others: sizes are asked of Ray, and files are looked for where workers will be.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecocseg.errors import InputError

Node = tuple[float, int]
"""CPUs and GPUs of a node."""

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable in which Ray gives the driver of a submitted job its runtime environment."""
HOME = "ECOCSEG_HOME"
"""Variable that names the folder of a job's relative paths; ~/ecocseg unless it is set."""
PREEMPTION = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE", HOME)
"""Variables that say where storage is, and travel to the workers. Credentials do not: Ray shows what travels on its
dashboard. Nodes have their own, by role or in their environment."""


def start_ray() -> None:
    """Connect to the cluster in RAY_ADDRESS, or start one on this machine, with Ray's own noise turned down."""
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    quiet = {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_TQDM": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
             "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    # A second, not two: a lost worker, and the end, are noticed so much sooner. 20 s, not 60: after a node is lost the first
    # try may still ask for what it had; that is waited out, and then asked for again as often as needed.
    waits = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    if not on_cluster:  # this machine is not taken away from itself
        quiet[PREEMPTION] = "0"
    for key, value in (quiet | waits).items():
        os.environ.setdefault(key, value)
    import logging

    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if on_cluster:
        options["runtime_env"] = _runtime_env(quiet)
    else:
        # By this process's own environment, which Ray's inherit: with a runtime environment the workers that Ray starts with
        # would be of no use, and others be started in their place.
        path = [str(_package().parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
        options |= {"address": "local", "include_dashboard": False, "num_cpus": own_cores()}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with contextlib.nullcontext() if on_cluster else _deaf_children():
            ray.init(**options)
    except ConnectionError as error:
        raise InputError(f"RAY_ADDRESS: no Ray cluster answers at {os.environ['RAY_ADDRESS']} ({str(error).splitlines()[0]}); "
                         "start it (`ray start --head`), or unset RAY_ADDRESS to train on this machine") from None
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started meanwhile, and theirs, do not hear SIGTERM.

    `timeout`, systemd, SLURM and many wrappers signal a command and everything it started at once, and a run that is to save
    before it leaves needs its Ray until then. Ray itself ends them by SIGKILL, after a second.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_preemptible() -> bool:
    """Whether Ray watches for nodes that will be taken away."""
    return os.environ.get(PREEMPTION, "1").lower() not in ("0", "false")


def _package() -> Path:
    return Path(__file__).resolve().parent


def job_environment() -> dict[str, Any] | None:
    """The runtime environment of the job whose driver this is; None in any other process."""
    text = os.environ.get(JOB_CONFIG)
    return None if text is None else json.loads(text).get("runtime_env") or {}


def _runtime_env(quiet: dict[str, str]) -> dict[str, Any]:
    """What workers on other nodes need: this package, unless the job's working directory brings it, and quiet."""
    job = job_environment() or {}
    taken = job.get("env_vars") or {}
    variables = quiet | {name: os.environ[name] for name in PLACES if os.environ.get(name)}
    environment: dict[str, Any] = {"env_vars": {name: value for name, value in variables.items() if name not in taken}}
    if not {"working_dir", "py_modules"} & job.keys():
        environment |= {"py_modules": [str(_package())]}
    return environment


def own_cores() -> int:
    """Cores this process may run on: `taskset` and containers give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _this_machine() -> Node:
    import torch

    return float(own_cores()), torch.cuda.device_count()


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster in RAY_ADDRESS, to which this connects, or this machine."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        start_ray()
    if not ray.is_initialized():
        return [_this_machine()]
    return [node_shape(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def cluster_size() -> tuple[float, int]:
    """CPUs and GPUs of the cluster this process is connected to, or of this machine."""
    import ray

    nodes = cluster_nodes() if ray.is_initialized() else [_this_machine()]
    return sum(node[0] for node in nodes), sum(node[1] for node in nodes)


def node_shape(resources: dict[str, Any]) -> Node:
    return float(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def absolute(path: str) -> str:
    """A path as every process of a run has it; URLs stay as they are.

    The working directory of a job that was sent with one is a copy that Ray deletes afterwards. What is not in it, a run's
    folder or data to be made, lies in `ECOCSEG_HOME` (~/ecocseg) instead, where the next job finds it.
    """
    if "://" in path:
        return path
    given = Path(path).expanduser()
    copied = (job_environment() or {}).get("working_dir")
    if given.is_absolute() or not copied or given.exists():
        return str(given.resolve())
    return str(Path(os.environ.get(HOME) or "~/ecocseg").expanduser().resolve() / given)


def lasting(path: str) -> str:
    """A path to write to: in a job `absolute`, elsewhere as it was given."""
    return path if job_environment() is None else absolute(path)


def check_shared(folder: str | None, files: dict[str, str]) -> None:
    """See that every node finds the run's local folder, if it is one, and local files, given by the key they stand under.

    Raises:
        InputError: naming the key and the nodes that do not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes()
              if node["Alive"] and node["NodeID"] != here and any(node_shape(node["Resources"]))]
    if not others or not (folder or files):
        return
    with _marked(folder) as mark:
        wanted = files | ({"run.directory": mark} if mark else {})
        look = ray.remote(num_cpus=0, max_retries=0)(_missing)
        found = [look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(wanted)
                 for node in others]
        missing: dict[str, set[str]] = {}
        for node, ref in zip(others, found, strict=True):
            with contextlib.suppress(ray.exceptions.RayError):  # a node that is lost by now, or starts no task in time
                for key in ray.get(ref, timeout=60):
                    missing.setdefault(key, set()).add(node["NodeManagerAddress"])
    for key, nodes in missing.items():
        where = folder if key == "run.directory" else Path(wanted[key]).parent
        raise InputError(f"{key}: {where} is a folder of this node ({ray.util.get_node_ip_address()}), and other nodes of the "
                         f"cluster do not have it ({', '.join(sorted(nodes)[:3])}); give s3://bucket/key, or a folder that all "
                         "nodes share")


@contextlib.contextmanager
def _marked(folder: str | None) -> Iterator[str | None]:
    """A file of a name nobody has, in a folder."""
    if folder is None:
        yield None
        return
    mark = Path(folder, f".seen-by-all-{uuid.uuid4().hex}")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield str(mark)
    finally:
        mark.unlink(missing_ok=True)


def _missing(paths: dict[str, str]) -> list[str]:
    """Ray task: keys of what is not there."""
    return [key for key, path in paths.items() if not Path(path).exists()]

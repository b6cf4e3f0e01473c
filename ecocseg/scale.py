"""Room for a run on a cluster that grows by itself: asked for, waited for, and left to the run that follows.

A run is planned on the nodes that are there, and an autoscaler adds nodes for what waits to be placed. So a placement group of
the run's shape waits first, and is taken away once it has its place; idle nodes stay for a while. It ends with the process
that asked, where ray.autoscaler.sdk.request_resources would hold the nodes for ever after a kill.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from ecocseg.cluster import start_ray
from ecocseg.config import RunConfig
from ecocseg.errors import InputError
from ecocseg.resources import fixed_workers, ingest_cpus

WORKER_CPUS = 4.0
"""CPUs asked for a worker where launch.cpus_per_worker does not say; a run that has room takes as many."""
LOOK_SECONDS, TELL_SECONDS = 2.0, 60.0


def wait_for_room(config: RunConfig, tell: Callable[[str], None], runs: int = 1) -> bool:
    """On a cluster, ask for the workers and ingest of so many runs, and wait up to launch.wait seconds for it.

    Returns:
        Whether there is room for all of it. What there is room for in the end is for the plan to see.

    Raises:
        InputError: when the configuration does not say what to ask for.
    """
    bundles = wanted(config) * runs
    if not os.environ.get("RAY_ADDRESS"):
        return False  # this machine does not grow
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    start_ray()
    group = placement_group(bundles)
    began = time.monotonic()
    told = -math.inf
    try:
        while not group.wait(LOOK_SECONDS):
            waited = time.monotonic() - began
            if waited > config.launch.wait:
                return False
            if waited > told + TELL_SECONDS:
                told, there = waited, ray.cluster_resources()
                tell(f"waiting for nodes, {waited:.0f} of {config.launch.wait:g} s: {_total(bundles)} asked for, "
                     f"{_total([there])} there")
        return True
    finally:
        remove_placement_group(group)


def _total(bundles: list[dict[str, float]]) -> str:
    return " and ".join(f"{sum(one.get(key, 0) for one in bundles):g} {key}s" for key in ("GPU", "CPU"))


def wanted(config: RunConfig) -> list[dict[str, float]]:
    """What has to be placed: each worker, of a range the most of them, and each CPU of ingest, which may lie anywhere."""
    launch = config.launch
    if launch.workers is None or launch.gpu is None:
        raise InputError("launch.wait: a cluster that grows must be told how far; give launch.workers, and launch.gpu=true or "
                         "launch.gpu=false")
    workers = fixed_workers(config) or 1
    worker = {"CPU": launch.cpus_per_worker or WORKER_CPUS} | ({"GPU": 1.0} if launch.gpu else {})
    return [worker] * workers + [{"CPU": 1.0}] * math.ceil(ingest_cpus(config, workers))

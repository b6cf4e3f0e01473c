"""What a run takes of a cluster, counted before anything is placed.

Ray Data and Ray Train wait for ever for what a cluster does not have. A worker must fit on a node, not just into the sum
of all, and what workers leave must hold the tasks that read their data.

The controller of an elastic run counts as well, in a process of its own: `batching` is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ecocseg.cluster import Node
from ecocseg.config import RunConfig
from ecocseg.data.order import default_lanes
from ecocseg.errors import InputError

LEAST_CPU = 0.1
"""Smallest CPU share a worker is placed with; Ray counts it, the operating system does not enforce it."""
SHARES = (2.0, 1.0, 0.5)
"""CPUs of a worker that are tried where the nodes have no room for as many as the sum of all would give it."""


@dataclass(frozen=True)
class Resources:
    """What a run takes of a cluster: workers, CPUs and GPUs of each, CPUs left to ingest."""

    workers: int
    cpus_per_worker: float
    gpu: bool
    ingest_cpus: float
    threads: int
    sizes: tuple[int, ...] = ()  # numbers of workers that an elastic run may have, rising; it begins with `workers`
    idle_gpus: int = 0  # GPUs of the cluster that no worker takes, as the global batches have no so many equal shares

    @property
    def possible(self) -> tuple[int, ...]:
        """Numbers of workers that the run may have."""
        return self.sizes or (self.workers,)

    def describe(self) -> str:
        what = "1 GPU" if self.gpu else f"{self.threads} threads"
        others = f" (elastic: {', '.join(map(str, self.sizes))})" if self.sizes else ""
        idle = f"; {self.idle_gpus} more GPU(s) stay idle: batches cannot be shared by more" if self.idle_gpus else ""
        return (f"{self.workers} worker(s){others} with {self.cpus_per_worker:g} CPU and {what} each, "
                f"{self.ingest_cpus:g} CPU for ingest{idle}")


def plan_resources(config: RunConfig, cpus: float, gpus: int) -> Resources:
    """Fit workers and ingest into `cpus` and `gpus`, or say what does not fit.

    Raises:
        InputError: with the numbers, naming the key to change.
    """
    use_gpu = gpus > 0 if config.launch.gpu is None else config.launch.gpu
    if use_gpu and gpus < 1:
        raise InputError("launch.gpu: true, and the cluster has no GPU; use launch.gpu=null to train on CPUs")
    if config.coding.kernels == "triton":
        from ecocseg import kernels  # torch, which the controller does without

        kernels.check("triton", "cuda" if use_gpu else "cpu")
    wanted = fixed_workers(config)
    workers = wanted or (most_workers(config, gpus) if use_gpu else 1)
    if use_gpu and workers > gpus:
        raise InputError(f"launch.workers: {workers} workers need {workers} GPUs, the cluster has {gpus}; "
                         f"use {gpus} or fewer, or launch.gpu=false")
    if not use_gpu and workers > cpus:
        raise InputError(f"launch.workers: {workers} workers need {workers} CPU cores, the cluster has {cpus:g}; "
                         f"use {int(cpus)} or fewer")
    from ecocseg import batching

    batching.micro_batches(config, workers)
    ingest = ingest_cpus(config, workers)
    share = config.launch.cpus_per_worker or min(4.0, int((cpus - ingest) / workers * 100) / 100)
    if share < LEAST_CPU or workers * share + ingest > cpus + 1e-9:
        raise InputError(f"launch.workers: {workers} worker(s) x {share:g} CPU + {ingest:g} CPU for ingest exceed the "
                         f"cluster's {cpus:g} CPUs; use fewer workers, a smaller launch.cpus_per_worker, "
                         "data.read_cpus or data.decode_threads")
    # Not more threads than the worker's share: spinning threads and Ray's own would fight for the cores.
    threads = config.engine.threads or max(1, int(share))
    idle = gpus - workers if use_gpu and wanted is None else 0
    return Resources(workers, share, use_gpu, ingest, threads, idle_gpus=idle)


def ingest_cpus(config: RunConfig, workers: int) -> float:
    """CPUs that so many workers' reading takes at most."""
    data = config.data
    per_stream = data.read_cpus + (data.decode_threads if data.decode == "ray" else 0)
    return max(1.0, workers * len(config.streams) * per_stream) if data.loader == "ray" else 0.0


def plan_on_nodes(config: RunConfig, nodes: Sequence[Node]) -> Resources:
    """Fit a run on nodes of (CPUs, GPUs), with smaller shares of CPU where they have few; an elastic one as large as it can
    be there.

    Raises:
        InputError: with the numbers, when it does not fit.
    """
    cpus, gpus = sum(node[0] for node in nodes), sum(node[1] for node in nodes)
    sizes = elastic_sizes(config)
    smallest = config.updated(launch={"workers": sizes[0]}) if sizes else config
    least = plan_resources(smallest, cpus, gpus)
    shares = [None, *SHARES] if config.launch.cpus_per_worker is None else [config.launch.cpus_per_worker]
    for size in reversed(sizes or (least.workers,)):
        for share in shares:
            try:
                one = plan_resources(config.updated(launch={"cpus_per_worker": share, "workers": size}), cpus, gpus)
            except InputError:
                continue
            if fits(one, nodes):
                return replace(one, sizes=sizes, idle_gpus=least.idle_gpus)
    raise no_room(least, nodes)


def fits(one: Resources, nodes: Sequence[Node], times: int = 1) -> bool:
    """Whether so many runs of one kind have room for all their workers and readers."""
    spare = sum(node[0] for node in nodes) - times * one.workers * one.cpus_per_worker
    return times * one.workers <= places(one, nodes) and spare >= times * one.ingest_cpus - 1e-6


def places(one: Resources, nodes: Sequence[Node]) -> int:
    """Workers that there is room for, node by node."""
    return sum(min(int(node[0] / one.cpus_per_worker + 1e-6), node[1] if one.gpu else 1 << 30) for node in nodes)


def no_room(one: Resources, nodes: Sequence[Node]) -> InputError:
    shapes = ", ".join(f"({cpus:g}, {gpus})" for cpus, gpus in nodes)
    return InputError(f"launch.workers: {one.workers} worker(s) with {one.cpus_per_worker:g} CPU each do not fit on the nodes "
                      f"(CPUs, GPUs): {shapes}; use fewer, or a smaller launch.cpus_per_worker")


def fixed_workers(config: RunConfig) -> int | None:
    """The number of workers a configuration asks for; of a range the largest."""
    wanted = config.launch.workers
    return wanted[1] if isinstance(wanted, tuple) else wanted


def most_workers(config: RunConfig, gpus: int) -> int:
    """The most workers, up to `gpus`, that can share the global batches; 1 where not even that can."""
    return next((size for size in range(gpus, 1, -1) if _shares(config, size)), 1)


def elastic_sizes(config: RunConfig) -> tuple[int, ...]:
    """Numbers of workers between launch.workers' [least, most] that can share the global batches; none for a fixed number.

    Raises:
        InputError: when the range holds less than two, with those that would do.
    """
    wanted = config.launch.workers
    if not isinstance(wanted, tuple):
        return ()
    least, most = wanted
    biggest = max(config.train.labeled_batch, config.train.unlabeled_batch)
    possible = [size for size in range(1, biggest + 1) if _shares(config, size)]
    sizes = tuple(size for size in possible if least <= size <= most)
    if not 1 <= least <= most or len(sizes) < 2:
        raise InputError(f"launch.workers: [{least}, {most}] is no range with two sizes that can share the global batches; "
                         f"those that can are {', '.join(map(str, possible))}: give the least and the most of them")
    return sizes


def _shares(config: RunConfig, workers: int) -> bool:
    """Whether so many workers can share every batch, and the lanes its order is woven from."""
    from ecocseg import batching

    try:
        batching.micro_batches(config, workers)
    except InputError:
        return False
    batches = [batching.batch_size(config, name) for name in config.streams]
    return all((config.data.lanes or default_lanes(batch)) % workers == 0 for batch in batches)

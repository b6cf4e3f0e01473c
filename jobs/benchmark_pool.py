"""`jobs/benchmark.py pool`: does what a worker needs grow with the pool it streams?

Two workers stream one pass over a pool of tiny images from an S3 server on this machine, and over one of 10,000: peak unique
memory (USS) of the trainers and of Ray's ingest processes, and the time from nothing known to the first batch.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_ingest import make_bucket, s3_server
from PIL import Image

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.shards import Record, read_manifest, write_shards
from ecocseg.storage import Storage

SMALL = 10_000
SIDE, BATCH, WORKERS = 32, 64, 2
SHARD_BYTES = 1 << 20  # so that the number of files grows with the pool, as it does with photographs


def records(number: int) -> Iterator[Record]:
    rng = np.random.default_rng(0)
    for index in range(number):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(buffer, "JPEG")
        yield Record(f"{index:012d}", buffer.getvalue())


def stream_pass(rank: int, url: str, storage: Storage, steps: int) -> float:
    """A worker: stream so many steps; seconds to the first batch."""
    from ecocseg.data.pipeline import Stream
    from ecocseg.data.transforms import WeakTransform

    began = time.perf_counter()
    manifest = read_manifest(url, storage)
    steps = steps or -(-manifest.num_rows // BATCH)
    with Stream(manifest, name="unlabeled", seed=0, global_batch=BATCH, transform=WeakTransform(crop=(SIDE, SIDE)), rank=rank,
                world=WORKERS, storage=storage, columns=("image_id", "image"), read_cpus=0.25) as stream:
        next(stream)
        first = time.perf_counter() - began
        for _ in range(steps - 1):
            next(stream)
    return first


def unique_megabytes() -> dict[str, float]:
    """USS of the trainers and of all other workers of this process's Ray, which do their reading."""
    import psutil

    found = {"trainers": 0.0, "ingest": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            title = (process.cmdline() or [""])[0]
            if title.startswith("ray::"):
                found["trainers" if "stream_pass" in title else "ingest"] += process.memory_full_info().uss / 1e6
        except psutil.Error:
            continue  # it has ended
    return found


def case(args: argparse.Namespace) -> dict[str, Any]:
    """One pass over a pool in a Ray of its own; with --case starts, first batches of both pools in turn, in one Ray that
    has been used once: its own start takes tens of seconds on two cores, and varies by more than what is looked for."""
    import ray

    from ecocseg.launch import start_ray

    start_ray()
    task = ray.remote(stream_pass).options(num_cpus=0.5)
    storage = Storage(endpoint=args.endpoint)
    if args.case == "starts":
        urls = args.url.split(",")
        found: dict[str, list[float]] = {url: [] for url in urls}
        for turn in range(args.repeats + 1):
            for url in urls[::1 if turn % 2 else -1]:
                first = max(ray.get([task.remote(rank, url, storage, 1) for rank in range(WORKERS)]))
                if turn:
                    found[url].append(first)
        return found
    workers = [task.remote(rank, args.url, storage, 0) for rank in range(WORKERS)]
    peak: dict[str, float] = {"trainers": 0.0, "ingest": 0.0}
    while ray.wait(workers, num_returns=WORKERS, timeout=0.2)[1]:
        peak = {kind: max(peak[kind], now) for kind, now in unique_megabytes().items()}
    ray.get(workers)
    return peak


def pool_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pack both pools, measure by turns, print the table."""
    server, endpoint = s3_server()
    try:
        make_bucket(endpoint)
        sizes = (SMALL, args.images)
        for number in sizes:
            write_shards(records(number), f"s3://ingest/{number}", dataset="pool", classes=CLASS_LISTS["voc"],
                         shard_bytes=SHARD_BYTES, storage=Storage(endpoint=endpoint))
        urls = [f"s3://ingest/{number}" for number in sizes]
        starts = _in_own_process("starts", endpoint, ",".join(urls), args.repeats)
        passes = [_in_own_process("pass", endpoint, url, 1) for url in urls]
    finally:
        server.terminate()
    rows = []
    print(f"{WORKERS} workers, global batch {BATCH}, images of {SIDE} x {SIDE}, an S3 server here, {os.cpu_count()} cores")
    for number, url, peak in zip(sizes, urls, passes, strict=True):
        first = sorted(starts[url])
        row = {"images": number, "first_batch": statistics.median(first), "all": first,
               "trainers_mb": peak["trainers"], "ingest_mb": peak["ingest"]}
        rows.append(row)
        print(f"{number:>8} images: first batch after {row['first_batch']:.2f} s (median of {args.repeats}, {first[0]:.2f} "
              f"to {first[-1]:.2f}), peak USS of trainers {peak['trainers']:.0f} MB, of ingest {peak['ingest']:.0f} MB",
              flush=True)
    return rows


def _in_own_process(kind: str, endpoint: str, url: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "pool", "--case", kind, "--url", url,
               "--endpoint", endpoint, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} of {url} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

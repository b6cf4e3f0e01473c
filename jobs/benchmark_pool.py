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


def case(args: argparse.Namespace) -> dict[str, float]:
    """One pass (or, with --seconds 0, one batch) in a Ray of its own."""
    import ray

    from ecocseg.launch import start_ray

    start_ray()
    task = ray.remote(stream_pass).options(num_cpus=0.5)
    steps = 1 if args.seconds == 0 else 0
    workers = [task.remote(rank, args.url, Storage(endpoint=args.endpoint), steps) for rank in range(WORKERS)]
    peak: dict[str, float] = {"trainers": 0.0, "ingest": 0.0}
    while ray.wait(workers, num_returns=WORKERS, timeout=0.2)[1]:
        if steps == 0:
            peak = {kind: max(peak[kind], now) for kind, now in unique_megabytes().items()}
    return {"first_batch": max(ray.get(workers)), **peak}


def pool_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pack both pools, measure by turns, print the table."""
    server, endpoint = s3_server()
    try:
        make_bucket(endpoint)
        sizes = (SMALL, args.images)
        for number in sizes:
            write_shards(records(number), f"s3://ingest/{number}", dataset="pool", classes=CLASS_LISTS["voc"],
                         shard_bytes=SHARD_BYTES, storage=Storage(endpoint=endpoint))
        starts: dict[int, list[float]] = {number: [] for number in sizes}
        for _ in range(args.repeats):
            for number in sizes:
                starts[number].append(_in_own_process(endpoint, number, 0)["first_batch"])
        passes = {number: _in_own_process(endpoint, number, 1) for number in sizes}
    finally:
        server.terminate()
    rows = []
    print(f"{WORKERS} workers, global batch {BATCH}, images of {SIDE} x {SIDE}, an S3 server here, {os.cpu_count()} cores")
    for number in sizes:
        row = {"images": number, "first_batch": statistics.median(starts[number]), "all": starts[number],
               "trainers_mb": passes[number]["trainers"], "ingest_mb": passes[number]["ingest"]}
        rows.append(row)
        print(f"{number:>8} images: first batch after {row['first_batch']:.2f} s (median of {args.repeats}), peak USS of "
              f"trainers {row['trainers_mb']:.0f} MB, of ingest {row['ingest_mb']:.0f} MB", flush=True)
    return rows


def _in_own_process(endpoint: str, number: int, seconds: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "pool", "--case", "pass", "--url",
               f"s3://ingest/{number}", "--endpoint", endpoint, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the pass over {number} images failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found

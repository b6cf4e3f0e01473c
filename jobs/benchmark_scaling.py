"""`jobs/benchmark.py scaling`: steps a second and bytes on the wire over numbers of workers, for plain torch and ZeRO 0, 1, 2.

A step has self-training's two parts, each with a forward and a backward pass, on tensors made beforehand: what is measured is
the engine. Weak scaling keeps a worker's batch, strong scaling the global one. Every case is a process group of its own, where
the system allows it in a network namespace of its own, so that the bytes its loopback counted are the gradients' and weights'
alone. On GPUs of one machine nothing is counted (NCCL goes by NVLink and shared memory), and what is computed stands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ecocseg.config import EngineConfig, OptimConfig
from ecocseg.engine import World, build_engine
from ecocseg.errors import InputError

ENGINES = {"torch": EngineConfig(kind="torch"), **{f"zero{stage}": EngineConfig(kind="deepspeed", zero_stage=stage)
                                                   for stage in (0, 1, 2)}}
PARTS = 2
WARM_UP = 2


def wire_bytes(engine: str, parameters: int, workers: int, parts: int = PARTS) -> float:
    """Bytes a worker sends in a step, by ring algorithms, in fp32: each sum or collection of n bytes over W workers passes
    (W - 1) / W n bytes on, and an all-reduce is both.

    torch, ZeRO 0: one all-reduce of the gradients. ZeRO 1: DeepSpeed sums the gradients by all-reduce too, once a step, and
    collects the weights each worker updated. ZeRO 2: the same, but gradients are summed after every part, since nobody
    keeps the whole of them.
    """
    turn = (workers - 1) / workers * 4 * parameters
    return {"torch": 2 * turn, "zero0": 2 * turn, "zero1": 3 * turn, "zero2": (2 * parts + 1) * turn}[engine]


def scaling_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cases and print the table."""
    workers = sorted({int(word) for word in args.workers.split(",")})
    on_gpu = args.device != "cpu"
    limit = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
    if workers[-1] > limit:
        raise InputError(f"--workers {args.workers}: {workers[-1]} workers need as many {'GPUs' if on_gpu else 'cores'}, there "
                         f"are {limit}; use {limit} or fewer")
    if any(args.batch * workers[-1] % number for number in workers):
        raise InputError(f"--batch {args.batch}: strong scaling shares {args.batch * workers[-1]} images by each of "
                         f"{args.workers} workers; choose another --batch")
    own_network = not on_gpu and can_isolate()
    print(f"{args.encoder} + {args.head}, {args.size} x {args.size}, {args.batch} images a worker (weak), "
          f"{args.batch * workers[-1]} in all (strong), {args.device}; bytes counted: "
          + ("yes" if own_network else "no (not allowed to make a network namespace, or GPUs)"))
    print(f"{'engine':<8}{'scaling':<9}{'workers':>8}{'s / step':>10}{'images/s':>10}{'efficiency':>12}"
          f"{'MB sent, counted':>18}{'by the formula':>16}")
    rows: list[dict[str, Any]] = []
    for engine in ENGINES:
        for kind in ("weak", "strong"):
            for number in workers:
                batch = args.batch if kind == "weak" else args.batch * workers[-1] // number
                row = {"engine": engine, "scaling": kind, "workers": number, "batch": batch,
                       **in_own_network(engine, number, batch, args, own_network)}
                first = next((r for r in rows if r["engine"] == engine and r["scaling"] == kind), row)
                row["efficiency"] = row["images_per_second"] / row["workers"] / first["images_per_second"] * first["workers"]
                rows.append(row)
                counted = "-" if row["bytes_sent"] is None else f"{row['bytes_sent'] / 1e6:.2f}"
                print(f"{engine:<8}{kind:<9}{number:>8}{row['seconds']:>10.3f}{row['images_per_second']:>10.2f}"
                      f"{100 * row['efficiency']:>10.0f} %{counted:>18}{row['bytes_computed'] / 1e6:>16.2f}", flush=True)
    return rows


def can_isolate() -> bool:
    """Whether this user may make a network namespace."""
    return (shutil.which("unshare") is not None
            and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0)


def in_own_network(engine: str, workers: int, batch: int, args: argparse.Namespace, isolate: bool) -> dict[str, Any]:
    command = [*(["unshare", "-n"] if isolate else []), sys.executable, str(Path(__file__).with_name("benchmark.py")),
               "scaling", "--case", f"{engine}:{workers}:{batch}:{int(isolate)}", "--repeats", str(args.repeats),
               "--encoder", args.encoder, "--head", args.head, "--size", str(args.size), "--device", args.device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine} on {workers} worker(s) failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def case(args: argparse.Namespace) -> dict[str, Any]:
    """One case, in a process of its own: starts the workers and returns what rank 0 measured."""
    engine, workers, batch, isolated = args.case.split(":")
    if int(isolated):
        bring_up_loopback()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(engine, int(workers), int(batch), bool(int(isolated)), vars(args), folder),
                 nprocs=int(workers))  # type: ignore[attr-defined]
        found: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return found


def worker(rank: int, engine_name: str, size: int, batch: int, counted: bool, options: dict[str, Any], folder: str) -> None:
    on_gpu = options["device"] != "cpu"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size)
    model, parts, engine = build(engine_name, World(rank, size, device), batch, options)
    seconds, sent = [], []
    for number in range(WARM_UP + options["repeats"]):
        dist.barrier()
        start, before = time.perf_counter(), loopback_bytes() if counted else 0
        for index, part in enumerate(parts):
            engine.run_part(part, 1.0, index == len(parts) - 1)
        engine.step()
        if on_gpu:
            torch.cuda.synchronize()
        dist.barrier()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            sent.append((loopback_bytes() if counted else 0) - before)
    if rank == 0:
        parameters, median = sum(p.numel() for p in model.parameters()), statistics.median(seconds)
        result = {"seconds": median, "spread": [min(seconds), max(seconds)], "steps_per_second": 1 / median,
                  "images_per_second": len(parts) * batch * size / median, "parameters": parameters,
                  "bytes_sent": statistics.median(sent) / size if counted else None,  # of one worker
                  "bytes_computed": wire_bytes(engine_name, parameters, size)}
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def build(engine_name: str, world: World, batch: int, options: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Model, the two losses of a step, and the engine."""
    from ecocseg import codebook
    from ecocseg.coding import EcocCoding
    from ecocseg.models.segmenter import build_segmenter

    torch.manual_seed(0)
    coding = EcocCoding(codebook.max_min(19, 40))
    model = build_segmenter(options["encoder"], options["head"], coding.num_outputs).to(world.device)
    images = torch.randn(PARTS, batch, 3, options["size"], options["size"], device=world.device)
    labels = torch.randint(0, 19, (PARTS, batch, options["size"], options["size"]), device=world.device)
    targets = [coding.encode(labels_BHW) for labels_BHW in labels]
    engine = build_engine(model, [{"params": list(model.parameters())}], OptimConfig(), ENGINES[engine_name], world, batch)
    parts = [lambda i=i: coding.loss(engine(images[i]), targets[i])["loss"] for i in range(PARTS)]
    return model, parts, engine


def loopback_bytes() -> int:
    """Bytes the loopback of this network namespace has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def bring_up_loopback() -> None:
    """A new namespace's loopback is down."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP

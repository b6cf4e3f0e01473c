"""`jobs/benchmark.py plan`: a run on 8, 64 and 512 GPUs and pools of 118 k to a billion images, on paper.

Plain formulas over a list of assumptions, each with its source; figures that were measured take their places (`--ingest`,
`--scaling` with files that `--json` wrote, `--assume name=value`). Weak scaling: every GPU keeps its images a step.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmark_scaling import wire_bytes

from ecocseg import expect
from ecocseg.config import RunConfig, load
from ecocseg.errors import InputError
from ecocseg.methods import METHODS

GPUS, POOLS = (8, 64, 512), {"118 k": 118_287, "10 M": 10_000_000, "1 B": 1_000_000_000}
STAGES = {"torch, ZeRO 0": "zero0", "ZeRO 1": "zero1", "ZeRO 2": "zero2"}
Numbers = Mapping[str, float]

ASSUMPTIONS: dict[str, tuple[float, str, str]] = {
    "gpu_rate": (expect.GPU_RATE, "operations/s a GPU reaches in training", "ecocseg/expect.py; not measured here"),
    "network": (50e9, "bytes/s of a node of 8 GPUs to the others", "AWS: p4d.24xlarge has 400 Gb/s"),
    "network_share": (0.7, "of that which collectives reach", "guess"),
    "inside": (200e9, "bytes/s of a GPU to those of its node", "NVIDIA: A100, 600 GB/s both ways; two thirds of one way"),
    "cores_per_gpu": (12.0, "CPU cores beside a GPU", "AWS: p4d.24xlarge has 96 virtual ones for 8 GPUs"),
    "image_bytes": (163e3, "bytes of an encoded image", "COCO: train2017 is 19.3 GB, 118,287 images"),
    "images_per_core": (390.0, "images/s a core reads, decodes and crops", "512 x 512 JPEGs, one core of a shared CPU"),
    "row_group_rows": (32.0, "images of a row group", "jobs/prepare_shards.py's own"),
    "shard_mb": (64.0, "MiB of a shard", "jobs/prepare_shards.py's own"),
    "gets_per_row_group": (3.0, "GET requests to read a row group", "pyarrow: the footer, then two ranges; not counted here"),
    "get_price": (0.4e-6, "USD of a GET", "AWS S3 Standard, us-east-1"),
    "store_price": (0.023, "USD of a GB and month", "AWS S3 Standard, us-east-1, first 50 TB"),
    "gets_per_second": (5500.0, "GETs/s of a bucket's prefix", "AWS S3 documentation, before it splits the prefix"),
    "group_bytes": (130.0, "bytes of a worker to plan a row group, per stream", "300,000 of them here, by tracemalloc"),
    "group_listing": (9.0, "bytes of a row group in a manifest", "counted"),
    "shard_listing": (172.0, "bytes of a shard in a manifest", "counted"),
    "batch_room": (8.0, "times the recipe's batch to which its learning rate is taken to carry", "choice"),
    "plan_room": (4e9, "bytes a worker may spend on planning", "choice"),
    "manifest_room": (100e6, "bytes of a manifest that is read at every start", "choice"),
    "upload": (500e6, "bytes/s of rank 0 into a bucket", "guess: multipart over one connection of a cloud node"),
    "stall": (2e9, "bytes/s at which a snapshot is taken before training goes on", "GPU to pageable memory; guess"),
    "gpu_hours_per_failure": (50_700.0, "GPU-hours between failures, on demand",
                              "Llama 3: 419 in 54 days of 16,384 GPUs (arXiv 2407.21783)"),
    "spot_hours": (360.0, "hours a spot node of 8 GPUs lives", "guess: 2 interruptions a month"),
    "restart": (180.0, "seconds from a failure to the next step", "guess: a node is waiting; tests here take 20 to 60 s"),
}


def step(config: RunConfig, a: Numbers, gpus: int) -> dict[str, float]:
    """A step of one GPU. Its share of the recipe's batch is that of the GPUs the recipe is estimated for."""
    train, share = config.train, expect.stored().get(config.recipe, {"gpus": 1})["gpus"]
    labeled, unlabeled = max(1, train.labeled_batch // share), max(1, train.unlabeled_batch // share)
    learning, labelling = METHODS[config.method.kind].images_per_step(labeled, unlabeled if config.needs_unlabeled else 0)
    whole = sum(METHODS[config.method.kind].images_per_step(train.labeled_batch, train.unlabeled_batch)[i] * (3, 1)[i]
                for i in (0, 1))
    compute = expect.step_operations(config) * (3 * learning + labelling) / whole / a["gpu_rate"]
    read = labeled + (len(config.streams) - 1) * unlabeled
    return {"labeled": labeled, "images_read": read, "unlabeled": unlabeled, "compute": compute}


def traffic(parameters: float, engine: str, gpus: int, a: Numbers) -> dict[str, float]:
    """Bytes a GPU sends a step, bytes a node sends, and their seconds; rings go once through each node."""
    sent, nodes = wire_bytes(engine, int(parameters), gpus), max(1, gpus // 8)
    across = wire_bytes(engine, int(parameters), nodes) if nodes > 1 else 0.0
    return {"sent": sent, "across": across, "seconds": sent / a["inside"] + across / (a["network"] * a["network_share"])}


def exposed(compute: float, seconds: float, parts: int) -> float:
    """Seconds of a sum of gradients that the last part's backward pass does not hide: two thirds of the part."""
    return max(0.0, seconds - compute / parts * 2 / 3)


def memory(parameters: float, stage: int, gpus: int) -> float:
    """Bytes of a GPU for student, teacher, gradients and AdamW, without activations. ZeRO 1 shards the optimiser and its
    copy of the weights, ZeRO 2 the gradients too."""
    weights, gradients, states = 8 * parameters, 4 * parameters, 8 * parameters
    if stage == 0:
        return weights + gradients + states
    return weights + (states + 4 * parameters) / gpus + (gradients / gpus if stage == 2 else gradients)


def young(save: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose the least (Young 1974)."""
    return math.sqrt(2 * save * between_failures)


def daly(save: float, between_failures: float) -> float:
    """The same to a higher order (Daly 2006), for checkpoints that are not short beside the time between failures."""
    if save >= 2 * between_failures:
        return between_failures
    x = save / (2 * between_failures)
    return math.sqrt(2 * save * between_failures) * (1 + math.sqrt(x) / 3 + x / 9) - save


def lost_share(interval: float, save: float, between_failures: float, restart: float) -> float:
    """Share of the time that goes into saving, doing again and starting again."""
    return save / interval + (interval / 2 + restart) / between_failures


def pool(images: int, a: Numbers) -> dict[str, float]:
    """A pool in a bucket, and what planning its order takes of a worker."""
    size, groups = images * a["image_bytes"], images / a["row_group_rows"]
    shards = max(1.0, size / (a["shard_mb"] * 2**20))
    gets = groups * a["gets_per_row_group"]
    return {"bytes": size, "shards": shards, "groups": groups, "planning": groups * a["group_bytes"],
            "manifest": a["shard_listing"] * shards + a["group_listing"] * groups, "month": size / 1e9 * a["store_price"],
            "pass_gets": gets, "pass_cost": gets * a["get_price"]}


def assumptions(args: argparse.Namespace) -> dict[str, tuple[float, str, str]]:
    """The list above, with what was measured or given in the place of what was assumed."""
    found = dict(ASSUMPTIONS)
    if args.ingest:
        rows = {row["loader"]: row for row in read(args.ingest)["rows"]}
        threads = read(args.ingest)["arguments"]["threads"] or 1
        best = max(row["images_per_second"] for name, row in rows.items() if name in ("ray", "threads"))
        found["images_per_core"] = (best / threads, found["images_per_core"][1], f"measured, {args.ingest}")
    for word in args.assume or ():
        name, _, value = word.partition("=")
        if name not in found:
            raise InputError(f"--assume: no assumption '{name}'; there are {', '.join(found)}")
        try:
            found[name] = (float(value), found[name][1], "given")
        except ValueError:
            raise InputError(f"--assume {name}: '{value}' is no number") from None
    return found


def read(path: str) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(Path(path).read_text())
        plain["rows"], plain["arguments"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: is no file that jobs/benchmark.py --json wrote ({error!r})") from None
    return plain


def limits(config: RunConfig, a: Numbers, gpus: int, images: int, parameters: float) -> list[tuple[float, str, str]]:
    """What is asked for over what there is, the most strained first: (ratio, what, the setting that moves it).

    Of the batch `batch_room` times the recipe's; of the network a tenth of the step not hidden behind the backward pass; of
    failures a twentieth of the time.
    """
    one, found = step(config, a, gpus), pool(images, a)
    parts, engine = 2, f"zero{config.engine.zero_stage}" if config.engine.kind == "deepspeed" else "torch"
    seconds = one["compute"] + exposed(one["compute"], traffic(parameters, engine, gpus, a)["seconds"], parts)
    rate = one["images_read"] / seconds
    saving = 16 * parameters / a["stall"]
    between = a["gpu_hours_per_failure"] * 3600 / gpus
    lost = lost_share(daly(saving, between), saving, between, a["restart"])
    batch = one["labeled"] * gpus / config.train.labeled_batch
    return sorted([
        (batch / a["batch_room"], f"batch, {batch:.0f} x the recipe's", "optim.lr_rule, fewer steps"),
        ((seconds / one["compute"] - 1) / 0.1, "network", "engine.zero_stage=0"),
        (rate / a["images_per_core"] / a["cores_per_gpu"], "CPU cores", "data.decode=ray"),
        (rate * gpus / a["row_group_rows"] * a["gets_per_row_group"] / a["gets_per_second"], "GETs", "--row-group-rows"),
        (found["planning"] * len(config.streams) / a["plan_room"], "planning", "--row-group-rows"),
        (found["manifest"] / a["manifest_room"], "manifest", "--row-group-rows, --shard-mb"),
        (lost / 0.05, "failures", "train.checkpoint_every"),
    ], reverse=True)


def plan_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the page of tables; returns its numbers."""
    config, listed = load(args.recipe), assumptions(args)
    a = {name: value for name, (value, _, _) in listed.items()}
    parameters = expect.stored()[config.recipe]["parameters"] * 1e6
    calibration = wire_calibration(args.scaling) if args.scaling else {}
    rows: list[dict[str, Any]] = []
    print(f"{config.recipe}: {config.description}; {parameters / 1e6:.1f} M parameters, weights and gradients in fp32")
    print(f"\nMB sent by a GPU in a step and its GB of weights, gradients and states: {', '.join(STAGES)}.")
    heading("GPUs", "images", "s / step", "not hidden", "MB sent", "GB", "images/s read", "GB/s", "cores a GPU")
    for gpus in GPUS:
        row = gpu_row(config, a, gpus, parameters, calibration)
        rows.append({"kind": "gpus", **row})
        print(f"| {gpus} | {row['images']:.0f} | {row['seconds']:.3f} | {100 * row['exposed'] / row['seconds']:.1f} % | "
              + ", ".join(f"{row['sent'][name] / 1e6:.0f}" for name in STAGES) + " | "
              + ", ".join(f"{row['memory'][name] / 1e9:.1f}" for name in STAGES)
              + f" | {row['read']:.0f} | {row['read'] * a['image_bytes'] / 1e9:.2f} | {row['cores']:.2f} |")
    print(f"\nA pass over the pool on {', '.join(map(str, GPUS))} GPUs; planning is memory of a worker and stream.")
    heading("pool", "TB", "shards", "manifest", "planning", "USD a month", "GETs, USD a pass", "hours", "GETs/s")
    for name, images in POOLS.items():
        found = pool(images, a)
        hours = [images / (row["unlabeled"] / row["seconds"]) / 3600 for row in rows if row["kind"] == "gpus"]
        gets = [found["pass_gets"] / (hour * 3600) for hour in hours]
        rows.append({"kind": "pool", "pool": name, **found, "hours": hours, "gets": gets})
        print(f"| {name} | {found['bytes'] / 1e12:.3g} | {found['shards']:.0f} | {found['manifest'] / 1e6:.3g} MB | "
              f"{found['planning'] / 1e9:.2g} GB | {found['month']:.0f} | {found['pass_gets']:.2g}, {found['pass_cost']:.2f} | "
              + ", ".join(f"{hour:.3g}" for hour in hours) + " | " + ", ".join(f"{get:.0f}" for get in gets) + " |")
    rows += checkpoint_rows(parameters, a)
    print("\nWhat breaks first: from 100 % on it does.")
    heading("GPUs", "pool", "first", "next", "what moves the first")
    for gpus in GPUS:
        for name, images in POOLS.items():
            worst = limits(config, a, gpus, images, parameters)
            rows.append({"kind": "limit", "gpus": gpus, "pool": name, "limits": worst})
            first, second = (f"{what}, {100 * ratio:.0f} %" for ratio, what, _ in worst[:2])
            moves = worst[0][2] if worst[0][0] >= 1 else "holds"
            print(f"| {gpus} | {name} | {first} | {second} | {moves} |")
    print("\nAssumed: " + "; ".join(f"`{name}` {value:.4g} {what} ({source})" for name, (value, what, source) in listed.items())
          + "." + "".join(f" Measured over computed bytes, {name}: {value:.2f}." for name, value in calibration.items()))
    return rows


def heading(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def gpu_row(config: RunConfig, a: Numbers, gpus: int, parameters: float, calibration: Numbers) -> dict[str, Any]:
    one = step(config, a, gpus)
    sent = {name: traffic(parameters, engine, gpus, a) for name, engine in STAGES.items()}
    stage = config.engine.zero_stage if config.engine.kind == "deepspeed" else 0
    hidden = exposed(one["compute"], list(sent.values())[stage]["seconds"] * calibration.get(f"zero{stage}", 1.0), 2)
    seconds = one["compute"] + hidden
    read = one["images_read"] * gpus / seconds
    return {"gpus": gpus, "images": one["images_read"] * gpus, "unlabeled": one["unlabeled"] * gpus, "seconds": seconds,
            "exposed": hidden, "sent": {name: value["sent"] for name, value in sent.items()},
            "memory": {name: memory(parameters, stage, gpus) for stage, name in enumerate(STAGES)}, "read": read,
            "cores": read / gpus / a["images_per_core"]}


def checkpoint_rows(parameters: float, a: Numbers) -> list[dict[str, Any]]:
    """Print when to save: what a checkpoint holds up the step for counts, and it is uploaded beside the training."""
    size = 16 * parameters
    save = size / a["stall"]
    print(f"\nA checkpoint (student, teacher, AdamW) has {size / 1e9:.2f} GB: it holds a step up for {save:.1f} s, and takes "
          f"{size / a['upload']:.0f} s to upload behind it.")
    heading("GPUs", "nodes", "hours between failures", "minutes between checkpoints (Young, Daly)", "time lost")
    rows = []
    kinds: dict[str, Callable[[int], float]] = {
        "on demand": lambda gpus: a["gpu_hours_per_failure"] * 3600 / gpus,
        "spot": lambda gpus: a["spot_hours"] * 3600 / max(1, gpus // 8)}
    for gpus in GPUS:
        for kind, between in kinds.items():
            first, second = (rule(save, between(gpus)) for rule in (young, daly))
            lost = lost_share(second, save, between(gpus), a["restart"])
            rows.append({"kind": "checkpoint", "gpus": gpus, "nodes": kind, "between": between(gpus), "young": first,
                         "daly": second, "lost": lost})
            print(f"| {gpus} | {kind} | {between(gpus) / 3600:.3g} | {first / 60:.1f}, {second / 60:.1f} | "
                  f"{100 * lost:.2f} % |")
    return rows


def wire_calibration(path: str) -> dict[str, float]:
    """Bytes counted on the wire over those of the formula, by engine, from a file of `scaling`."""
    found: dict[str, float] = {}
    for row in read(path)["rows"]:
        if row["bytes_sent"] is not None and row["workers"] > 1:
            found[row["engine"]] = row["bytes_sent"] / row["bytes_computed"]
    return found

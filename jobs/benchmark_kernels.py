"""`jobs/benchmark.py kernels`: what each operator moves and computes at least, and on a GPU how near a kernel comes to that.

Without a GPU the counts and the times that an H100's and an H200's data sheets give for them are all there is. With
`--device cuda` kernels and torch are timed by turns, one-hot beside ECOC, and the bound is that of the card at hand, with
its memory's rate measured by a copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecocseg import codebook
from ecocseg.coding import Coding, EcocCoding, OneHotCoding
from ecocseg.kernels.costs import OPERATORS, PEAKS, Costs, costs, peak_of

COPY_BYTES = 1 << 30


def kernel_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    cells, on_gpu = args.size // args.stride, torch.device(args.device).type == "cuda"
    rows: list[dict[str, Any]] = []
    print(f"{'operator':<22}{'MB':>8}{'MFMA':>8}{'codeword MFMA':>15}{'special, M':>12}  least time")
    for name in OPERATORS:
        least = costs(name, args.batch, args.classes, args.bits, cells, cells, args.size, args.size)
        row: dict[str, Any] = {"operator": name, **dataclasses.asdict(least)}
        for card, peak in PEAKS.items():
            row[f"bound_{card}"], row[f"seconds_{card}"] = least.bound(peak)
        least_times = ", ".join(f"{card} {1e6 * row[f'seconds_{card}']:.0f} us ({row[f'bound_{card}']})" for card in PEAKS)
        print(f"{name:<22}{least.bytes / 1e6:>8.1f}{least.fma / 1e6:>8.0f}{least.matrix_fma / 1e6:>15.0f}"
              f"{least.special / 1e6:>12.1f}  {least_times}", flush=True)
        rows.append(row | (measured(name, least, args) if on_gpu else {}))
    return rows


def measured(name: str, least: Costs, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of the kernel and of torch, their peak memory, and the share of the bound that the kernel reaches."""
    peak = peak_of(torch.cuda.get_device_name())
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for choice in ("triton", "torch"):
        if choice == "torch" and name.endswith("count"):
            continue  # evaluation without kernels is many operators
        run = operation(name, choice, args)
        results[f"{choice}_seconds"], results[f"{choice}_megabytes"] = on_device(run, max(20, args.repeats))
    if peak is not None:
        peak = dataclasses.replace(peak, bytes=copy_rate())
        results["bound"], seconds = least.bound(peak)
        results["share_of_bound"] = seconds / results["triton_seconds"]
    print("    " + ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in results.items()), flush=True)
    return results


def operation(name: str, choice: Any, args: argparse.Namespace) -> Callable[[], Any]:
    """A call of the operator, as a coding makes it, on random logits of mostly sure pixels."""
    torch.manual_seed(0)
    coding: Coding = OneHotCoding(args.classes, kernels=choice)
    if name.startswith("ecoc"):
        coding = EcocCoding(codebook.max_min(args.classes, args.bits), kernels=choice)
    cells, size = args.size // args.stride, (args.size, args.size)
    labels_Bhw = torch.randint(args.classes, (args.batch, cells, cells), device=args.device)
    logits = 6.0 * torch.nn.functional.one_hot(labels_Bhw, args.classes).movedim(-1, 1)
    if isinstance(coding, EcocCoding):
        sure_B1hw = torch.where(torch.rand(args.batch, 1, cells, cells, device=args.device) < 0.75, 6.0, 2.0)
        logits = (coding.encode(labels_Bhw).dense_bits(args.bits) * 2.0 - 1) * sure_B1hw
    logits = (logits + torch.randn_like(logits)).contiguous()
    target = coding.encode(torch.randint(args.classes, (args.batch, *size), device=args.device))
    if name.endswith("pseudo_label"):
        return lambda: coding.pseudo_label(logits, size)
    if name.endswith("count"):
        return lambda: coding.counts(logits, target.labels, False)
    x = logits.requires_grad_()

    def loss() -> None:
        x.grad = None
        coding.loss(x, target)["loss"].backward()

    return loss


def on_device(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds by the device's clock, and MB above the start."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_rate() -> float:
    """Bytes read and written a second by a copy."""
    source: Tensor = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    seconds, _ = on_device(lambda: source.clone(), 10)
    return 2 * COPY_BYTES / seconds

"""`benchmark.py coding`: what each operation of a coding costs, one-hot beside ECOC beside the 5-D formulation.

One-hot and ECOC take turns in one process, so that a slow spell of the machine meets both; the 5-D formulation has a process of
its own. Peaks of memory are measured in processes of their own, above what the inputs take. On a machine that others use
too, seconds of CPU time tell more than those of the clock: both are given.
Shapes: B batch, N classes, K bits, H W pixels, h w cells of the logits, C candidates.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import benchmark

if TYPE_CHECKING:
    from torch import Tensor

FORMS = {"one_hot": "one-hot", "ecoc": "ECOC", "five_dim": "ECOC, 5-D"}
OPERATIONS = {"scores": "class scores at the logits' size", "pseudo_label": "pseudo-label", "loss": "loss of true labels",
              "mixed_loss": "loss of true and pseudo-labels mixed"}
COPY_MB = 256


# ---- the 5-D formulation, as the released code has it (stable cross-entropy; 8 candidates) --------------------------


def scores_5d(logits_BKHW: Tensor, codes_NK: Tensor) -> Tensor:
    """K - sum_k |M_nk - p_k| by broadcasting to [B, N, K, H, W]."""
    p_B1KHW = logits_BKHW.sigmoid()[:, None]
    return logits_BKHW.shape[1] - (codes_NK.to(p_B1KHW)[None, :, :, None, None] - p_B1KHW).abs().sum(2)


def pseudo_label_5d(logits_BKHW: Tensor, codes_NK: Tensor, threshold: float = 0.95,
                    candidates: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B, H, W], hybrid bits [B, K, H, W] and confidence [B, H, W]; reliable bits over [B, C, K, H, W]."""
    import torch

    p_BKHW = logits_BKHW.sigmoid()
    q_BKHW = torch.maximum(p_BKHW, 1 - p_BKHW)
    nearest_BCHW = scores_5d(logits_BKHW, codes_NK).topk(min(candidates, len(codes_NK)), dim=1).indices
    codes_BCKHW = codes_NK.bool()[nearest_BCHW].movedim(-1, 2)
    shared_BCKHW = (codes_BCKHW == codes_BCKHW[:, :1]).cummin(1).values
    sum_BCHW = (q_BKHW[:, None] * shared_BCKHW).sum(2)
    count_BCHW = shared_BCKHW.sum(2)
    done_BCHW = (sum_BCHW / count_BCHW.clamp_min(1) > threshold) | (count_BCHW == 0)
    first_BHW = done_BCHW.int().argmax(1)
    reliable_BKHW = shared_BCKHW.gather(1, first_BHW[:, None, None].expand(-1, 1, logits_BKHW.shape[1], -1, -1))[:, 0]
    reliable_BKHW = reliable_BKHW & done_BCHW.any(1, keepdim=True)
    return nearest_BCHW[:, 0], torch.where(reliable_BKHW, codes_BCKHW[:, 0], logits_BKHW >= 0), q_BKHW.mean(1)


def loss_5d(logits_BKHW: Tensor, bits_BKHW: Tensor, codes_NK: Tensor, weight_BHW: Tensor, distance: float = 5.0,
            contrast: float = 2.0, temperature: float = 0.5) -> Tensor:
    """Bit cross-entropy, distance and contrast, averaged over all pixels; cosines over [B, N, K, H, W]."""
    import torch.nn.functional as F

    bits_BKHW = bits_BKHW.to(logits_BKHW.dtype)
    signs_1NK11 = (codes_NK.to(logits_BKHW) * 2 - 1)[None, :, :, None, None]
    bce_BHW = F.binary_cross_entropy_with_logits(logits_BKHW, bits_BKHW, reduction="none").mean(1)
    target_BHW = F.cosine_similarity(logits_BKHW, bits_BKHW * 2 - 1, dim=1)
    cosine_BNHW = F.cosine_similarity(logits_BKHW[:, None], signs_1NK11, dim=2)
    contrast_BHW = (cosine_BNHW / temperature).logsumexp(1) - target_BHW / temperature
    return ((bce_BHW + distance * (1 - target_BHW) + contrast * contrast_BHW) * weight_BHW).mean()


# ---- the same work for each form --------------------------------------------------------------------------------------


def class_map(args: argparse.Namespace) -> Tensor:
    """Classes in regions of some dozen pixels a side. Shape: int64 [B, H, W]."""
    import torch
    import torch.nn.functional as F

    field = torch.randn(args.batch, args.classes, 8, 8)
    return F.interpolate(field, (args.size, args.size), mode="bicubic").argmax(1)


def cell_logits(codes_NK: Tensor, labels_BHW: Tensor, args: argparse.Namespace) -> Tensor:
    """Noisy codewords of the cells' classes, three of four cells certain of their bits. Shape: [B, K, h, w]."""
    import torch
    import torch.nn.functional as F

    labels_Bhw = labels_BHW[:, :: args.stride, :: args.stride]
    unsure_B1hw = torch.randn(args.batch, 1, 16, 16)
    if args.content == "noise":
        labels_Bhw = torch.randint(0, args.classes, labels_Bhw.shape)
        unsure_B1hw = torch.randn(args.batch, 1, *labels_Bhw.shape[1:])
    edge = unsure_B1hw.flatten().quantile(0.75)
    unsure_B1hw = F.interpolate(unsure_B1hw, labels_Bhw.shape[1:], mode="nearest") > edge
    logits_BKhw = (codes_NK[labels_Bhw] * 2.0 - 1).movedim(-1, 1) * torch.where(unsure_B1hw, 2.0, 6.0)
    return (logits_BKhw + torch.randn_like(logits_BKhw)).contiguous()


def work(form: str, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The operations of a form as functions that do them once."""
    import torch
    import torch.nn.functional as F

    from ecocseg import codebook
    from ecocseg.coding import EcocCoding, OneHotCoding
    from ecocseg.data import mixing

    torch.manual_seed(0)
    coding: Any = OneHotCoding(args.classes)
    codes_NK = torch.eye(args.classes)
    if form != "one_hot":
        coding = EcocCoding(codebook.max_min(args.classes, args.bits))
        codes_NK = torch.tensor(coding.codebook.matrix).float()
    size = (args.size, args.size)
    labels_BHW = class_map(args)
    logits = cell_logits(codes_NK, labels_BHW, args).to(args.device)
    labels_BHW, codes_NK = labels_BHW.to(args.device), codes_NK.to(args.device)
    true, pseudo = coding.encode(labels_BHW), coding.pseudo_label(logits, size)
    mask_BHW = mixing.class_mix_mask(labels_BHW, [torch.Generator().manual_seed(i) for i in range(args.batch)])
    targets = {"loss": true, "mixed_loss": mixing.mix(true, pseudo, mask_BHW)}
    dense = {name: t.dense_bits(coding.num_outputs) for name, t in targets.items()} if form == "five_dim" else {}

    def upsampled(x: Tensor) -> Tensor:
        return x if args.stride == 1 else F.interpolate(x, size, mode="bilinear")

    def loss(name: str) -> None:
        x = logits.detach().requires_grad_()
        if form == "five_dim":
            loss_5d(upsampled(x), dense[name], codes_NK, true.weight).backward()
        else:
            coding.loss(x, targets[name])["loss"].backward()

    @torch.no_grad()
    def pseudo_label() -> Any:
        if form == "five_dim":
            return pseudo_label_5d(upsampled(logits), codes_NK)
        return coding.pseudo_label(logits, size)

    @torch.no_grad()
    def scores() -> Tensor:
        return scores_5d(logits, codes_NK) if form == "five_dim" else coding.scores(logits)

    few = logits[:, :, :2, :2].detach().requires_grad_()  # tables and libraries are not what is measured
    coding.loss(few, coding.pseudo_label(few))["loss"].backward()
    return {"scores": scores, "pseudo_label": pseudo_label, "loss": lambda: loss("loss"),
            "mixed_loss": lambda: loss("mixed_loss")}


def least_bytes(form: str, operation: str, args: argparse.Namespace) -> int:
    """Bytes that must be read and written at least: logits, their gradient, and what a target is made of."""
    channels = args.classes if form == "one_hot" else args.bits
    cells = args.batch * (args.size // args.stride) ** 2
    pixels = args.batch * args.size**2
    words = 0 if form == "one_hot" else 8 * -(-args.bits // 64)
    if operation == "scores":
        return 4 * cells * (channels + (0 if form == "one_hot" else args.classes))
    target = 8 + 4 + words + (4 if operation == "pseudo_label" and form != "one_hot" else 0)  # classes, weight, bits, reliable
    return 4 * cells * channels * (1 if operation == "pseudo_label" else 2) + pixels * target


def copy_rate(args: argparse.Namespace) -> float:
    """Bytes a second read and written by a copy that no cache holds."""
    import torch

    one = torch.zeros(COPY_MB << 18, device=args.device)
    two = torch.empty_like(one)
    return 2 * one.numel() * 4 / min(seconds(lambda: two.copy_(one), args)[0] for _ in range(5))


def seconds(run: Callable[[], Any], args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one run, by the clock and of CPU time."""
    import torch

    start, cpu = time.perf_counter(), time.process_time()
    run()
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


def case(args: argparse.Namespace) -> dict[str, float]:
    """One operation of one form, its peak of memory above its inputs."""
    form, _, operation = args.case.partition(":")
    run = work(form, args)[operation]
    args.repeats = min(args.repeats, 2)
    return benchmark.measure(run, args)


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    print(f"B {args.batch}, N {args.classes}, K {args.bits}, {args.size} x {args.size} pixels, logits at stride {args.stride}, "
          f"{args.content}, {args.device}, {torch.get_num_threads()} thread(s)")
    rate = copy_rate(args)
    runs = {form: work(form, args) for form in ("one_hot", "ecoc")}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(args.repeats + 1):
        for operation in OPERATIONS:
            for form, by_operation in runs.items():
                taken = seconds(by_operation[operation], args)
                if number:  # the first run is not counted
                    times.setdefault((operation, form), []).append(taken)
    rows = []
    print(f"{'operation':<40}{'form':<11}{'median s':>9}{'least':>8}{'most':>8}{'CPU s':>8}{'MB':>8}{'of copy':>9}")
    for operation, name in OPERATIONS.items():
        for form, shown in FORMS.items():
            if form == "five_dim" and args.without_5d:
                continue
            alone = benchmark.in_own_process(f"{form}:{operation}", sys.argv[1:])
            clock, cpu = zip(*times.get((operation, form), [(alone["seconds"], alone["cpu_seconds"])]), strict=True)
            least = least_bytes(form, operation, args)
            row = {"operation": operation, "form": form, "seconds": statistics.median(clock), "least": min(clock),
                   "most": max(clock), "cpu_seconds": min(cpu), "megabytes": alone["megabytes"], "least_bytes": least,
                   "copy_rate": rate, "share_of_copy": least / rate / min(clock)}
            rows.append(row)
            print(f"{name:<40}{shown:<11}{row['seconds']:>9.3f}{row['least']:>8.3f}{row['most']:>8.3f}{row['cpu_seconds']:>8.3f}"
                  f"{row['megabytes']:>8.0f}{100 * row['share_of_copy']:>8.0f}%", flush=True)
    return rows

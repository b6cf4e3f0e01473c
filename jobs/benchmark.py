"""Measure what codings cost. Each case runs in a process of its own, so that its peak memory is its own.

Examples:
  python jobs/benchmark.py coding                      one-hot beside ECOC beside the 5-D formulation
  python jobs/benchmark.py codebook                    distances reached beside their bounds
  python jobs/benchmark.py step --json step.json       a DAFormer self-training step, one-hot beside ECOC
  python jobs/benchmark.py step --encoder mit_b0 --size 256
  python jobs/benchmark.py ingest --s3                 images a second into a worker, beside other loaders
  python jobs/benchmark.py recipes                     estimates for `--list`, into ecocseg/recipes/expected.json
  python jobs/benchmark.py pool --images 118287 --repeats 5   memory and first batch of a large pool beside a small one
  python jobs/benchmark.py kernels --stride 4          what operators move and compute at least; --device cuda: and take
  python jobs/benchmark.py label --images 32           images a second a pool is labelled with, beside the forward pass alone

Memory is the peak above what the inputs take. Logits have label size unless --stride is given.
Shapes: B batch, N classes, K bits, H W pixels, C candidates.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed

from ecocseg.errors import InputError, run_main

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = [(2, 1), (4, 12), (8, 7), (11, 35), (16, 40), (19, 40), (19, 60), (21, 40), (32, 31), (60, 59), (81, 60),
         (100, 64), (150, 72), (171, 80), (1000, 128)]
FORMS = {"one_hot": "one-hot", "ecoc": "ECOC", "five_dim": "ECOC, 5-D"}
OPERATIONS = ("scores", "pseudo_label", "loss")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, in its own process
    parser.add_argument("what", choices=("coding", "codebook", "step", "ingest", "pool", "label", "kernels", "recipes"))
    parser.add_argument("--json", metavar="FILE", help="file to write the numbers to")
    parser.add_argument("--batch", type=int, default=2, help="images, default 2")
    parser.add_argument("--classes", type=int, default=19, help="default 19")
    parser.add_argument("--bits", type=int, default=40, help="default 40")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, default 512")
    parser.add_argument("--stride", type=int, default=1, help="coding, kernels: stride of the logits, default 1")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median counts; default 3")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, default as torch has them")
    parser.add_argument("--images", type=int, default=1024, help="ingest, pool, label: number of images, default 1024")
    parser.add_argument("--seconds", type=float, default=10, help="ingest: seconds of a measurement, default 10")
    parser.add_argument("--s3", action="store_true", help="ingest: from an S3 server started here (moto)")
    parser.add_argument("--folder", help="ingest, label: folder for the images (default: one under the temporary folder)")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    parser.add_argument("--encoder", default="mit_b5", help="step, label: default mit_b5")
    parser.add_argument("--head", default="daformer", help="step, label: default daformer")
    return parser.parse_args(arguments)


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


# ---- cases, each in a process of its own --------------------------------------------------------------------------


def measure(run: Callable[[], Any], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a run after the first, and the peak of MB above the start."""
    import torch

    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = forget_peak()
    seconds = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds[1:]), "megabytes": max(0, peak - before) / 2**20}


def forget_peak() -> int:
    """Give freed memory back and start the process's peak anew (Linux). Returns the bytes resident now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def codings(args: argparse.Namespace) -> dict[str, Any]:
    from ecocseg import codebook
    from ecocseg.coding import EcocCoding, OneHotCoding

    return {"one_hot": OneHotCoding(args.classes), "ecoc": EcocCoding(codebook.max_min(args.classes, args.bits))}


def coding_case(form: str, operation: str, args: argparse.Namespace) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    coding = codings(args)["one_hot" if form == "one_hot" else "ecoc"]
    size, K = (args.size, args.size), coding.num_outputs
    codes_NK = torch.eye(K, dtype=torch.bool) if form == "one_hot" else torch.tensor(coding.codebook.matrix).bool()
    labels_Bhw = torch.randint(0, args.classes, (args.batch, args.size // args.stride, args.size // args.stride))
    # noisy codewords: most pixels certain of all bits, the rest to be mined
    strength_Bhw1 = torch.where(torch.rand(*labels_Bhw.shape, 1) < 0.75, 6.0, 2.0)
    logits = ((codes_NK[labels_Bhw] * 2.0 - 1) * strength_Bhw1).movedim(-1, 1)
    logits = (logits + torch.randn_like(logits)).contiguous().to(args.device)
    target = coding.encode(torch.randint(0, args.classes, (args.batch, *size), device=args.device))
    codes_NK = codes_NK.to(args.device)
    bits_BKHW = target.dense_bits(K) if form == "five_dim" else None

    def upsampled(x: Tensor) -> Tensor:
        return x if args.stride == 1 else F.interpolate(x, size, mode="bilinear")

    def run_loss() -> None:
        x = logits.detach().requires_grad_()
        if form == "five_dim":
            assert bits_BKHW is not None
            loss_5d(upsampled(x), bits_BKHW, codes_NK, target.weight).backward()
        else:
            coding.loss(x, target)["loss"].backward()

    def run_pseudo_label() -> Any:
        with torch.no_grad():
            if form == "five_dim":
                return pseudo_label_5d(upsampled(logits), codes_NK)
            return coding.pseudo_label(logits, size)

    def run_scores() -> Tensor:
        with torch.no_grad():
            return scores_5d(upsampled(logits), codes_NK) if form == "five_dim" else coding.scores(upsampled(logits))

    few = logits[:, :, :2, :2].detach().requires_grad_()  # tables and libraries are not what is measured
    coding.loss(few, coding.pseudo_label(few))["loss"].backward()
    return measure({"scores": run_scores, "loss": run_loss, "pseudo_label": run_pseudo_label}[operation], args)


def step_case(form: str, args: argparse.Namespace) -> dict[str, float]:
    """A DAFormer step: source loss, teacher's pseudo-labels, ClassMix, mixed loss, AdamW. No augmentation, no data."""
    import copy

    import torch

    from ecocseg.data import mixing
    from ecocseg.models.segmenter import build_segmenter

    torch.manual_seed(0)
    coding = codings(args)[form]
    student = build_segmenter(args.encoder, args.head, coding.num_outputs).to(args.device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=6e-5)
    images = torch.randn(2, args.batch, 3, args.size, args.size, device=args.device)
    labels_BHW = torch.randint(0, args.classes, (args.batch, args.size, args.size), device=args.device)
    generators = [torch.Generator().manual_seed(i) for i in range(args.batch)]

    def run() -> None:
        source = coding.encode(labels_BHW)
        coding.loss(student(images[0]), source)["loss"].backward()
        with torch.no_grad():
            pseudo = coding.pseudo_label(teacher(images[1]), size=(args.size, args.size))
        mask_BHW = mixing.class_mix_mask(labels_BHW, generators)
        mixed = mixing.mix_images(images[0], images[1], mask_BHW)
        coding.loss(student(mixed), mixing.mix(source, pseudo, mask_BHW))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure(run, args)


# ---- tables -------------------------------------------------------------------------------------------------------


def in_own_process(case: str, arguments: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments, "--case", case], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"case {case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def coding_table(arguments: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(f"{'operation':<14}{'form':<12}{'seconds':>10}{'MB':>10}{'5-D is slower':>16}{'and larger':>12}")
    for operation in OPERATIONS:
        results = {form: in_own_process(f"{form}:{operation}", arguments) for form in FORMS}
        large = results["five_dim"]
        for form, result in results.items():
            row: dict[str, Any] = {"operation": operation, "form": form, **result}
            line = f"{operation:<14}{FORMS[form]:<12}{result['seconds']:>10.3f}{result['megabytes']:>10.0f}"
            if form == "ecoc":
                row |= {f"times_{name}": large[name] / max(result[name], 1e-9) for name in ("seconds", "megabytes")}
                line += f"{row['times_seconds']:>15.1f}x{row['times_megabytes']:>11.1f}x"
            rows.append(row)
            print(line, flush=True)
    return rows


def step_table(arguments: list[str], rounds: int) -> list[dict[str, Any]]:
    """Processes of the two codings by turns, so that a slow spell of the machine meets both."""
    results: dict[str, list[dict[str, float]]] = {"one_hot": [], "ecoc": []}
    for _ in range(rounds):
        for form in results:
            results[form].append(in_own_process(form, arguments))
    rows: list[dict[str, Any]] = [{"form": form, "seconds": statistics.median(r["seconds"] for r in each),
             "megabytes": statistics.median(r["megabytes"] for r in each)} for form, each in results.items()]
    print(f"{'form':<12}{'s / step':>10}{'peak MB':>10}{'time':>10}{'memory':>10}")
    for row in rows:
        change = [f"{100 * (row[name] / rows[0][name] - 1):+.1f} %" for name in ("seconds", "megabytes")]
        print(f"{FORMS[row['form']]:<12}{row['seconds']:>10.3f}{row['megabytes']:>10.0f}{change[0]:>10}{change[1]:>10}")
    return rows


def codebook_rows() -> list[dict[str, Any]]:
    from ecocseg.codebook import codebook_table

    rows = codebook_table(PAIRS)
    names = list(rows[0])
    print(" ".join(f"{name:>17}" for name in names))
    for row in rows:
        print(" ".join(f"{row[name]!s:>17}" for name in names))
    return rows


def main() -> int:
    args = parse()
    if args.case is None and args.what == "codebook":
        rows = codebook_rows()
    elif args.what == "recipes":
        from ecocseg import expect

        Path(args.json or expect.TABLE).write_text(json.dumps(expect.table(), indent=1) + "\n")
        return 0
    elif args.what == "pool":
        import benchmark_pool

        if args.case is not None:
            print(json.dumps(benchmark_pool.case(args)), flush=True)
            return 0
        rows = benchmark_pool.pool_table(args)
    elif args.what == "ingest":
        import benchmark_ingest

        args.threads = args.threads or 1
        if args.case is not None:
            print(json.dumps(benchmark_ingest.case(args.case, args)), flush=True)
            os._exit(0)  # loaders' processes and threads need not be waited for
        rows = benchmark_ingest.ingest_table(args)
    else:
        import torch

        if args.size % args.stride:
            raise InputError(f"--size {args.size} is not a multiple of --stride {args.stride}")
        if args.device != "cpu" and not torch.cuda.is_available():
            raise InputError(f"--device {args.device}: no CUDA device here; use cpu")
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.case is not None:
            form, _, operation = args.case.partition(":")
            print(json.dumps(coding_case(form, operation, args) if operation else step_case(form, args)))
            return 0
        if args.what == "label":
            import benchmark_label

            rows = benchmark_label.label_table(args)
        elif args.what == "kernels":
            import benchmark_kernels

            rows = benchmark_kernels.kernel_table(args)
        else:
            print(f"B {args.batch}, N {args.classes}, K {args.bits}, {args.size} x {args.size}, {args.device}, "
                  f"{torch.get_num_threads()} threads")
            arguments = sys.argv[1:]
            rows = coding_table(arguments) if args.what == "coding" else step_table(arguments, rounds=2)
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

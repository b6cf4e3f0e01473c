"""Measure what codings cost. Each case runs in a process of its own, so that its peak memory is its own.

Examples:
  python jobs/benchmark.py coding --stride 4 --threads 1 --json coding.json    one-hot beside ECOC beside the 5-D formulation
  python jobs/benchmark.py codebook                    distances reached beside their bounds
  python jobs/benchmark.py step --recipe demo --json step.json     a recipe's whole step, one-hot beside ECOC
  python jobs/benchmark.py step --recipe daformer_gta2cityscapes --size 256 --batch 1
  python jobs/benchmark.py ingest --s3                 images a second into a worker, beside other loaders
  python jobs/benchmark.py recipes                     estimates for `--list`, into ecocseg/recipes/expected.json
  python jobs/benchmark.py pool --images 118287 --repeats 5   memory and first batch of a large pool beside a small one
  python jobs/benchmark.py kernels --stride 4          what operators move and compute at least; --device cuda: and take
  python jobs/benchmark.py scaling --encoder mit_b0 --size 128   steps a second and bytes on the wire by engine and workers
  python jobs/benchmark.py plan --recipe unimatch_v2_coco_1_32   8 to 512 GPUs and pools of up to a billion images, on paper
  python jobs/benchmark.py label --images 32           images a second a pool is labelled with, beside the forward pass alone

Memory is the peak above what the inputs take. `python jobs/report.py FILE.json` makes the README's table of coding and step.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed

from ecocseg.errors import InputError, run_main

PAIRS = [(2, 1), (4, 12), (8, 7), (11, 35), (16, 40), (19, 40), (19, 60), (21, 40), (32, 31), (60, 59), (81, 60),
         (100, 64), (150, 72), (171, 80), (1000, 128)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, in its own process
    parser.add_argument("what", choices=("coding", "codebook", "step", "ingest", "pool", "label", "kernels", "recipes",
                                         "scaling", "plan"))
    parser.add_argument("--json", metavar="FILE", help="file to write the numbers to")
    parser.add_argument("--batch", type=int, default=2, help="images, default 2; step: of each stream")
    parser.add_argument("--classes", type=int, default=19, help="default 19")
    parser.add_argument("--bits", type=int, default=40, help="default 40")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, default 512; step: of the crop")
    parser.add_argument("--stride", type=int, default=1, help="coding, kernels: stride of the logits, default 1")
    parser.add_argument("--content", choices=("scene", "noise"), default="scene",
                        help="coding: classes in regions, three of four pixels sure; or another class in every cell")
    parser.add_argument("--without-5d", action="store_true", help="coding: leave out the 5-D formulation, which takes minutes")
    parser.add_argument("--recipe", help="step: default daformer_gta2cityscapes; plan: default unimatch_v2_coco_1_32")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, of which the median counts; default 5")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, default as torch has them")
    parser.add_argument("--images", type=int, default=1024, help="ingest, pool, label: number of images, default 1024")
    parser.add_argument("--seconds", type=float, default=10, help="ingest: seconds of a measurement, default 10")
    parser.add_argument("--s3", action="store_true", help="ingest: from an S3 server started here (moto)")
    parser.add_argument("--folder", help="ingest, label: folder for the images (default: one under the temporary folder)")
    parser.add_argument("--workers", default="1,2", help="scaling: numbers of workers, default 1,2")
    parser.add_argument("--ingest", metavar="FILE", help="plan: figures that `ingest --json FILE` measured")
    parser.add_argument("--scaling", metavar="FILE", help="plan: figures that `scaling --json FILE` measured")
    parser.add_argument("--assume", action="append", metavar="NAME=VALUE", help="plan: in place of an assumption; repeatable")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    parser.add_argument("--encoder", default="mit_b5", help="label, scaling: default mit_b5")
    parser.add_argument("--head", default="daformer", help="label, scaling: default daformer")
    args = parser.parse_args(arguments)
    args.recipe = args.recipe or ("unimatch_v2_coco_1_32" if args.what == "plan" else "daformer_gta2cityscapes")
    return args


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
    seconds, cpu_seconds = [], []
    for _ in range(args.repeats + 1):
        start, cpu = time.perf_counter(), time.process_time()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    peak = torch.cuda.max_memory_allocated() if on_gpu else highest_resident()
    return {"seconds": statistics.median(seconds[1:]), "cpu_seconds": min(cpu_seconds[1:]),
            "megabytes": max(0, peak - before) / 2**20}


def forget_peak() -> int:
    """Give freed memory back and start the process's peak anew (Linux). Returns the bytes resident now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest_resident() -> int:
    """Most bytes resident since `forget_peak`. Not `ru_maxrss` where it can be helped: a child inherits its parent's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on and with."""
    import torch

    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else ""
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip()
    return {"device": torch.cuda.get_device_name(device) if on_gpu else f"{processor}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit or None}


# ---- tables -------------------------------------------------------------------------------------------------------


def in_own_process(case: str, arguments: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments, "--case", case], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"case {case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


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
    elif args.what == "scaling":
        import benchmark_scaling

        if args.case is not None:
            print(json.dumps(benchmark_scaling.case(args)), flush=True)
            return 0
        rows = benchmark_scaling.scaling_table(args)
    elif args.what == "plan":
        import benchmark_plan

        rows = benchmark_plan.plan_table(args)
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
        import benchmark_coding
        import benchmark_step

        if args.case is not None:
            print(json.dumps((benchmark_coding if args.what == "coding" else benchmark_step).case(args)))
            return 0
        if args.what == "label":
            import benchmark_label

            rows = benchmark_label.label_table(args)
        elif args.what == "kernels":
            import benchmark_kernels

            rows = benchmark_kernels.kernel_table(args)
        else:
            rows = (benchmark_coding if args.what == "coding" else benchmark_step).table(args)
    if args.json:
        told = {"arguments": vars(args), "machine": machine(args.device), "rows": rows}
        Path(args.json).write_text(json.dumps(told, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

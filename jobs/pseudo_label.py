"""Label a whole pool of shards with a trained checkpoint: shards that `supervised` trains from (ST++), and nothing else needed.

Examples:
  python jobs/pseudo_label.py runs/teacher data/voc/unlabeled --out data/voc/pseudo
  python jobs/pseudo_label.py s3://bucket/runs/teacher s3://bucket/pool --out s3://bucket/pseudo --endpoint http://minio:9000
  python jobs/pseudo_label.py runs/teacher data/voc/unlabeled --out data/voc/pseudo --keep 0.5 \\
      --checkpoints runs/teacher/checkpoints/step_00001000,runs/teacher/checkpoints/step_00002000
  python jobs/pseudo_label.py runs/student data/voc/pseudo/rest --with data/voc/pseudo/stable --out data/voc/pseudo/second

Each image gets a mask, the bits of its pseudo-label, its weight (the share of pixels that are confident) and, with earlier
checkpoints, its stability. A command that was stopped or killed goes on when it is given again. Needs no labels in the pool,
and does not look at any. Train with method.kind=supervised method.pseudo_labels=true data.unlabeled=OUT; the whole of
ST++ is a recipe of jobs/train_ssl.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed

from ecocseg.cluster import absolute
from ecocseg.errors import InputError, run_main

if TYPE_CHECKING:
    from ecocseg.data.shards import Manifest
    from ecocseg.labelling import Plan, Workers
    from ecocseg.labelling_shard import Labeler
    from ecocseg.storage import Storage


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share; give 0 to 1")
    return share


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from ecocseg import inference
    from ecocseg.labelling_shard import GPU_BATCH

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint)")
    parser.add_argument("pool", metavar="POOL", help="shards to label: a local path or s3://bucket/key")
    parser.add_argument("--out", required=True, metavar="URL", help="folder to write to: a local path or s3://bucket/key")
    parser.add_argument("--checkpoints", metavar="A,B", default="",
                        help="earlier checkpoints of the run: each image's stability is the mean IoU of their predictions and "
                        "the last one's")
    parser.add_argument("--keep", type=_share, metavar="SHARE",
                        help="copy this share of the images, the most stable ones, to OUT/stable and the others to OUT/rest")
    parser.add_argument("--with", dest="together", metavar="URL",
                        help="labelled shards in a folder beside OUT that its manifest lists as well: the second round of ST++")
    parser.add_argument("--threshold", type=_share, metavar="P",
                        help="confidence from which a pixel counts towards its image's weight; 0 = every image weighs 1 "
                        "(default: method.confidence_threshold of the checkpoint's run)")
    parser.add_argument("--which", default="auto", choices=["auto", "student", "teacher"],
                        help="weights to use (default: the teacher if there is one)")
    parser.add_argument("--workers", type=_positive, metavar="N",
                        help="shards labelled at once, each by a Ray actor; 1 = in this process (default: one for each GPU, or "
                        "for 4 CPUs)")
    parser.add_argument("--batch", type=_positive, metavar="N",
                        help=f"images of one size in a forward pass (default: {GPU_BATCH} on a GPU, 1 on a CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of something else that are there")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show what there is to do; write no shard")
    inference.add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from prepare_shards import ProgressLine

    from ecocseg import labelling
    from ecocseg.storage_options import storage_of

    labeler = load(options)
    storage = storage_of(options, labeler.last.config.storage)
    plan = make_plan(options, labeler, storage)
    workers, device = labelling.place_workers(options.workers, options.device, len(plan.pool.files))
    together = read_together(options, storage)
    labelling.check_together(plan, together)
    if options.dry_run:
        show_plan(plan, labeler, workers, storage)
        return 0
    manifest = labelling.label_pool(labeler, plan, workers, device, together=together, overwrite=options.overwrite,
                                    progress=ProgressLine(sys.stderr, "labelled"))
    parts = {} if options.keep is None else labelling.divide(manifest, options.keep, storage)
    for one in (manifest, *parts.values()):
        show(one, storage)
    return 0


def load(options: argparse.Namespace) -> Labeler:
    """The checkpoints, still on the CPU, and how they predict."""
    import torch

    from ecocseg import inference
    from ecocseg.labelling_shard import GPU_BATCH, Labeler
    from ecocseg.storage_options import storage_of

    if options.keep is not None and not options.checkpoints:
        raise InputError("--keep: the most stable images are known by earlier checkpoints only; give --checkpoints")
    storage, cpu = storage_of(options), torch.device("cpu")
    device = inference.choose_device(options.device)
    last, *earlier = [inference.load(path.strip(), options.which, storage, cpu)
                      for path in (options.checkpoint, *filter(None, options.checkpoints.split(",")))]
    threshold = last.config.method.confidence_threshold if options.threshold is None else options.threshold
    batch = options.batch or (GPU_BATCH if device.type == "cuda" else 1)
    return Labeler(last, inference.override(last.spec, options), threshold, tuple(earlier), batch)


def make_plan(options: argparse.Namespace, labeler: Labeler, storage: Storage) -> Plan:
    """What is to be labelled; the pool is looked at, and whether OUT can be written."""
    from ecocseg.data.shards import check_files, read_manifest
    from ecocseg.labelling import Plan

    storage.check(options.pool)
    out = absolute(options.out).rstrip("/")
    storage.check_writable(out)
    pool = read_manifest(absolute(options.pool), storage)
    check_files(pool, storage)
    if out == pool.url.rstrip("/"):
        raise InputError(f"--out: {options.out} is the pool itself; give another folder")
    return Plan(pool, out, storage, labeler.describe(), labeler.last.class_list)


def read_together(options: argparse.Namespace, storage: Storage) -> Manifest | None:
    from ecocseg.data.shards import check_files, read_manifest

    if options.together is None:
        return None
    manifest = read_manifest(absolute(options.together), storage)
    check_files(manifest, storage)
    return manifest


def show_plan(plan: Plan, labeler: Labeler, workers: Workers, storage: Storage) -> None:
    told, pool = plan.labels, plan.pool
    done = {} if plan.finished() else plan.done()
    left = 0 if plan.finished() else len(pool.files) - len(done)
    print(f"checkpoint  step {told['step']}, {labeler.last.coding.describe()}\n"
          f"stability   {'earlier steps ' + ', '.join(map(str, told['stability_steps'])) if labeler.earlier else 'none'}\n"
          f"pool        {pool.num_rows} images in {len(pool.files)} shard(s), {pool.url}\n"
          f"out         {plan.destination} (writable), {left} shard(s) to label\n"
          f"weight      share of an image's pixels of confidence {plan.labels['confidence_threshold']:g} or more\n"
          f"prediction  {labeler.spec.mode}, {labeler.batch} image(s) of one size at once\n"
          f"workers     {workers.describe()}\nall checks passed; nothing was labelled")


def show(manifest: Manifest, storage: Storage) -> None:
    """What a labelled set holds, in figures."""
    import numpy as np

    from ecocseg.data.shards import read_metadata

    table = read_metadata(manifest, ["weight", "stability"], storage)
    weight, stability = (np.array(table.column(name).to_pylist(), np.float64) for name in ("weight", "stability"))
    print(f"{manifest.url}: {manifest.num_rows} images, {len(manifest.files)} shard(s), "
          f"{sum(file.bytes for file in manifest.files) / 2**20:.1f} MiB; mean weight {weight.mean():.3f}"
          + ("" if np.isnan(stability).all() else f", mean stability {np.nanmean(stability):.3f}"))
    shares = np.array(manifest.class_pixels) / max(1, sum(manifest.class_pixels))
    print("  " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(manifest.classes.names, shares, strict=True)))
    damaged = manifest.options.get("damaged", ())
    if damaged:
        print(f"  {len(damaged)} image(s) do not decode and have no label (skipped.txt): {damaged[0]}")


if __name__ == "__main__":
    sys.exit(run_main(main))

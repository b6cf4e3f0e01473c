"""Evaluate a checkpoint on labelled shards: the same numbers as during training.

Examples:
  python jobs/evaluate.py runs/demo --data data/demo/target_val
  python jobs/evaluate.py runs/demo/checkpoints/step_00000600 --data s3://bucket/cityscapes/val \\
      --mode slide --crop 512 512 --stride 341 341 --flip --json result.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed

from ecocseg.errors import InputError, run_main

if TYPE_CHECKING:
    from ecocseg.checkpoint import Loaded
    from ecocseg.data.shards import Manifest


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from ecocseg import inference

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint)")
    parser.add_argument("--data", required=True, metavar="URL", help="labelled shards: the folder of manifest.json")
    parser.add_argument("--which", default="both", choices=["both", "student", "teacher"],
                        help="weights to evaluate (default: both, or the student where there is no teacher)")
    parser.add_argument("--json", metavar="FILE", help="also write figures and counts to this file")
    inference.add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from ecocseg import inference
    from ecocseg.data.shards import iter_rows, read_manifest
    from ecocseg.evaluate import evaluate, samples_of_rows
    from ecocseg.metrics import table
    from ecocseg.storage_options import storage_of
    from ecocseg.volumes import volume_names

    if options.json:
        check_writable(options.json)
    device = inference.choose_device(options.device)
    loaded = load_models(options, device)
    one = next(iter(loaded.values()))
    spec = inference.override(one.spec, options)
    storage = storage_of(options, one.config.storage)
    storage.check(options.data)
    manifest = read_manifest(options.data, storage)
    check_data(options.data, manifest, one)
    volumes = volume_names(manifest, storage) if one.config.eval.metric == "dice" else []
    columns = (*one.config.model.image_columns, "mask", *(["group"] if volumes else []))
    results = evaluate(
        {name: entry.model for name, entry in loaded.items()}, one.coding,
        samples_of_rows(iter_rows(manifest, 0, 1, columns, storage)),
        spec, normalize=one.normalize, device=device, volumes=volumes, autocast=inference.autocast_dtype(one))
    print(f"{options.checkpoint}, step {one.step}, on {manifest.num_rows} images of {options.data}\n")
    print(table(results, one.class_list.names, difference=False))
    if options.json:
        report = {
            "checkpoint": options.checkpoint, "step": one.step, "data": options.data, "images": manifest.num_rows,
            "classes": list(one.class_list.names), "spec": dataclasses.asdict(spec),
            "results": {name: result.to_dict() for name, result in results.items()}}
        Path(options.json).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"\nwritten: {options.json}")
    return 0


def load_models(options: argparse.Namespace, device: Any) -> dict[str, Loaded]:
    """The models to evaluate by name; with `both`, a checkpoint without a teacher gives its student alone."""
    from ecocseg import inference
    from ecocseg.storage_options import storage_of

    storage = storage_of(options)
    if options.which != "both":
        return {options.which: inference.load(options.checkpoint, options.which, storage, device)}
    loaded = {"student": inference.load(options.checkpoint, "student", storage, device)}
    try:
        loaded["teacher"] = inference.load(options.checkpoint, "teacher", storage, device)
    except InputError as error:
        print(f"student only: {error}", file=sys.stderr)
    return loaded


def check_data(url: str, manifest: Manifest, loaded: Loaded) -> None:
    """InputError unless every image has a mask and the classes are the checkpoint's."""
    theirs, ours = manifest.classes, loaded.class_list
    if tuple(theirs.names) != tuple(ours.names):
        raise InputError(
            f"--data {url} has the classes of '{theirs.name}' ({theirs.num_classes}), the checkpoint those of "
            f"'{ours.name}' ({ours.num_classes}); pack the data with the checkpoint's class list, or give a checkpoint "
            "of these classes")
    if manifest.num_labeled < manifest.num_rows:
        missing = manifest.num_rows - manifest.num_labeled
        raise InputError(f"--data {url}: {missing} of {manifest.num_rows} images have no mask; give labelled shards")


def check_writable(path: str) -> None:
    folder = Path(path).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise InputError(f"--json {path} cannot be written; give a file in an existing folder you may write to")


if __name__ == "__main__":
    sys.exit(run_main(main))

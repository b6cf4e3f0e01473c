"""Pack images and masks into shards that training streams, or check shards that are there.

Examples:
  python jobs/prepare_shards.py demo --out data/demo
  python jobs/prepare_shards.py camvid ../camvid --out data/camvid/day --split train --sequences 0006R0,0016E5
  python jobs/prepare_shards.py camvid ../camvid --out data/camvid/dusk --sequences 0001TP --unlabeled
  python jobs/prepare_shards.py folder my_images --classes classes.txt --out s3://bucket/my_images
  python jobs/prepare_shards.py check data/camvid/day --all

Every image and mask is checked before anything is written. `COMMAND --help` says what a command reads and takes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed

import numpy as np

from ecocseg.data import shards
from ecocseg.data.checks import check_mask, decode_ids, image_size
from ecocseg.data.classes import ClassList
from ecocseg.data.shards import Manifest, Record, read_manifest
from ecocseg.data.sources import camvid, demo, folder
from ecocseg.errors import InputError, run_main
from ecocseg.storage import Storage, join

SHOWN_PROBLEMS = 20
SHOWN_SIZES = 8


def _comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    return 0 if text.strip("0") == "" else _positive(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|camvid|folder|check")

    reach = argparse.ArgumentParser(add_help=False)
    reach.add_argument("--endpoint", help="URL of an S3-compatible server (default: AWS, or AWS_ENDPOINT_URL)")
    reach.add_argument("--region", help="region of the bucket (default: AWS_DEFAULT_REGION, or us-east-1)")
    write = argparse.ArgumentParser(add_help=False, parents=[reach])
    write.add_argument("--out", required=True, metavar="URL", help="folder to write to: a local path or s3://bucket/key")
    write.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    write.add_argument("--shard-mb", type=_positive, default=64, metavar="N", help="MiB a shard, about (default: 64)")
    write.add_argument("--row-group-rows", type=_positive, default=32, metavar="N",
                       help="images read at once; smaller ones mix better, larger ones read faster (default: 32)")
    unlabeled = argparse.ArgumentParser(add_help=False)
    unlabeled.add_argument("--unlabeled", action="store_true", help="pack the images alone; masks are not looked at")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str, *parents: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about.splitlines()[0], description=about, parents=parents,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(run=run)
        return command

    command = add("demo", run_demo, "Draw the built-in street scenes: OUT/source, OUT/target, OUT/target_eval, "
                  "OUT/source_eval.", write)
    command.add_argument("--seed", type=_seed, default=0, help="seed of the scenes (default: 0, the published ones)")
    command.add_argument("--count", type=_positive, metavar="N", help="scenes of each part (default: the published numbers)")

    command = add("camvid", run_camvid, camvid.__doc__ or "", write, unlabeled)
    command.add_argument("root", help="folder that holds train/, trainannot/, val/, ...")
    command.add_argument("--split", type=_comma_list, default=["train"], metavar="A,B",
                         help="train, val, test, or some of them (default: train)")
    command.add_argument("--sequences", type=_comma_list, default=[], metavar="A,B",
                         help="sequences to take, by the prefix of their names: 0006R0,0016E5 (default: all)")

    command = add("folder", run_folder, folder.__doc__ or "", write, unlabeled)
    command.add_argument("root", help="folder that holds images/ (.jpg, .jpeg, .png) and masks/ (8-bit .png of class ids)")
    command.add_argument("--classes", required=True, metavar="FILE", help="class list: text, YAML or JSON file (see above), "
                         "or the name of a built-in list (cityscapes, voc, ...)")
    command.add_argument("--name", help="name of the data set (default: the folder's)")

    command = add("check", run_check, "Verify the checksums of shards, decode some images and masks, and show what they "
                  "hold.\nDamage ends it with exit code 2.", reach)
    command.add_argument("url", help="folder of the shards: a local path or s3://bucket/key")
    command.add_argument("--all", action="store_true", help="decode every image and mask, not only a sample")
    command.add_argument("--sample", type=_positive, default=64, metavar="N", help="images to decode (default: 64)")
    return parser


def _storage(options: argparse.Namespace) -> Storage:
    return Storage(endpoint=options.endpoint, region=options.region)


def _check_output(options: argparse.Namespace, *folders: str) -> Storage:
    """That the output can be written and holds no shards yet, before anything is read."""
    storage = _storage(options)
    storage.check_writable(options.out)
    there = [url for url in folders if storage.exists(join(url, shards.MANIFEST))]
    if there and not options.overwrite:
        raise InputError(f"--out: there are shards at {', '.join(there)} already; give --overwrite to replace them, or "
                         "another folder")
    return storage


def _pack(options: argparse.Namespace, storage: Storage, records: Iterator[Record], dataset: str, classes: ClassList,
          made_by: dict[str, Any]) -> None:
    show(shards.write_shards(records, options.out, dataset=dataset, classes=classes, shard_bytes=options.shard_mb << 20,
                             row_group_rows=options.row_group_rows, storage=storage, options=made_by))


def run_demo(options: argparse.Namespace) -> None:
    storage = _check_output(options, *(join(options.out, part) for part in demo.PARTS))
    counts = dict.fromkeys(demo.PARTS, options.count) if options.count else None
    for manifest in demo.prepare(options.out, counts=counts, seed=options.seed, storage=storage).values():
        show(manifest)


def run_camvid(options: argparse.Namespace) -> None:
    storage = _check_output(options, options.out)
    records = camvid.records(options.root, options.split, options.sequences, options.unlabeled)
    _pack(options, storage, records, "camvid", camvid.CLASSES, {
        "source": "camvid", "splits": options.split, "sequences": options.sequences, "unlabeled": options.unlabeled})


def run_folder(options: argparse.Namespace) -> None:
    storage = _check_output(options, options.out)
    classes = folder.read_classes(options.classes)
    records = folder.records(options.root, classes, options.unlabeled)
    name = options.name or Path(options.root).resolve().name
    _pack(options, storage, records, name, classes.classes, {
        "source": "folder", "unlabeled": options.unlabeled, "ids": {str(raw): train for raw, train in classes.ids.items()}})


def run_check(options: argparse.Namespace) -> None:
    storage = _storage(options)
    manifest = read_manifest(options.url, storage)
    lost = shards.file_problems(manifest, storage, checksums=True)
    unreadable = set(shards.file_problems(manifest, storage))
    checked, problems = _decode(manifest, storage, None if options.all else options.sample, unreadable, set(lost) - unreadable)
    problems = [*lost.values(), *problems]
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise InputError(f"{options.url} is damaged; restore the shards named or pack them anew:\n  "
                         + "\n  ".join([*problems[:SHOWN_PROBLEMS], *more]))
    show(manifest)
    sizes = shards.read_metadata(manifest, ("width", "height"), storage).to_pylist()
    common = Counter((row["width"], row["height"]) for row in sizes).most_common()
    print("  sizes: " + ", ".join(f"{count} of {w} x {h}" for (w, h), count in common[:SHOWN_SIZES])
          + (f", and {len(common) - SHOWN_SIZES} other sizes" if len(common) > SHOWN_SIZES else ""))
    print(f"  whole: {len(manifest.files)} checksums are right, {checked} of {manifest.num_rows} images decode")


def _decode(manifest: Manifest, storage: Storage, sample: int | None, unreadable: set[str],
            suspects: set[str]) -> tuple[int, list[str]]:
    """Decode `sample` rows, evenly spread (None: all), and all of suspect shards; how many, and what is wrong with them."""
    rows_there = manifest.num_rows
    wanted = set(np.linspace(0, rows_there - 1, min(sample or rows_there, rows_there)).astype(int).tolist())
    checked, first, problems = 0, 0, []
    for f, g, rows in zip(*(column.tolist() for column in manifest.row_group_table()), strict=True):
        shard = manifest.files[f].name
        mine = [i for i in range(rows) if shard in suspects or first + i in wanted]
        first += rows
        if not mine or shard in unreadable:
            continue
        try:
            table = shards.read_row_group(manifest, f, g, shards.SCHEMA.names, storage).take(mine)
        except InputError as error:
            problems.append(f"{_whose(manifest, f, g, storage)}: {error}")
            continue
        for row in table.to_pylist():
            problem = _row_problem(row, manifest)
            problems += [f"{shard}: {problem}"] if problem else []
            checked += 1
    return checked, problems


def _whose(manifest: Manifest, f: int, g: int, storage: Storage) -> str:
    """The images of a row group that cannot be read."""
    try:
        names = shards.read_row_group(manifest, f, g, ["image_id"], storage)["image_id"].to_pylist()
    except InputError:
        return f"row group {g}"
    return f"row group {g} ({names[0]} to {names[-1]})"


def _row_problem(row: dict[str, Any], manifest: Manifest) -> str | None:
    name = row["image_id"]
    try:
        width, height = image_size(row["image"], f"{name}: the image")
        if (height, width) != (row["height"], row["width"]):
            return f"{name}: the image is {width} x {height}, its row says {row['width']} x {row['height']}"
        if row["mask"] is not None:
            counts = check_mask(decode_ids(row["mask"], name), (height, width), manifest.classes, name)
            if counts.tolist() != row["class_pixels"]:
                return f"{name}: the class pixels of its row are not those of its mask"
    except InputError as error:
        return str(error)
    return None


def show(manifest: Manifest) -> None:
    """Print what a set of shards holds."""
    size = sum(file.bytes for file in manifest.files) / 2**20
    print(f"{manifest.url}: {manifest.num_rows} images, {manifest.num_labeled} labelled, {len(manifest.files)} shard(s), "
          f"{size:.1f} MiB")
    if not manifest.num_labeled:
        return
    total = max(1, sum(manifest.class_pixels))
    wide = max(map(len, manifest.classes.names))
    for index, (name, pixels) in enumerate(zip(manifest.classes.names, manifest.class_pixels, strict=True)):
        print(f"  {index:3d} {name:{wide}s} {100 * pixels / total:6.2f} %" + ("  (absent)" if not pixels else ""))


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

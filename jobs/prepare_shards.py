"""Pack images and masks into shards that training streams, or check shards that are there.

Examples:
  python jobs/prepare_shards.py demo --out data/demo
  python jobs/prepare_shards.py cityscapes ../cityscapes --out s3://bucket/cityscapes/train --splits train
  python jobs/prepare_shards.py camvid ../camvid --out data/camvid/day --sequences 0006R0,0016E5
  python jobs/prepare_shards.py camvid ../camvid --out data/camvid/dusk --sequences 0001TP --unlabeled
  python jobs/prepare_shards.py voc VOCdevkit --augmented --labeled-fraction 1/16 --seed 1 --out data/voc/1_16
  python jobs/prepare_shards.py folder my_images --classes classes.txt --labeled-fraction 1 --out data/mine
  python jobs/prepare_shards.py check data/camvid/day --all

A command that was stopped goes on when it is given again. Bad files are all named together, and nothing is trained on until
they are mended or left out. `COMMAND --help` says what a command reads and takes.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed

import numpy as np

from ecocseg.cluster import lasting
from ecocseg.data import packing, shards, splits
from ecocseg.data.checks import check_mask, decode_ids, image_size
from ecocseg.data.packing_plan import Part, Settings
from ecocseg.data.shards import Manifest, read_manifest
from ecocseg.data.sources import (
    acdc_cardiac,
    acdc_driving,
    ade20k,
    camvid,
    change,
    cityscapes,
    coco,
    dark_zurich,
    demo,
    folder,
    gta,
    images,
    synthia,
    voc,
)
from ecocseg.data.sources.pairs import Source
from ecocseg.errors import InputError, run_main
from ecocseg.storage import Storage, is_remote, join
from ecocseg.storage_options import add_storage_arguments, storage_of

SHOWN_PROBLEMS = 20
SHOWN_SIZES = 8
LOG_SECONDS = 30

SOURCES: dict[str, ModuleType] = {
    "folder": folder, "images": images, "camvid": camvid, "cityscapes": cityscapes, "gta": gta, "synthia": synthia,
    "acdc_driving": acdc_driving, "dark_zurich": dark_zurich, "voc": voc, "coco": coco, "ade20k": ade20k, "change": change,
    "acdc_cardiac": acdc_cardiac}
"""Commands that pack: each takes the keywords of its module's `source` as options."""

HELP = {
    "root": "folder of the data set, as described above; of `images`, also s3://bucket/prefix",
    "classes": "class list: a text, YAML or JSON file, or the name of a built-in list (cityscapes, voc, ...)",
    "name": "name of the data set (default: the folder's)",
    "splits": "parts to take", "split": "part to take", "sequences": "sequences to take (default: all)",
    "cities": "cities to take (default: all)", "annotation": "fine or coarse masks", "conditions": "conditions to take",
    "times": "times of day to take", "skip_other_size": "leave out images whose mask is of another size",
    "augmented": "with the masks of SBD", "list_file": "text file of the names to take, one a line",
    "masks": "folder of ready-made masks to take instead of annotations", "reduced": "masks hold train ids already",
    "tile": "pixels a side of tiles to cut", "cases": "number of patients to take, the first of the list",
    "rest": "take the other patients instead", "value_range": "least and greatest value of an image"}


def _comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    return 0 if text.strip("0") == "" else _positive(text)


def _quality(text: str) -> int:
    if _positive(text) > 100:
        raise argparse.ArgumentTypeError(f"'{text}' is no quality of 1 to 100")
    return int(text)


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"'{text}' is no fraction; give 1/16, or 0.0625") from None


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
        return low, high
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no range; give two numbers, 0,1") from None


KINDS: dict[str, dict[str, Any]] = {
    "Sequence[str]": {"type": _comma_list, "metavar": "A,B"}, "bool": {"action": "store_true"},
    "int | None": {"type": _positive, "metavar": "N"}, "tuple[float, float]": {"type": _range, "metavar": "LOW,HIGH"}}
"""How a keyword of a source is read, by its annotation; all else is text."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    reach = argparse.ArgumentParser(add_help=False)
    add_storage_arguments(reach)
    write = argparse.ArgumentParser(add_help=False, parents=[reach])
    write.add_argument("--out", required=True, metavar="URL", help="folder to write to: a local path or s3://bucket/key")
    write.add_argument("--overwrite", action="store_true", help="replace shards of something else that are there")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str, *parents: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about.strip().splitlines()[0], description=about, parents=parents,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(run=run)
        return command

    command = add("demo", run_demo, "Draw the built-in street scenes: OUT/source, OUT/target, OUT/target_eval, "
                  "OUT/source_eval.", write)
    command.add_argument("--seed", type=_seed, default=0, help="seed of the scenes (default: 0, the published ones)")
    command.add_argument("--count", type=_positive, metavar="N", help="scenes of each part (default: the published numbers)")

    for name, module in SOURCES.items():
        _add_source(add(name, run_source, _about(module), write), module)

    command = add("check", run_check, "Verify the checksums of shards, decode some images and masks, and show what they "
                  "hold.\nDamage ends it with exit code 2.", reach)
    command.add_argument("url", help="folder of the shards: a local path or s3://bucket/key")
    command.add_argument("--all", action="store_true", help="decode every image and mask, not only a sample")
    command.add_argument("--sample", type=_positive, default=64, metavar="N", help="images to decode (default: 64)")
    return parser


def _about(module: ModuleType) -> str:
    """What a source reads, and what it makes of it."""
    made = (inspect.getdoc(module.source) or "").partition("\nRaises:")[0]
    return f"{(module.__doc__ or '').strip()}\n\n{made}".strip()


def _add_source(command: argparse.ArgumentParser, module: ModuleType) -> None:
    """The options of a source, of its splits, and of packing."""
    for parameter in inspect.signature(module.source).parameters.values():
        if parameter.name in ("unlabeled", "storage"):
            continue
        kind, default = KINDS.get(parameter.annotation, {}), parameter.default
        if parameter.name == "root":
            command.add_argument("root", help=HELP["root"])
            continue
        required = default is inspect.Parameter.empty
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        command.add_argument("--" + parameter.name.replace("_", "-"), **kind, required=required,
                             default=None if required else default, help=HELP[parameter.name]
                             + ("" if required or not shown else f" (default: {shown})"))
    if module is images:
        command.set_defaults(unlabeled=True)
    else:
        command.add_argument("--unlabeled", action="store_true", help="pack the images alone; masks are not looked at")
        _add_split(command.add_argument_group(
            "a split of one data set", "OUT/labeled, OUT/unlabeled with the rest, and OUT/eval if asked for; no image is "
            "stored twice. A list has an image's\npath a line, relative to the root; what follows it is ignored."))
    group = command.add_argument_group("how it is packed")
    group.add_argument("--shard-mb", type=_positive, default=64, metavar="N", help="MiB a shard, about (default: 64)")
    group.add_argument("--row-group-rows", type=_positive, default=32, metavar="N",
                       help="most images read at once; smaller ones mix better, larger ones read faster (default: 32, and no "
                            "more than about 8 MiB)")
    group.add_argument("--max-side", type=_positive, metavar="PIXELS",
                       help="reduce larger images to this longer side, masks by nearest pixel (default: as they are)")
    group.add_argument("--jpeg-quality", type=_quality, metavar="N",
                       help="make every image a JPEG of quality 1 to 100 (default: bytes as found)")
    group.add_argument("--workers", type=_positive, metavar="N",
                       help="shards packed at once, by Ray; 1 = in this process (default: all CPUs; this process for up to "
                            f"{packing.RAY_IMAGES} images or fewer than {packing.RAY_SHARDS} shards)")
    group.add_argument("--skip-bad", action="store_true", help="leave bad files out, list them in OUT/skipped.txt")
    group.add_argument("--dry-run", action="store_true", help="list and count; read no image, write nothing")


def _add_split(group: Any) -> None:
    group.add_argument("--labeled-list", metavar="FILE", help="labelled images")
    group.add_argument("--labeled-fraction", type=_fraction, metavar="1/N",
                       help="share of the images with masks, drawn; 1 = all of them, those without a mask are unlabelled")
    group.add_argument("--labeled-count", type=_positive, metavar="N", help="number of images with masks, drawn")
    group.add_argument("--unlabeled-list", metavar="FILE", help="unlabelled images (default: all others)")
    group.add_argument("--eval-list", metavar="FILE", help="images kept for evaluation (default: none)")
    group.add_argument("--eval-count", type=_positive, metavar="N", help="number of images kept for evaluation, drawn")
    group.add_argument("--seed", type=_seed, default=0, help="of the draw; a smaller share is inside a larger one (default: 0)")
    group.add_argument("--unlabeled-includes-labeled", action="store_true",
                       help="OUT/unlabeled refers to the shards of OUT/labeled as well")


def run_demo(options: argparse.Namespace) -> None:
    storage = storage_of(options)
    storage.check_writable(options.out)
    there = [url for url in (join(options.out, part) for part in demo.PARTS) if storage.exists(join(url, shards.MANIFEST))]
    if there and not options.overwrite:
        raise InputError(f"--out: there are shards at {', '.join(there)} already; give --overwrite to replace them, or "
                         "another folder")
    counts = dict.fromkeys(demo.PARTS, options.count) if options.count else None
    for manifest in demo.prepare(options.out, counts=counts, seed=options.seed, storage=storage).values():
        show(manifest)


def run_source(options: argparse.Namespace) -> None:
    """Pack a data set, in one part or as a split."""
    storage = storage_of(options)
    if not options.dry_run:
        storage.check_writable(options.out)  # before anything is read
    settings = Settings(options.shard_mb << 20, options.row_group_rows, options.max_side, options.jpeg_quality)
    split = _split(options)
    lists: dict[str, bytes] = {}
    if split is None:
        parts = [packing.plan(_listed(options, options.unlabeled, storage), options.out, settings, storage=storage)]
    else:
        parts, lists = _split_parts(options, split, settings, storage)
    if options.dry_run:
        _show_plan(parts, options)
        return
    made = packing.pack_parts(parts, workers=options.workers, overwrite=options.overwrite, skip_bad=options.skip_bad,
                              progress=ProgressLine(sys.stderr))
    for name, data in lists.items():
        storage.write_bytes(join(options.out, name), data)
    for manifest, part in zip(made, parts, strict=True):
        show(manifest, shares=part.refers_to is None)


def _split_parts(options: argparse.Namespace, split: splits.Split, settings: Settings,
                 storage: Storage) -> tuple[list[Part], dict[str, bytes]]:
    """The parts of a split, and their lists by file name."""
    whole, pool, root = _listed(options, False, storage), _listed(options, True, storage), _root(options)
    divided = splits.divide(whole, pool, root, split)
    partners = {entry.image_id: entry for entry in whole.entries}
    parts: list[Part] = []
    for name, source in divided.items():
        refers_to = parts[0] if name == "unlabeled" and split.with_labeled else None
        parts.append(packing.plan(source, join(options.out, name), settings, storage=storage, refers_to=refers_to))
    return parts, {f"{name}.txt": splits.to_list(source, partners, root) for name, source in divided.items()}


def _root(options: argparse.Namespace) -> str:
    return options.root if is_remote(options.root) else os.path.abspath(os.path.expanduser(options.root))


def _listed(options: argparse.Namespace, unlabeled: bool, storage: Storage) -> Source:
    source = SOURCES[options.command].source
    values = {**vars(options), "root": _root(options), "unlabeled": unlabeled, "storage": storage}
    return source(**{name: values[name] for name in inspect.signature(source).parameters})


def _split(options: argparse.Namespace) -> splits.Split | None:
    """The split that is asked for, if any."""
    if options.command == "images":
        return None
    split = splits.Split(options.labeled_list, options.unlabeled_list, options.eval_list, options.labeled_fraction,
                         options.labeled_count, options.eval_count, options.seed, options.unlabeled_includes_labeled)
    if split == splits.Split(seed=options.seed):
        return None
    if options.unlabeled:
        raise InputError("--unlabeled: a split has a labelled part; leave one of them out")
    split.check()
    return split


def _show_plan(parts: list[Part], options: argparse.Namespace) -> None:
    """What would be packed.

    Raises:
        SourceProblems: for names that do not fit.
    """
    for part in parts:
        images_there = len(part.source.entries)
        bare = options.unlabeled or os.path.basename(part.destination) == "unlabeled" and len(parts) > 1
        size = f"{part.num_bytes / 2**20:.1f} MiB of files" if part.num_bytes else "files in a bucket"
        print(f"{part.destination}: {images_there} images, {0 if bare else images_there} labelled, {size}, "
              f"{len(part.shards)} shard(s)" + (" and those of the labelled part" if part.refers_to else ""))
    if not options.skip_bad:
        packing.check_listing(parts, read_through=False)


class ProgressLine:
    """One line that is written over on a terminal; a line every half minute elsewhere."""

    def __init__(self, stream: TextIO, done: str = "packed") -> None:
        self.stream, self.terminal, self.shown, self.done = stream, stream.isatty(), time.monotonic(), done
        self.calls: list[tuple[float, int]] = []
        """Time and images of the first call, with what was there, and of the second: a shard is packed, all has begun."""

    def __call__(self, packed: int, total: int, num_bytes: int) -> None:
        now = time.monotonic()
        if len(self.calls) < 2:
            self.calls.append((now, packed))
        if len(self.calls) == 1:
            if packed:
                print(f"going on: {packed} of {total} images were {self.done} before", file=self.stream, flush=True)
            return
        text, (since, before) = f"{self.done} {packed} of {total} images, {num_bytes / 2**20:.0f} MiB", self.calls[1]
        if before < packed < total:
            text += f", {(now - since) / (packed - before) * (total - packed) / 60:.0f} min left"
        if self.terminal:
            print(f"\r\x1b[K{text}", end="\n" if packed == total else "", file=self.stream, flush=True)
        elif now - self.shown >= LOG_SECONDS:
            self.shown = now
            print(text, file=self.stream, flush=True)


def run_check(options: argparse.Namespace) -> None:
    storage = storage_of(options)
    storage.check(options.url)
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
        if row["image_b"] is not None and image_size(row["image_b"], f"{name}: image_b") != (width, height):
            return f"{name}: the two images differ in size"
        if row["mask"] is not None:
            counts = check_mask(decode_ids(row["mask"], name), (height, width), manifest.classes, name)
            if counts.tolist() != row["class_pixels"]:
                return f"{name}: the class pixels of its row are not those of its mask"
    except InputError as error:
        return str(error)
    return None


def show(manifest: Manifest, shares: bool = True) -> None:
    """Print what a set of shards holds, with the shares of its classes unless they were printed for another part."""
    size = sum(file.bytes for file in manifest.files) / 2**20
    elsewhere = sum("/" in file.name for file in manifest.files)
    print(f"{manifest.url}: {manifest.num_rows} images, {manifest.num_labeled} labelled, {len(manifest.files)} shard(s), "
          f"{size:.1f} MiB" + (f"; {elsewhere} of the shards in another part" if elsewhere else "")
          + (f"; {len(manifest.options['skipped'])} file(s) left out, see {packing.SKIPPED}"
             if manifest.options.get("skipped") else ""))
    if not manifest.num_labeled or not shares:
        return
    total = max(1, sum(manifest.class_pixels))
    wide = max(map(len, manifest.classes.names))
    for index, (name, pixels) in enumerate(zip(manifest.classes.names, manifest.class_pixels, strict=True)):
        print(f"  {index:3d} {name:{wide}s} {100 * pixels / total:6.2f} %" + ("  (absent)" if not pixels else ""))


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if getattr(options, "out", None) is not None:
        options.out = lasting(options.out)
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

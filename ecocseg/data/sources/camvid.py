"""CamVid in its 11-class form: folders train, val, test of images and trainannot, valannot, testannot of masks.

Images are .png as published or .jpg; masks are 8-bit PNGs of the same stem. The prefix of a name is its sequence:
0001TP is dusk, 0006R0, 0016E5 and Seq05VD are day. Id 11, void, becomes 255.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ecocseg.data.classes import CLASS_LISTS, IGNORE
from ecocseg.data.shards import Record
from ecocseg.data.sources.pairs import IMAGE_SUFFIXES, MASK_SUFFIXES, Pair, checked_records, find_files, id_table, match
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["camvid"]
VOID = 11
SPLITS = ("train", "val", "test")
IDS = {**{i: i for i in range(CLASSES.num_classes)}, VOID: IGNORE}


def sequence_of(stem: str) -> str:
    return stem.partition("_")[0]


def _pairs(root: Path, split: str, sequences: Sequence[str], unlabeled: bool, problems: list[str]) -> list[Pair]:
    def chosen(files: dict[str, Path]) -> dict[str, Path]:
        return {stem: path for stem, path in files.items() if not sequences or sequence_of(stem) in sequences}

    images = find_files(root / split, IMAGE_SUFFIXES, f"the {split} images; give CamVid's root", problems)
    masks = None
    if not unlabeled:
        masks = find_files(root / f"{split}annot", MASK_SUFFIXES, "their masks; add it, or pack unlabelled images",
                           problems)
    pairs = match(chosen(images), None if masks is None else chosen(masks), problems)
    numbers = [re.search(r"(\d+)$", pair.image_id) for pair in pairs]
    return [replace(pair, group=sequence_of(pair.image_id), index=int(number[1]) if number else None)
            for pair, number in zip(pairs, numbers, strict=True)]


def records(root: str | Path, splits: Sequence[str] = ("train",), sequences: Sequence[str] = (),
            unlabeled: bool = False) -> Iterator[Record]:
    """Records of some splits; of some sequences when they are given; without masks when `unlabeled`.

    Raises:
        InputError: at once, naming all bad files, or a split or sequence that is not there.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise InputError(f"--split: {', '.join(unknown) or 'none given'}; the splits of CamVid are {', '.join(SPLITS)}")
    problems: list[str] = []
    pairs = [pair for split in dict.fromkeys(splits)
             for pair in _pairs(Path(root), split, sequences, unlabeled, problems)]
    found = {pair.group for pair in pairs}
    missing = [name for name in sequences if name not in found]
    if not problems and (missing or not pairs):
        there = sorted({sequence_of(path.name) for split in splits for path in (Path(root) / split).iterdir()})
        what = f"no image of sequence {', '.join(missing)}" if missing else "no image (.jpg, .jpeg, .png)"
        raise InputError(f"there is {what} in {', '.join(f'{root}/{s}' for s in splits)}; "
                         f"sequences there: {', '.join(there) or 'none'}")
    return checked_records(pairs, CLASSES, id_table(IDS), problems,
                           f"masks hold ids 0 to {CLASSES.num_classes - 1}, {VOID} (void) and {IGNORE}")

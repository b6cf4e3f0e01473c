"""CamVid in its 11-class form: folders train, val, test of images and trainannot, valannot, testannot of masks.

Images are .png as published or .jpg; masks are 8-bit PNGs of the same stem. The prefix of a name is its sequence:
0001TP is dusk, 0006R0, 0016E5 and Seq05VD are day. Id 11, void, becomes 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ecocseg.data.classes import CLASS_LISTS, IGNORE
from ecocseg.data.sources.pairs import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Pair,
    Source,
    find_files,
    id_table,
    match,
    read_pair,
)
from ecocseg.data.sources.tree import check_choice, last_number
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
    return [replace(pair, group=sequence_of(pair.image_id), index=last_number(pair.image_id)) for pair in pairs]


def source(root: str | Path, splits: Sequence[str] = ("train",), sequences: Sequence[str] = (),
           unlabeled: bool = False) -> Source:
    """Images of some splits; of some sequences when they are given; with masks unless `unlabeled`.

    Image ids are names, groups sequences, an index is a frame's number in its sequence.

    Raises:
        InputError: for a folder, split or sequence that is not there, naming those that are.
    """
    check_choice("splits", splits, SPLITS, "the splits of CamVid")
    splits = list(dict.fromkeys(splits))
    problems: list[str] = []
    pairs = [pair for split in splits for pair in _pairs(Path(root), split, sequences, unlabeled, problems)]
    found = {pair.group for pair in pairs}
    missing = [name for name in sequences if name not in found]
    if not problems and (missing or not pairs):
        there = sorted({sequence_of(path.name) for split in splits for path in (Path(root) / split).iterdir()})
        what = f"no image of sequence {', '.join(missing)}" if missing else "no image (.jpg, .jpeg, .png)"
        raise InputError(f"there is {what} in {', '.join(f'{root}/{s}' for s in splits)}; "
                         f"sequences there: {', '.join(there) or 'none'}")
    return Source("camvid", CLASSES, pairs, partial(read_pair, table=id_table(IDS)), problems,
                  f"masks hold ids 0 to {CLASSES.num_classes - 1}, {VOID} (void) and {IGNORE}",
                  {"source": "camvid", "splits": splits, "sequences": list(sequences), "unlabeled": unlabeled})

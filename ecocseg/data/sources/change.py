"""Pairs of two dates with masks of what changed: WHU-CD and LEVIR-CD, in the forms they are given away in.

    {A,B,label}/whucd_00002.png                  256 x 256, of all splits;    list/{train,val,...}.txt beside them, or a list
    {train,val,test}/{A,B,label}/train_1.png     LEVIR-CD as published, 1024 x 1024

The published splits of LEVIR-CD are of tiles of 256 x 256: train_1_1.png to train_1_16.png are those of train_1.png, row by
row. `tile=256` cuts them so. Labels are PNGs of 0 for unchanged and 255 or 1 for changed: here 255 is not ignored.

Most of WHU-CD's pairs have no change at all. Some published results left those out, and training on all falls ten points
short of them: take the list of names that a result was trained on.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecocseg.data.checks import DECODING_ERRORS, decode_ids
from ecocseg.data.classes import CLASS_LISTS, IGNORE
from ecocseg.data.shards import Record
from ecocseg.data.sources.lists import list_options, read_names
from ecocseg.data.sources.pairs import UNKNOWN, Pair, Source, match
from ecocseg.data.sources.rasters import png_bytes, read_file, train_ids
from ecocseg.data.sources.tree import check_choice, files_ending, inside, subfolders
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["change"]
SUFFIXES = (".jpg", ".png")
Decoded = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8] | None]
"""First date, second date: uint8 [H, W, 3] or grey [H, W]; labels: uint8 [H, W] or None."""


@dataclass(frozen=True)
class ChangePair(Pair):
    """A pair of dates, or a tile of it."""

    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom of the tile, in pixels; None = the whole pair."""


def labels_of(path: Path) -> NDArray[np.uint8]:
    """0 unchanged, 1 changed, from a mask of 0 and 255, or 0 and 1, or of one bit. Shape: uint8 [H, W].

    Raises:
        InputError: when it does not decode or holds other ids, or both 1 and 255.
    """
    data = read_file(path)
    if data[24:26] == b"\x01\x00":  # a PNG of one bit of grey: Pillow would show its ones as 255
        return _decoded(data, path, ("1",)).astype(np.uint8)
    raw_HW = decode_ids(data, str(path))
    table = np.full(256, UNKNOWN, np.int16)
    table[0], table[IGNORE if (raw_HW == IGNORE).any() else 1] = 0, 1
    return train_ids(raw_HW, table, str(path))


def _decoded(data: bytes, path: Path, modes: Sequence[str] = ("RGB", "L")) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image if image.mode in modes else image.convert("RGB"))
    except DECODING_ERRORS as error:
        raise InputError(f"{path} does not decode ({error}); replace or remove it") from None


_decoding = threading.Lock()


@functools.lru_cache(maxsize=2)  # tiles of an image are read one after the other, by some threads at once
def _decoded_pair(image: Path, image_b: Path, mask: Path | None) -> Decoded:
    first, second = _decoded(read_file(image), image), _decoded(read_file(image_b), image_b)
    labels = None if mask is None else labels_of(mask)
    for array, path in ((second, image_b), (labels, mask)):
        if array is not None and array.shape[:2] != first.shape[:2]:
            raise InputError(f"{path} is {array.shape[1]} x {array.shape[0]}, {image} {first.shape[1]} x {first.shape[0]} "
                             "(width x height); give files of one size")
    return first, second, labels


def read_change(pair: Pair) -> Record:
    """The record of a pair of dates, images as found; or of a tile of it, as PNGs of the same pixels.

    Raises:
        InputError: when a file cannot be read or does not decode, sizes differ, or a mask holds other ids.
    """
    assert pair.image_b is not None
    box = pair.box if isinstance(pair, ChangePair) else None
    if box is None:
        mask = None if pair.mask is None else png_bytes(labels_of(pair.mask))
        return Record(pair.image_id, read_file(pair.image), mask, read_file(pair.image_b), pair.group, pair.index)
    with _decoding:  # or each thread decodes the large pair
        arrays = _decoded_pair(pair.image, pair.image_b, pair.mask)
    left, top, right, bottom = box
    image, image_b, mask = (None if array is None else png_bytes(np.ascontiguousarray(array[top:bottom, left:right]))
                            for array in arrays)
    assert image is not None
    return Record(pair.image_id, image, mask, image_b, pair.group, pair.index)


def _tiles(pair: ChangePair, tile: int) -> list[ChangePair]:
    """A pair as tiles, row by row, those at the right and lower edge smaller; the pair itself when it is no larger."""
    try:
        with Image.open(pair.image) as image:  # reads the header alone
            width, height = image.size
    except DECODING_ERRORS as error:
        raise InputError(f"{pair.image} does not decode ({error}); replace or remove it") from None
    if width <= tile and height <= tile:
        return [pair]
    boxes = [(left, top, min(left + tile, width), min(top + tile, height))
             for top in range(0, height, tile) for left in range(0, width, tile)]
    return [replace(pair, image_id=f"{pair.image_id}_{number}", group=pair.image_id, index=number, box=box)
            for number, box in enumerate(boxes, start=1)]


def _files(base: Path, name: str) -> dict[str, Path]:
    folder = inside(base, name, what="a folder of pairs of dates has A, B and label")
    return {stem: path for suffix in SUFFIXES for stem, path in files_ending(folder, suffix).items()}


def _pairs(base: Path, unlabeled: bool, problems: list[str]) -> list[ChangePair]:
    first, second = _files(base, "A"), _files(base, "B")
    if not first:
        raise InputError(f"there is no image *{' or *'.join(SUFFIXES)} in {base / 'A'}")
    problems += [f"{path} has no second date of the same stem in B" for stem, path in first.items() if stem not in second]
    problems += [f"{path} has no first date of the same stem in A" for stem, path in second.items() if stem not in first]
    both, either = {stem: first[stem] for stem in sorted(first) if stem in second}, {**first, **second}
    labels = None if unlabeled else {stem: path for stem, path in _files(base, "label").items()
                                     if stem in both or stem not in either}  # else it is named above
    return [ChangePair(pair.image_id, pair.image, pair.mask, image_b=second[pair.image_id])
            for pair in match(both, labels, problems)]


def _place(root: Path, split: str | None, list_file: str | Path | None) -> tuple[Path, Path | None]:
    """The folder that holds A, B and label, and the list that chooses from it."""
    if (root / "A").is_dir():
        if split is None or list_file is not None:
            return root, None if list_file is None else Path(list_file)
        lists = files_ending(root / "list", ".txt")
        check_choice("split", [split], sorted(lists), f"the lists in {root / 'list'}")
        return root, lists[split]
    inside(root, what="pairs of dates")
    splits = [name for name in subfolders(root) if (root / name / "A").is_dir()]
    if not splits:
        raise InputError(f"there is no folder A in {root}, nor in a split's folder there; folders there: "
                         f"{', '.join(subfolders(root)) or 'none'}")
    check_choice("split", [] if split is None else [split], splits, "the splits there")
    return root / str(split), None if list_file is None else Path(list_file)


def source(root: str | Path, split: str | None = None, tile: int | None = None, list_file: str | Path | None = None,
           unlabeled: bool = False) -> Source:
    """Pairs of a split, of them those that `list_file` names when it is given, and their masks unless `unlabeled`.

    A split is a folder that has A, B and label, or beside them a list in list/; of all pairs when there is neither. With
    `tile`, pairs of more pixels a side are cut: their headers are read here, lists name tiles, groups are the large images
    and indices the tiles' numbers from 1. Image ids are stems.

    Raises:
        InputError: when the root, the split or a list is not there, naming what is.
    """
    if tile is not None and tile < 1:
        raise InputError(f"tile: {tile} is no size; give pixels a side, 256 for the published splits")
    base, chosen = _place(Path(root), split, list_file)
    problems: list[str] = []
    pairs = _pairs(base, unlabeled, problems)
    if tile is not None:
        pairs = [one for pair in pairs for one in _tiles(pair, tile)]
    names = None if chosen is None else read_names(chosen)
    if names is not None:
        there = {pair.image_id: pair for pair in pairs}
        problems = [f"{base} has no whole pair of the listed name {name}" for name in names if name not in there]
        pairs = [there[name] for name in names if name in there]
    if not pairs:
        raise InputError(f"{base} has no pair" + (f" that {chosen} names; its first is {names[0]}" if names else "")
                         + "; published lists of LEVIR-CD name tiles, which tile=256 makes")
    options = {"source": "change", "split": split, "tile": tile, "unlabeled": unlabeled, **list_options(chosen, names)}
    return Source("change", CLASSES, sorted(pairs, key=lambda pair: pair.image_id), read_change, problems,
                  "A/x.png goes with B/x.png and label/x.png, which holds 0 and 255, or 0 and 1", options)

"""GTA5 (Playing for Data, https://download.visinf.tu-darmstadt.de/data/from_games), its parts unpacked into one folder:

    images/NNNNN.png     colour images
    labels/NNNNN.png     palette PNGs, whose indices are the label ids of Cityscapes, with 34 for the licence plate

Some label files are of another size than their image: each is named as a problem, or such pairs are left out on request.
Files of other names, such as NNNNN_labelTrainIds.png that other tools write beside the labels, are not looked at.
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ecocseg.data.classes import CLASS_LISTS, IGNORE
from ecocseg.data.shards import Record
from ecocseg.data.sources.cityscapes import LABEL_IDS
from ecocseg.data.sources.pairs import UNKNOWN, Pair, Source, id_table, read_pair
from ecocseg.data.sources.tree import NO_MASKS, inside, pairs_ending
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["cityscapes"]
# 255 is no label id: it is in masks of train ids alone, which must not be mapped a second time
IDS = {**LABEL_IDS, 34: IGNORE, 255: UNKNOWN}
HEADER = 24
"""Bytes of a PNG up to and with its width and height."""


def _size(header: bytes) -> tuple[int, int] | None:
    """Width and height in a PNG's first bytes; None when they are none, which is named when the image is decoded."""
    if len(header) < HEADER or header[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", header[16:HEADER])
    return width, height


def _differ(pair: Pair) -> bool:
    """Whether image and mask are of two sizes, as their headers say; files that cannot be read are named when read whole."""
    sizes = set()
    for path in filter(None, (pair.image, pair.mask)):
        try:
            with path.open("rb") as file:
                sizes.add(_size(file.read(HEADER)))
        except OSError:
            return False
    return len(sizes - {None}) > 1


def read(pair: Pair, table: NDArray[np.int16]) -> Record:
    """The record of a pair.

    Raises:
        InputError: as `read_pair` does, and when the mask is of another size than the image.
    """
    record = read_pair(pair, table)
    if record.mask is not None:
        image, mask = _size(record.image), _size(record.mask)
        if image and mask and image != mask:
            raise InputError(f"{pair.mask} is {mask[0]} x {mask[1]}, its image {image[0]} x {image[1]} (width x height); "
                             "skip_other_size leaves such pairs out")
    return record


def source(root: str | Path, skip_other_size: bool = False, unlabeled: bool = False) -> Source:
    """All images and, unless `unlabeled`, their masks; image ids are the five digits of a name, indices their number.

    With `skip_other_size` the header of every file is read, and pairs of two sizes are left out; `options` names those.

    Raises:
        InputError: when a folder is missing or has no file of these names.
    """
    images = inside(root, "images", what="the images; give GTA5's root")
    masks = None if unlabeled else inside(root, "labels", what=NO_MASKS)
    problems: list[str] = []
    pairs = [replace(pair, index=int(pair.image_id))
             for pair in pairs_ending(images, ".png", masks, (".png",), problems, stems=r"\d+")]
    left_out: list[str] = []
    if skip_other_size and not unlabeled:
        with ThreadPoolExecutor(8) as pool:  # it waits for a disk or a network more than it computes
            left_out = [pair.image_id for pair, differ in zip(pairs, pool.map(_differ, pairs), strict=True) if differ]
    skipped = set(left_out)
    return Source("gta", CLASSES, [pair for pair in pairs if pair.image_id not in skipped],
                  partial(read, table=id_table(IDS)), problems,
                  "images/NNNNN.png goes with labels/NNNNN.png, which holds label ids 0 to 34 as published",
                  {"source": "gta", "skip_other_size": skip_other_size, "left_out": left_out, "unlabeled": unlabeled})

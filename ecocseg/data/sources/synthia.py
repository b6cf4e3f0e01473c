"""SYNTHIA-RAND-CITYSCAPES (http://synthia-dataset.net), the folder RAND_CITYSCAPES:

    RGB/NNNNNNN.png         colour images
    GT/LABELS/NNNNNNN.png   PNGs of three 16-bit channels: class id, number of the object, nothing

There are 23 class ids of its own. Files of other names, such as NNNNNNN_labelTrainIds.png that other tools write beside the
labels, are not looked at.
"""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecocseg.data.checks import DECODING_ERRORS
from ecocseg.data.classes import CLASS_LISTS, IGNORE, ClassList
from ecocseg.data.shards import Record
from ecocseg.data.sources.pairs import UNKNOWN, Pair, Source, id_table, read_pair
from ecocseg.data.sources.rasters import png_bytes, read_file, train_ids
from ecocseg.data.sources.tree import NO_MASKS, check_choice, inside, pairs_ending
from ecocseg.errors import InputError

NAMES = ("void", "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car", "traffic sign", "person",
         "bicycle", "motorcycle", "parking slot", "road work", "traffic light", "terrain", "rider", "truck", "bus", "train",
         "wall", "lane marking")
"""Names by class id, in Cityscapes' words where it has the class; the README of the data set."""
LISTS = ("cityscapes", "synthia16")


def class_ids(classes: ClassList) -> dict[int, int]:
    """Train id of each class id; ignored are void, parking slot, road work, lane marking, and what `classes` lacks."""
    ids = {index: classes.names.index(name) if name in classes.names else IGNORE for index, name in enumerate(NAMES)}
    return {**ids, 255: UNKNOWN}  # no class id, so of a mask that somebody has mapped before


def decode_first_channel(data: bytes, where: str) -> NDArray[np.uint16]:
    """The first channel of a PNG of three 16-bit channels. Shape: uint16 [H, W].

    Raises:
        InputError: when it is anything else or does not decode.
    """
    def half(raw_mode: str) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            # Pillow keeps one byte of each sample; which one, the raw mode of its tiles says
            image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
            return np.asarray(image)[..., 0]

    try:
        if data[12:16] == b"IHDR" and data[24:26] == b"\x10\x02":  # 16 bits a sample, RGB
            return half("RGB;16B") * np.uint16(256) + half("RGB;16L")
    except DECODING_ERRORS as error:
        raise InputError(f"{where}: the mask does not decode ({error}); replace or remove it") from None
    raise InputError(f"{where}: the mask is no PNG of three 16-bit channels; give GT/LABELS as published")


def read(pair: Pair, table: NDArray[np.int16]) -> Record:
    """The record of a pair, its mask an 8-bit PNG of train ids.

    Raises:
        InputError: when a file cannot be read, the mask does not decode, or holds ids that `table` does not know.
    """
    record = read_pair(replace(pair, mask=None), table)
    if pair.mask is None:
        return record
    ids_HW = decode_first_channel(read_file(pair.mask), str(pair.mask))
    if ids_HW.max() >= table.size:
        raise InputError(f"{pair.mask}: unknown id(s) up to {ids_HW.max()}")
    return replace(record, mask=png_bytes(train_ids(ids_HW.astype(np.uint8), table, str(pair.mask))))


def source(root: str | Path, classes: str = "cityscapes", unlabeled: bool = False) -> Source:
    """All images and, unless `unlabeled`, their masks; image ids are the digits of a name, indices their number.

    `classes` is `cityscapes`, all 19, or `synthia16`, the 16 that SYNTHIA has. Published adaptation to Cityscapes trains a
    model of 19 outputs and scores 16 of them (DAFormer and its predecessors), and source and target must mean the same by
    an id, so 19 it is unless asked for. Terrain, truck and train are in the list of ids, but in no mask.

    Raises:
        InputError: when a folder is missing or has no file of these names, or the class list is unknown.
    """
    check_choice("classes", [classes], LISTS, "the class lists of SYNTHIA")
    images = inside(root, "RGB", what="the images; give the folder RAND_CITYSCAPES")
    masks = None if unlabeled else inside(root, "GT", "LABELS", what=NO_MASKS)
    problems: list[str] = []
    pairs = [replace(pair, index=int(pair.image_id))
             for pair in pairs_ending(images, ".png", masks, (".png",), problems, stems=r"\d+")]
    chosen = CLASS_LISTS[classes]
    return Source("synthia", chosen, pairs, partial(read, table=id_table(class_ids(chosen))), problems,
                  "RGB/NNNNNNN.png goes with GT/LABELS/NNNNNNN.png, whose first channel holds class ids 0 to 22",
                  {"source": "synthia", "classes": classes, "unlabeled": unlabeled})

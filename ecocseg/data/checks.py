"""Whether an image and its mask are fit to be packed: they decode to their end, and ids and sizes are right."""

from __future__ import annotations

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecocseg.data.classes import IGNORE, ClassList
from ecocseg.errors import InputError

DECODING_ERRORS = (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for damaged files."""


def check_mask(mask_HW: NDArray[np.uint8], size: tuple[int, int], classes: ClassList, where: str) -> NDArray[np.int64]:
    """Pixels of each class in a mask of train ids. Shape: int64 [N].

    Raises:
        InputError: when its size is not `size` (height, width), or it holds an id that is neither a class nor 255.
    """
    if mask_HW.shape != size:
        raise InputError(f"{where}: the mask is {mask_HW.shape[1]} x {mask_HW.shape[0]}, the image {size[1]} x {size[0]} "
                         "(width x height); give a mask of the image's size")
    counts = np.bincount(mask_HW.reshape(-1), minlength=256)
    unknown = [int(i) for i in np.flatnonzero(counts) if i >= classes.num_classes and i != IGNORE]
    if unknown:
        raise InputError(f"{where}: the mask holds id(s) {unknown}, the classes of '{classes.name}' are 0 to "
                         f"{classes.num_classes - 1} and 255 is ignored; map or correct them")
    return counts[:classes.num_classes].astype(np.int64)


def decode_ids(data: bytes, where: str) -> NDArray[np.uint8]:
    """Ids in an 8-bit grey or palette PNG. Shape: uint8 [H, W].

    Raises:
        InputError: when it is anything else: other files lose ids (JPEG), or scale them (grey of fewer bits).
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            kind, mode = opened.format, opened.mode
            if kind == "PNG" and mode in ("L", "P") and (mode == "P" or data[24] == 8):  # byte 24: bits per sample
                return np.asarray(opened)
    except DECODING_ERRORS as error:
        raise InputError(f"{where}: the mask does not decode ({error}); replace or remove it") from None
    bits = f" of {data[24]} bits a sample" if kind == "PNG" else ""
    raise InputError(f"{where}: the mask is a {mode} {kind}{bits}; save it as an 8-bit grey or palette PNG of class ids")


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of an image, decoded to its end: a cut one is found now, not in the middle of a training."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            image.draft("L", (1, 1))  # JPEG: all bytes are read, but an eighth of the size is computed
            image.load()
    except DECODING_ERRORS as error:
        raise InputError(f"{where} does not decode ({error}); replace or remove it") from None
    return size

"""Files and arrays of raw data sets: reading and encoding them, and raw ids to train ids."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecocseg.data.sources.pairs import UNKNOWN
from ecocseg.errors import InputError


def read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
        InputError: when it cannot be read, naming it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; restore it or leave it out") from None


def png_bytes(image: NDArray[Any]) -> bytes:
    """A PNG of uint8 [H, W] or [H, W, 3], or of 16-bit grey from uint16 [H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def train_ids(raw_HW: NDArray[np.uint8], table: NDArray[np.int16], where: str) -> NDArray[np.uint8]:
    """Train ids, uint8 [H, W], from raw ids [H, W] and the train id of each, int16 [256].

    Raises:
        InputError: when there is an id that the table does not know.
    """
    present = np.flatnonzero(np.bincount(raw_HW.reshape(-1), minlength=256))
    unknown = present[table[present] == UNKNOWN].tolist()
    if unknown:
        raise InputError(f"{where}: unknown id(s) {', '.join(map(str, unknown))}")
    return table[raw_HW].astype(np.uint8)


def optional_module(name: str, data_set: str) -> Any:
    """A module that only some data sets need.

    Raises:
        InputError: when it is not installed, saying how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(f"{data_set} is read with {package}, which is not installed; pip install {package}, or ecocseg "
                         "with its extra [sources]") from None

"""Pairs of image and mask files: found by stem, read one by one."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecocseg.data.checks import decode_ids
from ecocseg.data.classes import IGNORE, ClassList
from ecocseg.data.shards import Record
from ecocseg.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_SUFFIXES = (".png",)
UNKNOWN = -1


@dataclass(frozen=True)
class Pair:
    """An image file, its mask file if there is one, and what their names say."""

    image_id: str
    image: Path
    mask: Path | None = None
    group: str | None = None
    index: int | None = None
    image_b: Path | None = None
    """Second date of a change pair."""


@dataclass(frozen=True)
class Source:
    """A raw data set as it lies on disk: what there is to pack, and how an entry becomes a record. It pickles, so that
    entries are read anywhere.
    """

    dataset: str
    classes: ClassList
    entries: Sequence[Pair]
    """In the order of the shards; sorted by what the data set names them."""
    read: Callable[[Pair], Record]
    """InputError naming the file when it cannot be read, does not decode or has unknown ids."""
    problems: Sequence[str] = ()
    """Found while listing: files without a partner, two of one name."""
    remedy: str = ""
    """Ends the message about problems."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """How it was selected, for the manifest; plain JSON."""


class NoMask(str):
    """The problem of an image without a mask; it is none where only some images are labelled."""


def id_table(ids: Mapping[int, int]) -> NDArray[np.int16]:
    """Train id by raw id, int16 [256]; `UNKNOWN` where `ids` says nothing. 255 stays ignored unless it is given."""
    table = np.full(256, UNKNOWN, np.int16)
    table[IGNORE] = IGNORE
    for raw, train in ids.items():
        table[raw] = train
    return table


def find_files(folder: Path, suffixes: Sequence[str], what: str, problems: list[str]) -> dict[str, Path]:
    """Files below a folder by their path in it without suffix, sorted; hidden ones are left out.

    Raises:
        InputError: when the folder does not exist.
    """
    if "://" in str(folder) or not folder.is_dir():
        raise InputError(f"there is no local folder {folder} with {what}")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in suffixes or any(part.startswith(".") for part in inside.parts) or path.is_dir():
            continue
        stem = inside.with_suffix("").as_posix()
        if stem in found:
            problems.append(f"{path} and {found[stem].name} have one stem; keep one of them")
        found[stem] = path
    return found


def match(images: Mapping[str, Path], masks: Mapping[str, Path] | None, problems: list[str]) -> list[Pair]:
    """Pairs of one stem; files without a partner become problems. `masks` None: images alone."""
    if masks is None:
        return [Pair(stem, path) for stem, path in images.items()]
    problems += [NoMask(f"{path} has no mask of the same stem") for stem, path in images.items() if stem not in masks]
    problems += [f"{path} has no image of the same stem" for stem, path in masks.items() if stem not in images]
    return [Pair(stem, path, masks[stem]) for stem, path in images.items() if stem in masks]


def read_pair(pair: Pair, table: NDArray[np.int16]) -> Record:
    """The record of a pair; images are the bytes found, and so is the mask when no id of it changes.

    Raises:
        InputError: when the mask does not decode or holds ids that `table` does not know, or a file cannot be read.
    """
    try:
        image, mask, image_b = (None if path is None else path.read_bytes() for path in (pair.image, pair.mask, pair.image_b))
    except OSError as error:
        raise InputError(f"{error.filename or pair.image} cannot be read: {error.strerror or error}") from None
    if mask is not None:
        raw_HW = decode_ids(mask, str(pair.mask))
        present = np.flatnonzero(np.bincount(raw_HW.reshape(-1), minlength=256))
        unknown = present[table[present] == UNKNOWN].tolist()
        if unknown:
            raise InputError(f"{pair.mask}: unknown id(s) {', '.join(map(str, unknown))}")
        if (table[present] != present).any():
            buffer = io.BytesIO()
            Image.fromarray(table[raw_HW].astype(np.uint8)).save(buffer, "PNG", optimize=True)
            mask = buffer.getvalue()
    assert image is not None
    return Record(pair.image_id, image, mask, image_b, pair.group, pair.index)

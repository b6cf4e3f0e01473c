"""Pictures made in milliseconds for any class list: a few bands and boxes in the colours of their classes.

They are learnable (a class is its colour, under light and noise) and have no meaning: smoke runs and tests take them where
a recipe's own data is not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ecocseg.data.classes import IGNORE, ClassList
from ecocseg.data.shards import Manifest, Record, write_shards
from ecocseg.data.sources.demo import encode_png
from ecocseg.storage import Storage, join

SIZE = (96, 128)
PARTS = {"labeled": (0, 12, 0.0, True), "unlabeled": (1000, 12, 30.0, False), "eval": (2000, 4, 30.0, True)}
"""Part: number of its first picture, pictures, brightness added, with masks."""


def picture(index: int, classes: ClassList, tint: float = 0.0, size: tuple[int, int] = SIZE
            ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image uint8 [H, W, 3] and labels uint8 [H, W] of one picture; 3 to 6 classes, a strip of it ignored."""
    rng = np.random.default_rng([index, classes.num_classes])
    height, width = size
    labels_HW = np.full(size, int(rng.integers(classes.num_classes)), np.uint8)
    labels_HW[: int(rng.integers(height // 4, height // 2))] = rng.integers(classes.num_classes)
    for _ in range(int(rng.integers(2, 5))):
        top, left = int(rng.integers(height * 2 // 3)), int(rng.integers(width * 2 // 3))
        tall, wide = int(rng.integers(height // 5, height // 2)), int(rng.integers(width // 5, width // 2))
        labels_HW[top : top + tall, left : left + wide] = rng.integers(classes.num_classes)
    colours_HW3 = np.array(classes.palette, np.float64)[labels_HW]
    image_HW3 = colours_HW3 * rng.uniform(0.8, 1.1) + tint + rng.normal(0, 10, colours_HW3.shape)
    labels_HW[:, : width // 16] = IGNORE
    return np.clip(image_HW3, 0, 255).astype(np.uint8), labels_HW


def pair(index: int, classes: ClassList, tint: float = 0.0) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Two dates of a place, uint8 [H, W, 3] each, and labels uint8 [H, W]: class 1 has another colour in the second."""
    image_HW3, labels_HW = picture(index, classes, tint)
    rng = np.random.default_rng([index, 2])
    ground_HW3 = 120 + tint + 20 * rng.normal(size=image_HW3.shape)
    later_HW3 = ground_HW3 + 5 * rng.normal(size=image_HW3.shape) + 90.0 * (labels_HW == 1)[..., None]
    before, after = (np.clip(date, 0, 255).astype(np.uint8) for date in (ground_HW3, later_HW3))
    return before, after, labels_HW


def records(part: str, classes: ClassList) -> Iterator[Record]:
    first, count, tint, labeled = PARTS[part]
    for index in range(first, first + count):
        later = None
        if classes.name == "change":
            image_HW3, later_HW3, labels_HW = pair(index, classes, tint)
            later = encode_png(later_HW3)
        else:
            image_HW3, labels_HW = picture(index, classes, tint)
        yield Record(f"{part}-{index}", encode_png(image_HW3), encode_png(labels_HW) if labeled else None, later,
                     group=str(index // 2), index=index)


def prepare(root: str, classes: ClassList, storage: Storage | None = None) -> dict[str, Manifest]:
    """Shards `labeled`, `unlabeled` (brighter pictures) and `eval` under `root`."""
    return {part: write_shards(records(part, classes), join(root, part), dataset=f"toy/{part}", classes=classes,
                               row_group_rows=4, storage=storage, options={"source": "toy"}) for part in PARTS}

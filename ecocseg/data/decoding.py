"""From encoded rows to crops of one size: beside the trainer by its threads, or by Ray tasks on any node with free CPUs.

Rows reach this stage in their order, so that what crosses the cluster is one step's share of encoded images on the way
there and its crops on the way back, whatever the shuffle windows hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ecocseg.data.transforms import IGNORE, Sample, UInt8, WeakTransform
from ecocseg.errors import InputError

if TYPE_CHECKING:
    from ecocseg.data.classes import ClassList

TASK_ROWS = 8  # most rows of a Ray task


@dataclass(frozen=True)
class Encoded:
    """A row as it was read, with its place in the stream and the class it was drawn for (-1: none). `bits` and `weight` are a
    pseudo-label's."""

    image_id: str
    image: bytes
    mask: bytes | None
    image_b: bytes | None
    bits: bytes | None
    weight: float | None
    position: int
    focus: int


@dataclass(frozen=True)
class Decoder:
    """Row -> crop, seeded by the row's place: a pure function, the same wherever it runs."""

    transform: WeakTransform
    classes: ClassList
    seed: int
    stream_key: int

    def __call__(self, row: Encoded) -> Sample:
        """Raises InputError for a damaged row: it does not decode, its mask has another size or an id that is no class."""
        rng = np.random.default_rng([self.seed, self.stream_key, row.position])
        sample = self.transform(row.image, row.mask, rng, row.focus if row.focus >= 0 else None, image_id=row.image_id,
                                image_b_bytes=row.image_b, bits_bytes=row.bits)
        if sample.labels is not None:
            bad_HW = (sample.labels >= self.classes.num_classes) & (sample.labels != IGNORE)
            if bad_HW.any():
                raise InputError(f"image_id {row.image_id!r}: its mask holds id {sample.labels[bad_HW].min()}, the classes of "
                                 f"'{self.classes.name}' are 0 to {self.classes.num_classes - 1}; pack it again")
        return sample

    def blank(self) -> Sample:
        """What stands in a damaged row's place: padding."""
        crop = self.transform.crop
        return Sample(np.zeros((3 * self.transform.dates, *crop), np.uint8), None, np.zeros(crop, bool))


@dataclass(frozen=True)
class Decoded:
    """What a Ray task gives back: `image` uint8 [n, 3 x dates, H, W], `labels` uint8 [n, H, W], `valid` bool [n, H, W],
    `changes` uint8 [n, L, H, W], and what is wrong with each row (None: nothing)."""

    image: UInt8
    labels: UInt8
    changes: UInt8
    valid: Any
    damage: list[str | None]


def decode_rows(decoder: Decoder, rows: Sequence[Encoded]) -> Decoded:
    """The body of a Ray task."""
    crop, channels = decoder.transform.crop, 3 * decoder.transform.dates
    found = Decoded(np.empty((len(rows), channels, *crop), np.uint8), np.full((len(rows), *crop), IGNORE, np.uint8),
                    np.zeros((len(rows), decoder.transform.planes, *crop), np.uint8), np.empty((len(rows), *crop), bool),
                    [None] * len(rows))
    for i, row in enumerate(rows):
        try:
            sample = decoder(row)
        except InputError as error:
            sample, found.damage[i] = decoder.blank(), str(error)
        found.image[i], found.valid[i] = sample.image, sample.valid
        if sample.labels is not None:
            found.labels[i] = sample.labels
        if sample.changes is not None:
            found.changes[i] = sample.changes
    return found


class RayDecoder:
    """Decodes rows in Ray tasks of one CPU each, spread over the nodes. `decode` may be called by several threads."""

    def __init__(self, decoder: Decoder) -> None:
        import ray

        self._decoder = ray.put(decoder)
        self._task = ray.remote(decode_rows).options(num_cpus=1, scheduling_strategy="SPREAD")

    def decode(self, rows: Sequence[Encoded]) -> Decoded:
        import ray

        found: Decoded = ray.get(self._task.remote(self._decoder, rows))
        return found

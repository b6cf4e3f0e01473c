"""The built-in demo: labelled clean scenes, unlabelled real-looking ones, and both labelled for evaluation."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ecocseg.data import demo
from ecocseg.data.shards import Manifest, Record, write_shards
from ecocseg.storage import Storage, join

Parts = dict[str, tuple[demo.Domain, int, int, bool]]
PARTS: Parts = {
    "source": ("source", 0, 400, True),
    "target": ("target", 0, 400, False),
    "target_eval": ("target", 100_000, 100, True),
    "source_eval": ("source", 100_000, 60, True),
}
"""Part: domain, index of its first scene, number of scenes, with masks. Without the first part, the set is not whole."""
SSL_PARTS: Parts = {
    "labeled": ("target", 200_000, 24, True),
    "unlabeled": ("target", 0, 400, False),
    "eval": ("target", 100_000, 100, True),
}
"""The same of one domain, few of its scenes labelled."""


def encode_png(mask_HW: np.ndarray) -> bytes:
    """An 8-bit PNG of class ids."""
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def encode_jpeg(image_HW3: np.ndarray, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def records(part: str, count: int | None = None, seed: int = 0, parts: Parts = PARTS) -> Iterator[Record]:
    """The scenes of one part, encoded."""
    domain, first, default, labeled = parts[part]
    for index in range(first, first + (count or default)):
        image, mask = demo.render(index, domain, seed)
        yield Record(f"{domain}-{index:06d}", encode_jpeg(image), encode_png(mask) if labeled else None, group=domain,
                     index=index)


def prepare(root: str, parts: Parts = PARTS, *, counts: dict[str, int] | None = None, seed: int = 0,
            storage: Storage | None = None) -> dict[str, Manifest]:
    """Write all parts as shards under `root`; `counts` replaces the number of scenes of some.

    The first comes last: where it is, the others are.
    """
    return {part: write_shards(records(part, (counts or {}).get(part), seed, parts), join(root, part), dataset=f"demo/{part}",
                               classes=demo.CLASSES, storage=storage, options={"source": "demo", "seed": seed})
            for part in reversed(parts)}

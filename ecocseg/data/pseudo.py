"""Pseudo-labels in shards: what their columns hold, and whether a run can learn them.

The mask holds the guessed classes. ECOC's bits are kept as those that differ from the codeword of that class: hardly any
bit is set, and the whole compresses to little. Legend: L planes of 8 bits, H W pixels.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from ecocseg.errors import InputError

if TYPE_CHECKING:
    from ecocseg.data.shards import Manifest

OPTION = "pseudo_labels"
"""Of a manifest: coding, codebook hash, number of bits, checkpoint, thresholds and how it predicted."""
COLUMNS = ("bits", "weight")
"""What a run reads of such shards beside image and mask."""


def encode_mask(labels_HW: NDArray[np.uint8]) -> bytes:
    """An 8-bit PNG of class ids, packed fast."""
    buffer = io.BytesIO()
    Image.fromarray(labels_HW).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def encode_bits(changes_LHW: NDArray[np.uint8]) -> bytes:
    """Column `bits`: the planes one after another, zstd."""
    return pa.compress(np.ascontiguousarray(changes_LHW).tobytes(), codec="zstd", asbytes=True)


def decode_bits(data: bytes, shape: tuple[int, int, int], image_id: str = "") -> NDArray[np.uint8]:
    """The planes of `encode_bits`. Shape: uint8 [L, H, W].

    Raises:
        InputError: naming `image_id` if they do not decode to this shape.
    """
    size = int(np.prod(shape))
    try:
        plain = pa.Codec("zstd").decompress(data, decompressed_size=size, asbytes=True)
        return np.frombuffer(plain, np.uint8).reshape(shape)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"image_id {image_id!r}: its bits do not decode ({error}); label it again") from None


def num_planes(manifest: Manifest) -> int | None:
    """Planes of 8 bits in each row; 0 for one-hot, None for shards without pseudo-labels."""
    told = manifest.options.get(OPTION)
    return None if told is None else (int(told["bits"] or 0) + 7) // 8


def check_codebook(manifest: Manifest, codebook: str | None, key: str) -> None:
    """Refuse pseudo-labels whose bits mean something else; shards without any pass.

    Args:
        codebook: hash of the run's, None for one-hot.

    Raises:
        InputError: naming both codebooks and the remedy.
    """
    told = manifest.options.get(OPTION)
    if told is None or told["codebook"] == codebook:
        return
    names = [digest[:12] if digest else "one-hot, none" for digest in (told["codebook"], codebook)]
    raise InputError(f"{key}: the pseudo-labels in {manifest.url} are of another codebook ({names[0]}, this run has "
                     f"{names[1]}); label the pool with a checkpoint of this coding (jobs/pseudo_label.py), or give coding.* "
                     "of the one that labelled it (its run's codebook.json as coding.codebook.path)")

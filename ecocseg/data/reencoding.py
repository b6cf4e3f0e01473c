"""Images made smaller on the way into shards: fewer pixels, or a JPEG in place of a PNG."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from ecocseg.data.checks import DECODING_ERRORS, check_mask, decode_ids
from ecocseg.data.classes import ClassList
from ecocseg.data.shards import Record
from ecocseg.errors import InputError

PNG_LEVEL = 6
FOUND_JPEG_QUALITY = 95
"""Of a JPEG that is reduced when no quality is given."""


def changed(record: Record, classes: ClassList, max_side: int | None, jpeg_quality: int | None,
            where: str) -> tuple[Record, int]:
    """A record whose images have at most `max_side` pixels a side and are JPEGs of `jpeg_quality`, and how many pixels its
    image had before. With None for both, no image changes.

    Images are reduced bicubically over all the pixels that become one, masks by taking the nearest pixel's id.

    Raises:
        InputError: when an image does not decode or cannot become a JPEG, or a mask has another size or unknown ids.
    """
    image = _decoded(record.image, where)
    width, height = image.size
    factor = min(1.0, (max_side or max(image.size)) / max(image.size))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    mask, image_b = record.mask, record.image_b
    if mask is not None and factor < 1:
        ids_HW = decode_ids(mask, where)
        check_mask(ids_HW, (height, width), classes, where)  # before: two that differ could become alike
        mask = _saved(Image.fromarray(ids_HW).resize(size, Image.Resampling.NEAREST), "PNG", None)
    if image_b is not None:
        second = _decoded(image_b, f"{where}: image_b")
        if second.size != image.size:
            raise InputError(f"{where}: the two images differ in size; give two of one size")
        image_b = _encoded(second, image_b, size, jpeg_quality, f"{where}: image_b")
    data = _encoded(image, record.image, size, jpeg_quality, where)
    return replace(record, image=data, mask=mask, image_b=image_b), width * height


def _decoded(data: bytes, where: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except DECODING_ERRORS as error:
        raise InputError(f"{where}: the image does not decode ({error}); replace or remove it") from None
    return image


def _encoded(image: Image.Image, data: bytes, size: tuple[int, int], quality: int | None, where: str) -> bytes:
    """An image in another size or as a JPEG; its own bytes when neither is asked."""
    if size == image.size and quality is None:
        return data
    kind = "JPEG" if quality is not None else str(image.format)
    if image.mode.startswith("I"):
        if quality is not None:
            raise InputError(f"{where}: an image of 16 bits cannot become a JPEG; pack without --jpeg-quality")
        if size == image.size:
            return data
        grey = Image.fromarray(np.asarray(image).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        return _saved(Image.fromarray(np.clip(np.rint(np.asarray(grey)), 0, 65535).astype(np.uint16)), "PNG", None)
    if image.mode not in ("L", "RGB", "CMYK") and not (image.mode in ("LA", "RGBA") and kind == "PNG"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return _saved(image, kind, quality)


def _saved(image: Image.Image, kind: str, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, "JPEG", quality=FOUND_JPEG_QUALITY if quality is None else quality, optimize=True)
    else:
        image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()

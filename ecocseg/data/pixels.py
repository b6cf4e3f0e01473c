"""Pixels of each class in every row of a set, in one file beside its manifest, so that rare class sampling starts with one
request however many shards there are.

The counts are in the shards too, which are the truth: a set without the file, or with one that is damaged, is read from
there.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ecocseg.data.shards import Manifest, PixelFile, read_metadata
from ecocseg.errors import InputError
from ecocseg.storage import Storage, join

NAME = "class_pixels.arrow"
"""Not .parquet: whoever reads a set as *.parquet finds its shards alone."""


def with_pixel_file(manifest: Manifest, storage: Storage) -> Manifest:
    """Write the file for a set whose shards are there and whose manifest is not yet; returns the manifest that names it."""
    if not manifest.num_labeled:
        storage.delete(join(manifest.url, NAME))
        return manifest
    sink, table = io.BytesIO(), read_metadata(manifest, ["class_pixels"], storage).combine_chunks()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    storage.write_bytes(join(manifest.url, NAME), data)
    return replace(manifest, pixel_file=PixelFile(NAME, len(data), hashlib.sha256(data).hexdigest()))


def read_class_pixels(manifest: Manifest, storage: Storage) -> NDArray[np.int64]:
    """Pixel counts [rows, classes], in the order of the rows; rows without a mask count nothing.

    Raises:
        InputError: when neither the file nor the shards can be read.
    """
    column = _from_file(manifest, storage)
    if column is None:
        column = read_metadata(manifest, ["class_pixels"], storage).column("class_pixels")
    return class_pixel_array(column, manifest.classes.num_classes)


def _from_file(manifest: Manifest, storage: Storage) -> pa.ChunkedArray | None:
    file = manifest.pixel_file
    if file is None:
        return None
    try:
        data = storage.read_bytes(join(manifest.url, file.name))
    except (FileNotFoundError, InputError):
        return None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        return None
    column = pa.ipc.open_file(pa.BufferReader(data)).read_all().column("class_pixels")
    return column if len(column) == manifest.num_rows else None


def class_pixel_array(column: pa.ChunkedArray, num_classes: int) -> NDArray[np.int64]:
    """Lists of pixel counts as int64 [n, N]; rows without a mask count nothing."""
    pixels = np.zeros((len(column), num_classes), np.int64)
    labelled = np.asarray(column.is_valid())
    values = column.drop_null().combine_chunks().flatten()
    pixels[labelled] = np.asarray(values, np.int64).reshape(-1, num_classes)
    return pixels

"""Shards: Parquet files of encoded images and masks, and the manifest that lists them.

Images stay the bytes they were found as; masks are 8-bit PNGs of train ids (255 ignored), checked when they are packed.
`manifest.json` is written last, so a folder that has one is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ecocseg.ahead import in_threads
from ecocseg.data.checks import check_mask, decode_ids, image_size
from ecocseg.data.classes import ClassList
from ecocseg.errors import InputError
from ecocseg.storage import Storage, join, reason

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"(\.\./(?!\.)[^/]+/)?(?!\.)[^/]+")
"""Of a shard in the manifest's folder or one beside it, and nowhere else."""
METADATA_THREADS = 16
"""A bucket takes its time to answer; there is little to compute."""
ROW_GROUP_BYTES = 8 << 20
"""Image bytes from which a row group is closed: it is what one read fetches."""
SCHEMA = pa.schema([
    ("image_id", pa.string()), ("image", pa.binary()), ("mask", pa.binary()), ("image_b", pa.binary()),
    ("height", pa.int32()), ("width", pa.int32()), ("class_pixels", pa.list_(pa.int64())), ("group", pa.string()),
    ("index", pa.int32())])
PSEUDO_SCHEMA = pa.schema([*SCHEMA, ("bits", pa.binary()), ("weight", pa.float32()), ("stability", pa.float32())])
"""Of pseudo-labelled shards, whose manifest has the option `pseudo_labels` (see data/pseudo.py). The mask is the guess;
`bits` are those that differ from its codewords', `weight` is the image's, `stability` that of its prediction."""


@dataclass(frozen=True)
class Record:
    """One image to be packed: encoded bytes (JPEG, PNG), and what is known of it."""

    image_id: str
    image: bytes
    mask: bytes | None = None
    image_b: bytes | None = None
    group: str | None = None
    index: int | None = None


@dataclass(frozen=True)
class ShardFile:
    name: str
    """In the folder of the manifest; or, as ../labeled/shard-00000.parquet, in one beside it."""
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""


@dataclass(frozen=True)
class PixelFile:
    """Of the class pixels of all rows, beside the manifest; see data/pixels.py."""

    name: str
    bytes: int
    sha256: str


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds."""

    url: str
    dataset: str
    classes: ClassList
    num_rows: int
    num_labeled: int
    files: tuple[ShardFile, ...]
    class_pixels: tuple[int, ...]
    format_version: int = FORMAT_VERSION
    options: dict[str, Any] = field(default_factory=dict)
    """How the shards were made: source, selection, seed."""
    pixel_file: PixelFile | None = None

    @property
    def hash(self) -> str:
        """sha256 over classes and shard contents, in hex; independent of where the shards lie."""
        content = [self.dataset, self.classes.hash, *(f"{f.name} {f.rows} {f.sha256}" for f in self.files)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def url_of(self, file: ShardFile) -> str:
        """Where a shard of this manifest lies."""
        scheme, separator, path = join(self.url, file.name).rpartition("://")
        return scheme + separator + posixpath.normpath(path)

    def row_group_table(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(file, row group in it, rows) of every row group, in order. Shape: [G] each."""
        table = [(f, g, rows) for f, file in enumerate(self.files) for g, rows in enumerate(file.row_groups)]
        columns = np.array(table, dtype=np.int64).reshape(-1, 3)
        return columns[:, 0], columns[:, 1], columns[:, 2]

    def to_json(self) -> bytes:
        plain = {
            "format_version": self.format_version, "dataset": self.dataset, "hash": self.hash,
            "classes": {"name": self.classes.name, "names": self.classes.names, "palette": self.classes.palette,
                        "thing_ids": self.classes.thing_ids},
            "num_rows": self.num_rows, "num_labeled": self.num_labeled, "class_pixels": self.class_pixels,
            "options": self.options, "class_pixels_file": self.pixel_file and vars(self.pixel_file),
            "files": [vars(f) for f in self.files]}
        return json.dumps(plain, indent=1).encode()


def inspect_record(record: Record, classes: ClassList) -> tuple[dict[str, Any], NDArray[np.int64] | None]:
    """A shard row of a record, and its class pixels.

    Raises:
        InputError: when its image or mask does not decode or does not fit, naming the image.
    """
    width, height = image_size(record.image, f"{record.image_id}: the image")
    if record.image_b is not None and image_size(record.image_b, f"{record.image_id}: image_b") != (width, height):
        raise InputError(f"{record.image_id}: the two images differ in size; give two of one size")
    counts = None
    if record.mask is not None:
        counts = check_mask(decode_ids(record.mask, record.image_id), (height, width), classes, record.image_id)
    row = {"image_id": record.image_id, "image": record.image, "mask": record.mask, "image_b": record.image_b,
           "height": height, "width": width, "class_pixels": None if counts is None else counts.tolist(),
           "group": record.group, "index": record.index}
    return row, counts


class ShardBuilder:
    """A shard in memory: rows are collected into row groups of at most `group_rows` rows and about 8 MiB."""

    def __init__(self, group_rows: int, schema: pa.Schema = SCHEMA) -> None:
        self.group_rows, self.schema = group_rows, schema
        self._rows: list[dict[str, Any]] = []
        self._waiting = 0
        self._groups: list[int] = []
        self._sink = io.BytesIO()
        # image bytes are compressed already; checksums, because a reader must notice damage in the middle of a run
        self._writer = pq.ParquetWriter(self._sink, schema, compression="none", use_dictionary=False,
                                        write_statistics=False, write_page_checksum=True)

    @property
    def num_bytes(self) -> int:
        """Bytes of the row groups that are full."""
        return self._sink.tell() if self._groups else 0

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._waiting += sum(len(row.get(column) or b"") for column in ("image", "mask", "image_b", "bits"))
        if len(self._rows) >= self.group_rows or self._waiting >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self.schema), row_group_size=len(self._rows))
            self._groups.append(len(self._rows))
        self._rows, self._waiting = [], 0

    def finish(self, number: int) -> tuple[bytes, ShardFile]:
        """The file of the shard, and what the manifest says of it."""
        self._flush()
        self._writer.close()
        data = self._sink.getvalue()
        return data, ShardFile(shard_name(number), sum(self._groups), len(data), hashlib.sha256(data).hexdigest(),
                               tuple(self._groups))


def write_shards(records: Iterable[Record], destination: str, *, dataset: str, classes: ClassList,
                 shard_bytes: int = 64 << 20, row_group_rows: int = 32, storage: Storage | None = None,
                 options: dict[str, Any] | None = None) -> Manifest:
    """Pack records, one after the other, into shards of about `shard_bytes` and row groups of at most `row_group_rows` rows.
    `packing.pack` packs the files of a data set in parallel.

    Raises:
        InputError: for a record whose mask has unknown ids or another size, or that does not decode, for two records of
            one image_id, and for no records. There is no manifest then.
    """
    storage = storage or Storage()
    storage.delete(join(destination, MANIFEST))  # first: a folder being written is not whole
    files: list[ShardFile] = []
    totals = np.zeros(classes.num_classes, dtype=np.int64)
    labeled = 0
    seen: set[str] = set()
    builder: ShardBuilder | None = None

    def write(full: ShardBuilder) -> None:
        data, file = full.finish(len(files))
        storage.write_bytes(join(destination, file.name), data)
        files.append(file)

    for record in records:
        if record.image_id in seen:
            raise InputError(f"image_id '{record.image_id}' comes twice; give each image a name of its own")
        seen.add(record.image_id)
        row, counts = inspect_record(record, classes)
        builder = builder or ShardBuilder(row_group_rows)
        builder.add(row)
        if builder.num_bytes >= shard_bytes:
            write(builder)
            builder = None
        if counts is not None:
            totals += counts
            labeled += 1
    if builder is not None:
        write(builder)
    if not files:
        raise InputError(f"{destination}: there is no image to pack; check the source folder and the selection")
    manifest = Manifest(destination, dataset, classes, sum(f.rows for f in files), labeled, tuple(files),
                        tuple(int(t) for t in totals), options=options or {})
    written = {file.name for file in manifest.files}
    for name in storage.list_files(destination):  # shards of a longer set that was here before
        if name.startswith("shard-") and name.endswith(".parquet") and name not in written:
            storage.delete(join(destination, name))
    from ecocseg.data.pixels import with_pixel_file

    manifest = with_pixel_file(manifest, storage)
    storage.write_bytes(join(destination, MANIFEST), manifest.to_json())
    return manifest


def read_manifest(url: str, storage: Storage | None = None) -> Manifest:
    """Read the manifest of the shards at a URL.

    Raises:
        InputError: when there is none, it is damaged or of another version, or its storage cannot be read.
    """
    storage = storage or Storage()
    where = join(url, MANIFEST)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        raise InputError(f"no shards at {url}: {MANIFEST} is missing; jobs/prepare_shards.py makes them") from None
    try:
        plain = json.loads(data)
    except ValueError:
        raise InputError(f"{where} is damaged (not JSON); pack the shards anew") from None
    try:
        if plain["format_version"] != FORMAT_VERSION:
            raise InputError(f"{where} has format {plain['format_version']}, this version reads {FORMAT_VERSION}; "
                             "pack the shards anew")
        c = plain["classes"]
        classes = ClassList(c["name"], tuple(c["names"]), tuple(tuple(rgb) for rgb in c["palette"]), tuple(c["thing_ids"]))
        files = tuple(ShardFile(f["name"], f["rows"], f["bytes"], f["sha256"], tuple(f["row_groups"]))
                      for f in plain["files"])
        pixel_file = plain.get("class_pixels_file")  # older sets have none
        manifest = Manifest(url, plain["dataset"], classes, plain["num_rows"], plain["num_labeled"], files,
                            tuple(plain["class_pixels"]), plain["format_version"], plain["options"],
                            pixel_file and PixelFile(pixel_file["name"], pixel_file["bytes"], pixel_file["sha256"]))
        if manifest.hash != plain["hash"] or not _adds_up(manifest):
            raise InputError(f"{where} was changed: its hash and counts are not those of its content; pack the shards anew")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is damaged ({error!r}); pack the shards anew") from None
    return manifest


def _adds_up(manifest: Manifest) -> bool:
    """Whether the counts of a manifest fit each other; its hash covers classes and shards alone."""
    classes = manifest.classes
    return (manifest.num_rows == sum(f.rows for f in manifest.files) and 0 <= manifest.num_labeled <= manifest.num_rows
            and all(f.rows == sum(f.row_groups) for f in manifest.files)
            and all(SHARD_NAME.fullmatch(f.name) for f in manifest.files)
            and (manifest.pixel_file is None or bool(SHARD_NAME.fullmatch(manifest.pixel_file.name)))
            and len(manifest.class_pixels) == len(classes.palette) == classes.num_classes)


def file_problems(manifest: Manifest, storage: Storage | None = None, checksums: bool = False) -> dict[str, str]:
    """What is wrong with lost and truncated shards, and with `checksums` changed ones, by shard name."""
    storage = storage or Storage()

    def problem(file: ShardFile) -> str | None:
        where = manifest.url_of(file)
        size = storage.size(where)
        if size is None:
            return f"{where} is missing"
        if size != file.bytes:
            return f"{where} has {size} bytes, the manifest says {file.bytes}"
        if checksums and hashlib.sha256(storage.read_bytes(where)).hexdigest() != file.sha256:
            return f"{where} was changed: its content is not what was packed"
        return None

    with ThreadPoolExecutor(2 if checksums else 16) as pool:  # a bucket takes its time to answer, a shard memory to read
        found = zip(manifest.files, pool.map(problem, manifest.files), strict=True)
    return {file.name: text for file, text in found if text}


def check_files(manifest: Manifest, storage: Storage | None = None, checksums: bool = False) -> None:
    """Look whether every shard is there with its size, and with `checksums` its content.

    Raises:
        InputError: naming every lost, truncated or changed shard.
    """
    problems = file_problems(manifest, storage, checksums)
    if problems:
        raise InputError("damaged shards; restore them or pack them anew:\n  " + "\n  ".join(problems.values()))


def _parquet(manifest: Manifest, file_index: int, storage: Storage | None) -> pq.ParquetFile:
    where = manifest.url_of(manifest.files[file_index])
    try:
        return pq.ParquetFile((storage or Storage()).open_file(where), pre_buffer=True, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise _shard_error(where, error) from None


def _shard_error(where: str, error: Exception) -> InputError:
    return InputError(f"shard {where} cannot be read ({reason(error)}); restore it or pack the shards anew")


def read_row_group(manifest: Manifest, file_index: int, group_index: int, columns: Sequence[str],
                   storage: Storage | None = None) -> pa.Table:
    """Some columns of one row group.

    Raises:
        InputError: when the shard is missing or damaged, naming it.
    """
    file = _parquet(manifest, file_index, storage)
    try:
        return file.read_row_group(group_index, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise _shard_error(manifest.url_of(manifest.files[file_index]), error) from None


def read_metadata(manifest: Manifest, columns: Sequence[str] = ("class_pixels",), storage: Storage | None = None) -> pa.Table:
    """Metadata columns of all rows in order; images are not read."""
    def read(index: int) -> pa.Table:
        try:
            return _parquet(manifest, index, storage).read(columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise _shard_error(manifest.url_of(manifest.files[index]), error) from None

    with ThreadPoolExecutor(METADATA_THREADS) as pool:
        return pa.concat_tables(list(pool.map(read, range(len(manifest.files)))))


def iter_rows(manifest: Manifest, rank: int = 0, world: int = 1,
              columns: Sequence[str] = ("image_id", "image", "mask"),
              storage: Storage | None = None) -> Iterator[dict[str, Any]]:
    """Rows of one of `world` ranks, as dicts; over all ranks, one after the other, they are all rows in order.

    A rank has a share of neighbouring rows, so it reads no row group but those its share lies in, and no shard twice; the
    next row group is read while the rows of one are used. Shares differ by one row at most.
    """
    first, last = rank * manifest.num_rows // world, (rank + 1) * manifest.num_rows // world
    wanted, begin = [], 0
    for f, g, rows in zip(*manifest.row_group_table(), strict=True):
        low, high = max(first - begin, 0), min(last - begin, int(rows))
        if low < high:
            wanted.append((int(f), int(g), low, high))
        begin += int(rows)
    opened: tuple[int, pq.ParquetFile] | None = None

    def read(what: tuple[int, int, int, int]) -> list[dict[str, Any]]:
        nonlocal opened
        number, group, low, high = what
        try:
            if opened is None or opened[0] != number:
                opened = number, _parquet(manifest, number, storage)
            return opened[1].read_row_group(group, columns=list(columns)).slice(low, high - low).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise _shard_error(manifest.url_of(manifest.files[number]), error) from None

    for rows in in_threads(read, wanted, threads=1):  # one thread: a Parquet file is read by one at a time
        yield from rows

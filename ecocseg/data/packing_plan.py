"""Which entries of a raw data set go into which shard: from names and sizes alone, the same in every try."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ecocseg.data.reencoding import changed
from ecocseg.data.sources.pairs import Pair, Source
from ecocseg.errors import InputError
from ecocseg.storage import Storage, is_remote, join

NOTES = ".packing"
"""Folder of what a try leaves for the next one, gone when the manifest is there."""
PLAN = "plan.json"
VERSION = 1
"""Of what a shard is made of; another one makes shards anew."""
STAT_THREADS = 16
SAMPLE = 16
"""Records that are made to estimate how large they are, when file sizes do not say it."""


@dataclass(frozen=True)
class Settings:
    """How shards are made."""

    shard_bytes: int = 64 << 20
    """Bytes of a shard, about."""
    row_group_rows: int = 32
    """Most images of a row group; of about 8 MiB it is closed anyway."""
    max_side: int | None = None
    """Pixels of the longer side to which larger images are reduced; None = as they are."""
    jpeg_quality: int | None = None
    """Quality of JPEGs that all images become; None = as they are."""

    @property
    def change_images(self) -> bool:
        return self.max_side is not None or self.jpeg_quality is not None


@dataclass(frozen=True)
class Shard:
    """What goes into one shard."""

    number: int
    entries: tuple[Pair, ...]
    fingerprint: str
    """sha256 over all that its content follows from, in hex; files by their sizes and times."""


@dataclass(frozen=True)
class Part:
    """A set of shards to be made: a source, a place, and the plan."""

    source: Source
    destination: str
    storage: Storage
    settings: Settings
    shards: tuple[Shard, ...]
    num_bytes: int
    """Of the files that are read; 0 when they lie in a bucket."""
    selection: str
    """Hash of the entries' names and the settings: plans of one selection have the same shards."""
    refers_to: Part | None = None
    """A part in a folder beside this one whose shards belong to this set as well."""

    @property
    def hash(self) -> str:
        """sha256 of all that the set follows from, in hex."""
        other = self.refers_to.hash if self.refers_to else ""
        return _sha256([other, *(shard.fingerprint for shard in self.shards)])


def plan(source: Source, destination: str, settings: Settings | None = None, *, storage: Storage | None = None,
         refers_to: Part | None = None) -> Part:
    """Say which entries go into which shard. Files are looked at, not read, unless their sizes do not say how large the
    records are: because images are to be changed, lie in a bucket, or are parts of one file.

    Raises:
        InputError: when two entries have one image id.
    """
    settings, storage = settings or Settings(), storage or Storage()
    twice = [image_id for image_id, count in Counter(entry.image_id for entry in source.entries).items() if count > 1]
    if twice:
        raise InputError(f"{len(twice)} image id(s) come twice, first '{twice[0]}'; give each image a name of its own"
                         + (f"; {source.remedy}" if source.remedy else ""))
    destination = destination if is_remote(destination) else os.path.abspath(os.path.expanduser(destination))
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        stats = list(pool.map(_stat, source.entries))
    how = _sha256([str(VERSION), source.dataset, json.dumps(asdict(source.classes), sort_keys=True),
                   json.dumps(dict(source.options), sort_keys=True), json.dumps(asdict(settings), sort_keys=True)])
    selection = _sha256([how, *(entry.image_id for entry in source.entries)])
    rows = _rows_before(join(destination, NOTES, PLAN), selection, storage)
    if rows is None:
        rows = _rows(_record_sizes(source, stats, settings), settings.shard_bytes)
    shards, first = [], 0
    for number, count in enumerate(rows):
        part = slice(first, first + count)
        facts = [f"{entry!r} {stat}" for entry, stat in zip(source.entries[part], stats[part], strict=True)]
        shards.append(Shard(number, tuple(source.entries[part]), _sha256([how, str(number), *facts])))
        first += count
    return Part(source, destination, storage, settings, tuple(shards), sum(size for files in stats for size, _ in files),
                selection, refers_to)


def _sha256(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stat(entry: Pair) -> list[tuple[int, int]]:
    """(bytes, time of change in ns) of an entry's files; zeros where there is no local file, as in a bucket."""
    found = []
    for path in (entry.image, entry.mask, entry.image_b):
        if path is not None:
            try:
                stat = os.stat(path)
                found.append((stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append((0, 0))
    return found


def _rows_before(where: str, selection: str, storage: Storage) -> list[int] | None:
    """Entries of each shard as an earlier try had them: a file that was repaired changes its size, and would move others."""
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        return None
    try:
        plain = json.loads(data)
        return plain["rows"] if plain["selection"] == selection else None
    except (ValueError, KeyError, TypeError):
        return None


def _rows(sizes: NDArray[np.float64], shard_bytes: int) -> list[int]:
    """Entries of each shard: one that begins before a multiple of `shard_bytes` is in the shard that ends there."""
    begin = np.cumsum(sizes) - sizes
    return np.unique(begin // shard_bytes, return_counts=True)[1].tolist()


def _record_sizes(source: Source, stats: Sequence[list[tuple[int, int]]], settings: Settings) -> NDArray[np.float64]:
    """Bytes of each record, estimated. Shape: [entries]."""
    sizes = np.array([sum(size for size, _ in files) for files in stats], np.float64)
    known = bool(sizes.all())
    apart = len({entry.image for entry in source.entries}) == len(source.entries)
    if (known and apart and not settings.change_images) or not len(sizes):
        return sizes
    files = records = 0.0
    chosen = np.unique(np.linspace(0, len(sizes) - 1, SAMPLE).astype(int)).tolist()
    seen = 0
    for index in chosen:
        try:
            record = source.read(source.entries[index])
            if settings.change_images:
                record, _ = changed(record, source.classes, settings.max_side, settings.jpeg_quality, "")
        except InputError:
            continue  # named when it is packed
        seen += 1
        files += sizes[index]
        records += sum(len(data or b"") for data in (record.image, record.mask, record.image_b))
    if not known:
        return np.full(len(sizes), records / max(1, seen))
    return sizes * (records / files if files else 1.0)

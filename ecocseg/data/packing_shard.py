"""One shard: its entries read, checked, changed as asked, and written; and the note that says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecocseg.data.classes import ClassList
from ecocseg.data.packing_plan import NOTES, STAT_THREADS, Part, Settings, Shard
from ecocseg.data.reencoding import changed
from ecocseg.data.shards import Record, ShardBuilder, ShardFile, inspect_record
from ecocseg.data.sources.pairs import Pair
from ecocseg.errors import InputError
from ecocseg.storage import Storage, join


@dataclass(frozen=True)
class Packed:
    """What a task says of its shard; the note holds the same."""

    number: int
    fingerprint: str
    file: ShardFile | None
    """None when it was not written: because of problems, or as nothing was left."""
    labeled: int = 0
    class_pixels: tuple[int, ...] = ()
    pixels: int = 0
    found_pixels: int = 0
    """Pixels of the images before they were reduced."""
    problems: tuple[tuple[str, str], ...] = ()
    """(image id, what is wrong) of entries that are not in the shard."""

    @property
    def num_bytes(self) -> int:
        return self.file.bytes if self.file else 0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> Packed:
        plain = json.loads(data)
        file = plain.pop("file")
        if file is not None:
            file = ShardFile(**{**file, "row_groups": tuple(file["row_groups"])})
        problems = tuple((image_id, text) for image_id, text in plain.pop("problems"))
        return Packed(**{**plain, "class_pixels": tuple(plain["class_pixels"])}, file=file, problems=problems)


@dataclass(frozen=True)
class Task:
    """What a shard's task needs beside its entries; it pickles."""

    read: Callable[[Pair], Record]
    classes: ClassList
    settings: Settings
    destination: str
    storage: Storage
    skip_bad: bool
    threads: int


def task_of(part: Part, skip_bad: bool, threads: int) -> Task:
    return Task(part.source.read, part.source.classes, part.settings, part.destination, part.storage, skip_bad, threads)


def note_name(number: int) -> str:
    return f"shard-{number:05d}.json"


@dataclass(frozen=True)
class Row:
    """A row of a shard and what is counted of it; or what is wrong with its entry."""

    row: dict[str, Any] = field(default_factory=dict)
    counts: NDArray[np.int64] | None = None
    found_pixels: int = 0
    problem: str | None = None


def make_row(entry: Pair, task: Task) -> Row:
    try:
        record = task.read(entry)
        if record.image_id != entry.image_id:
            raise RuntimeError(f"the record is of '{record.image_id}'")
        where, settings, found_pixels = str(entry.image), task.settings, 0
        if settings.change_images:
            record, found_pixels = changed(record, task.classes, settings.max_side, settings.jpeg_quality, where)
        row, counts = inspect_record(replace(record, image_id=where), task.classes)
    except InputError as error:
        return Row(problem=str(error))
    except Exception as error:
        raise RuntimeError(f"packing '{entry.image_id}' from {entry.image}: {type(error).__name__}: {error}") from error
    row["image_id"] = entry.image_id
    return Row(row, counts, found_pixels or row["height"] * row["width"])


def pack_shard(shard: Shard, task: Task) -> Packed:
    """Read, check and write one shard, then its note. Without `skip_bad`, a shard with problems is not written.

    Raises:
        InputError: when the destination cannot be written.
    """
    note = join(task.destination, NOTES, note_name(shard.number))
    task.storage.delete(note)  # first: what is there may be of other settings, and is no longer done when it is replaced
    with ThreadPoolExecutor(task.threads) as pool:
        rows = list(pool.map(partial(make_row, task=task), shard.entries))
    problems = tuple((entry.image_id, row.problem) for entry, row in zip(shard.entries, rows, strict=True) if row.problem)
    good = [row for row in rows if not row.problem]
    if problems and not task.skip_bad:
        return Packed(shard.number, shard.fingerprint, None, problems=problems)
    file = None
    if good:
        builder = ShardBuilder(task.settings.row_group_rows)
        for row in good:
            builder.add(row.row)
        data, file = builder.finish(shard.number)
        task.storage.write_bytes(join(task.destination, file.name), data)
    counts = [row.counts for row in good if row.counts is not None]
    totals = np.sum(counts, axis=0) if counts else np.zeros(task.classes.num_classes, np.int64)
    packed = Packed(shard.number, shard.fingerprint, file, len(counts), tuple(int(total) for total in totals),
                    sum(row.row["height"] * row.row["width"] for row in good), sum(row.found_pixels for row in good), problems)
    task.storage.write_bytes(note, packed.to_json())
    return packed


def done_before(shards: Sequence[Shard], destination: str, storage: Storage, skip_bad: bool) -> dict[int, Packed]:
    """Shards of the plan that an earlier try finished, by number."""
    names = set(storage.list_files(join(destination, NOTES)))

    def look(shard: Shard) -> Packed | None:
        if note_name(shard.number) not in names:
            return None
        try:
            packed = Packed.from_json(storage.read_bytes(join(destination, NOTES, note_name(shard.number))))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        there = packed.file is None or storage.size(join(destination, packed.file.name)) == packed.file.bytes
        return packed if packed.fingerprint == shard.fingerprint and there and (skip_bad or not packed.problems) else None

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return {packed.number: packed for packed in pool.map(look, shards) if packed is not None}

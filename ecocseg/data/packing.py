"""Raw data sets into shards: planned, packed one shard a task, gone on with after any end.

A shard is done when the note beside it (in .packing/) says so and fits the plan: the note is deleted before the shard is
written and comes after it. The manifest comes last, so a folder that has one is whole.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from ecocseg.data.packing_plan import NOTES, PLAN, Part, Settings, Shard, plan
from ecocseg.data.packing_shard import Packed, Task, done_before, make_row, pack_shard, task_of
from ecocseg.data.pixels import with_pixel_file
from ecocseg.data.shards import MANIFEST, Manifest, check_files, file_problems, read_manifest
from ecocseg.data.sources.pairs import Source
from ecocseg.errors import InputError
from ecocseg.storage import Storage, join

SKIPPED = "skipped.txt"
RAY_IMAGES, RAY_SHARDS = 512, 4
"""More images, and as many shards, are packed by Ray: to start it takes longer than to pack fewer."""
TASK_THREADS = 2
"""Threads of a Ray task of one CPU: one waits for files while the other decodes."""
SHOWN_PROBLEMS = 20

Progress = Callable[[int, int, int], None]
"""Called with images packed, images in all, bytes written."""
Job = tuple[int, Shard]
"""Index of a part, and a shard of it."""


class SourceProblems(InputError):
    """Files that cannot be packed; `problems` has a line for each."""

    def __init__(self, problems: Sequence[str], then: str) -> None:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        lines = "\n  ".join([*problems[:SHOWN_PROBLEMS], *more])
        super().__init__(f"{len(problems)} problem(s) in the source:\n  {lines}\n{then}")
        self.problems = list(problems)


def _serially(jobs: Sequence[Job], tasks: Sequence[Task]) -> Iterator[tuple[int, Packed]]:
    for index, shard in jobs:
        yield index, pack_shard(shard, tasks[index])


def _block(block: Any, tasks: Sequence[Task]) -> Any:
    """Ray Data task, for one shard. Bad input comes back as a row: Ray Data drops the type."""
    rows = []
    for job in block.column("job").to_pylist():
        index, shard = pickle.loads(job)
        try:
            rows.append({"part": index, "packed": pack_shard(shard, tasks[index]).to_json(), "error": ""})
        except InputError as error:
            rows.append({"part": index, "packed": b"", "error": str(error)})
    return pa.Table.from_pylist(rows)


def _in_parallel(jobs: Sequence[Job], tasks: Sequence[Task], workers: int | None) -> Iterator[tuple[int, Packed]]:
    import ray.data

    if not ray.is_initialized():
        from ecocseg.launch import start_ray

        start_ray()
    dataset = ray.data.from_items([{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=len(jobs)).map_batches(
        partial(_block, tasks=tasks), batch_size=None, batch_format="pyarrow", num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=workers))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():  # type: ignore[union-attr]
            if row["error"]:
                raise InputError(row["error"])
            yield row["part"], Packed.from_json(row["packed"])


def _use_ray(jobs: Sequence[Job], workers: int | None) -> bool:
    if workers is not None:
        return workers > 1 and len(jobs) > 1
    several = bool(os.environ.get("RAY_ADDRESS")) or _cores() > 1
    return several and len(jobs) >= RAY_SHARDS and sum(len(shard.entries) for _, shard in jobs) > RAY_IMAGES


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pack_parts(parts: Sequence[Part], *, workers: int | None = None, overwrite: bool = False, skip_bad: bool = False,
               progress: Progress | None = None) -> list[Manifest]:
    """Make the shards of all parts, then their manifests. A part that others refer to comes before them.

    What an earlier call finished is kept: whole parts, and shards whose files have not changed since.

    Args:
        workers: shards packed at once; 1 = in this process, None = in this process for little (`RAY_IMAGES`), else as
            many as there are CPUs in the cluster at RAY_ADDRESS, or in one started here.
        overwrite: replace sets that are there and were packed from something else.
        skip_bad: leave bad entries out, name them in the manifest and in skipped.txt.

    Raises:
        SourceProblems: naming all bad files; good shards are kept, there is no manifest.
        InputError: when a set is there, there is nothing to pack, or the destination cannot be written.
    """
    if not skip_bad:
        check_listing(parts, read_through=sum(len(part.source.entries) for part in parts) <= RAY_IMAGES)
    made = [_made_before(part, skip_bad) for part in parts]
    _clear(parts, made, overwrite)
    results: dict[int, dict[int, Packed]] = {}
    for index, part in enumerate(parts):
        if made[index] is None:
            results[index] = done_before(part.shards, part.destination, part.storage, skip_bad)
            plain = {"selection": part.selection, "rows": [len(shard.entries) for shard in part.shards]}
            part.storage.write_bytes(join(part.destination, NOTES, PLAN), json.dumps(plain).encode())
    _pack_missing(parts, results, workers, skip_bad, progress)
    if not skip_bad:
        _refuse_problems([packed for done in results.values() for _, packed in sorted(done.items())], parts)
    for index, done in results.items():
        part = parts[index]
        made[index] = _finish(part, done, made[parts.index(part.refers_to)] if part.refers_to else None)
    return [manifest for manifest in made if manifest is not None]


def _pack_missing(parts: Sequence[Part], results: dict[int, dict[int, Packed]], workers: int | None, skip_bad: bool,
                  progress: Progress | None) -> None:
    """Pack the shards that `results`, by index of the part and number of the shard, does not have yet, and add them."""
    jobs = [(index, shard) for index, done in results.items() for shard in parts[index].shards if shard.number not in done]
    in_parallel = _use_ray(jobs, workers)
    threads = TASK_THREADS if in_parallel else min(8, _cores())
    tasks = [task_of(part, skip_bad, threads) for part in parts]
    total = sum(len(parts[index].source.entries) for index in results)
    images = total - sum(len(shard.entries) for _, shard in jobs)
    written = sum(packed.num_bytes for done in results.values() for packed in done.values())
    if progress is not None:
        progress(images, total, written)
    for index, packed in _in_parallel(jobs, tasks, workers) if in_parallel else _serially(jobs, tasks):
        results[index][packed.number] = packed
        images, written = images + len(parts[index].shards[packed.number].entries), written + packed.num_bytes
        if progress is not None:
            progress(images, total, written)


def pack(source: Source, destination: str, *, shard_bytes: int = 64 << 20, row_group_rows: int = 32,
         storage: Storage | None = None, max_side: int | None = None, reencode: int | None = None,
         workers: int | None = None, overwrite: bool = False, skip_bad: bool = False,
         progress: Progress | None = None) -> Manifest:
    """Pack one source; `reencode` is the quality of JPEGs that all images become. See `pack_parts` and `Settings`."""
    part = plan(source, destination, Settings(shard_bytes, row_group_rows, max_side, reencode), storage=storage)
    return pack_parts([part], workers=workers, overwrite=overwrite, skip_bad=skip_bad, progress=progress)[0]


def check_listing(parts: Sequence[Part], read_through: bool) -> None:
    """See that all names fit. Files without a partner change what is to be packed, so they are mended first; with
    `read_through`, the others are read as well, so that all is said at once.

    Raises:
        SourceProblems: when some do not.
    """
    problems = list(dict.fromkeys(problem for part in parts for problem in part.source.problems))
    if not problems:
        return
    if read_through:
        with ThreadPoolExecutor(min(8, _cores())) as pool:
            for part in parts:
                rows = pool.map(partial(make_row, task=task_of(part, False, 1)), part.source.entries)
                problems += [row.problem for row in rows if row.problem]
    raise SourceProblems(problems, f"nothing was written{'' if read_through else ' and no file read'}; mend them, or leave "
                         f"them out with --skip-bad{_remedies(parts)}")


def _remedies(parts: Sequence[Part]) -> str:
    return "".join(f"\n{remedy}" for remedy in dict.fromkeys(part.source.remedy for part in parts) if remedy)


def _refuse_problems(packed: Sequence[Packed], parts: Sequence[Part]) -> None:
    problems = [text for one in packed for _, text in one.problems]
    if problems:
        whole = sum(one.file is not None for one in packed)
        raise SourceProblems(problems, f"{whole} of {len(packed)} shard(s) are packed and kept, there is no manifest yet; mend "
                             "the files and give the same command again, or leave them out with --skip-bad" + _remedies(parts))


def _made_before(part: Part, skip_bad: bool) -> Manifest | None:
    """The manifest of a part that is whole and of the same files."""
    try:
        manifest = read_manifest(part.destination, part.storage)
    except InputError:
        return None
    same = manifest.options.get("plan") == part.hash and (skip_bad or not manifest.options.get("skipped"))
    return manifest if same and not file_problems(manifest, part.storage) else None


def _clear(parts: Sequence[Part], made: Sequence[Manifest | None], overwrite: bool) -> None:
    """See that the places can be written; delete manifests of what is to be replaced, the referring ones first."""
    stale = [part for part, manifest in zip(parts, made, strict=True) if manifest is None]
    for part in stale:
        part.storage.check_writable(part.destination)
    there = [part for part in stale if part.storage.exists(join(part.destination, MANIFEST))]
    if there and not overwrite:
        places = ", ".join(part.destination for part in there)
        raise InputError(f"--out: at {places} there are shards of something else, or damaged ones; give --overwrite to replace "
                         "them, or another folder")
    for part in reversed(there):
        part.storage.delete(join(part.destination, MANIFEST))


def _finish(part: Part, results: Mapping[int, Packed], other: Manifest | None) -> Manifest:
    """Write the manifest of a part whose shards are all there, with those of the part it refers to, and tidy up."""
    packed = [one for _, one in sorted(results.items())]
    files = [one.file for one in packed if one.file is not None]
    totals = np.array([one.class_pixels for one in packed], np.int64).reshape(-1, part.source.classes.num_classes).sum(0)
    labeled, found = sum(one.labeled for one in packed), sum(one.found_pixels for one in packed)
    scale = sum(one.pixels for one in packed) / found if found else 1.0
    if other is not None:
        folder = os.path.basename(other.url)
        files += [replace(file, name=f"../{folder}/{file.name}") for file in other.files]
        labeled, totals = labeled + other.num_labeled, totals + np.array(other.class_pixels, np.int64)
        scale = scale if found else other.options["pixel_scale"]
    if not files:
        raise InputError(f"{part.destination}: there is no image to pack; check the source folder and the selection")
    skipped = [*part.source.problems, *(f"{image_id}: {text}" for one in packed for image_id, text in one.problems)]
    options = {**part.source.options, "max_side": part.settings.max_side, "jpeg_quality": part.settings.jpeg_quality,
               "pixel_scale": scale, "plan": part.hash, **({"skipped": skipped} if skipped else {})}
    manifest = Manifest(part.destination, part.source.dataset, part.source.classes, sum(file.rows for file in files), labeled,
                        tuple(files), tuple(int(total) for total in totals), options=options)
    check_files(manifest, part.storage)
    tidy(part.destination, part.storage, {file.name for file in files}, skipped)
    manifest = with_pixel_file(manifest, part.storage)
    part.storage.write_bytes(join(part.destination, MANIFEST), manifest.to_json())
    part.storage.delete(join(part.destination, NOTES))
    return manifest


def tidy(destination: str, storage: Storage, written: set[str], skipped: Sequence[str]) -> None:
    """Delete shards of a longer set that was here before, and files cut off while they were written; list what was skipped."""
    for name in storage.list_files(destination):
        if (name.startswith("shard-") and name not in written) or name.endswith(".part") or name == SKIPPED:
            storage.delete(join(destination, name))
    if skipped:
        storage.write_bytes(join(destination, SKIPPED), "".join(f"{problem}\n" for problem in skipped).encode())

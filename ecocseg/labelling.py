"""A whole pool labelled by a checkpoint, one shard a task, gone on with after any end; and its most stable part.

A shard is done when the note beside it says so, as in data/packing.py: what an earlier try of the same labels finished is
kept, every image is labelled once, and the manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ecocseg.data.classes import ClassList
from ecocseg.data.packing import Progress, tidy
from ecocseg.data.packing_plan import NOTES, Shard
from ecocseg.data.packing_shard import Packed, done_before
from ecocseg.data.pixels import with_pixel_file
from ecocseg.data.pseudo import OPTION
from ecocseg.data.shards import (
    MANIFEST,
    PSEUDO_SCHEMA,
    Manifest,
    ShardBuilder,
    ShardFile,
    check_files,
    file_problems,
    read_manifest,
    read_metadata,
    read_row_group,
)
from ecocseg.errors import InputError
from ecocseg.labelling_shard import Labeler, Place, label_shard
from ecocseg.storage import Storage, join

VERSION = 1
"""Of what a shard is made of; another one makes shards anew."""
COPIES = 4
"""Shards copied at once when a set is divided."""


@dataclass(frozen=True)
class Plan:
    """What is to be labelled and where to."""

    pool: Manifest
    destination: str
    storage: Storage
    labels: dict[str, Any]
    """What the labels follow from: `Labeler.describe`."""
    classes: ClassList

    @property
    def shards(self) -> list[Shard]:
        made = [json.dumps([VERSION, self.labels, number, file.sha256]) for number, file in enumerate(self.pool.files)]
        return [Shard(number, (), hashlib.sha256(text.encode()).hexdigest()) for number, text in enumerate(made)]

    @property
    def hash(self) -> str:
        return hashlib.sha256("\n".join(shard.fingerprint for shard in self.shards).encode()).hexdigest()

    def finished(self) -> Manifest | None:
        """The manifest of an earlier call with the same labels, if all its shards are there."""
        try:
            manifest = read_manifest(self.destination, self.storage)
        except InputError:
            return None
        return manifest if manifest.options.get("plan") == self.hash and not file_problems(manifest, self.storage) else None

    def done(self) -> dict[int, Packed]:
        """Shards that an earlier try finished, by number."""
        return done_before(self.shards, self.destination, self.storage, skip_bad=True)


@dataclass(frozen=True)
class Workers:
    """Who labels: this process alone, or so many Ray actors with their shares of the cluster."""

    count: int
    threads: int
    """Of each, and its CPUs where it has no GPU."""
    gpus: int = 0
    actors: bool = False

    def describe(self) -> str:
        each = "a GPU" if self.gpus else f"{self.threads} CPU(s)"
        return f"{self.count} Ray actor(s) with {each} each" if self.actors else f"this process, with {each}"


def plan_workers(wanted: int | None, cpus: float, gpus: int, num_shards: int, cluster: bool = False) -> Workers:
    """One a GPU, else one for 4 CPUs or as many as `wanted`, and no more than shards; a single one needs no actor, except
    on a `cluster` whose nodes are others.

    Raises:
        InputError: when the cluster has no room for so many.
    """
    room = gpus or max(1, int(cpus))
    if wanted is not None and wanted > room:
        raise InputError(f"--workers {wanted}: there are {f'{gpus} GPU(s)' if gpus else f'{cpus:g} CPU(s)'}, and each worker "
                         f"takes one; give {room} or fewer")
    count = max(1, min(wanted or gpus or int(cpus) // 4, num_shards))
    return Workers(count, max(1, int(cpus) // count), 1 if gpus else 0, cluster or count > 1)


def place_workers(wanted: int | None, device_name: str | None, num_shards: int) -> tuple[Workers, torch.device]:
    """Who labels, of the cluster in RAY_ADDRESS or of this machine, and the device of this process.

    Args:
        wanted: number of workers; 1 = this process, None = see `plan_workers`.
        device_name: as torch has it; None = a GPU if there is one.
    """
    from ecocseg import launch
    from ecocseg.inference import choose_device

    device = choose_device(device_name)
    here = wanted == 1 or device_name not in (None, "cpu", "cuda")  # a device of this machine by its number
    cluster = bool(os.environ.get("RAY_ADDRESS")) and not here
    if cluster:
        launch.start_ray()
    cpus, gpus = launch.cluster_size()
    return plan_workers(1 if here else wanted, cpus, 0 if device_name == "cpu" else gpus, num_shards, cluster), device


def label_pool(labeler: Labeler, plan: Plan, workers: Workers, device: torch.device, *, together: Manifest | None = None,
               overwrite: bool = False, progress: Progress | None = None) -> Manifest:
    """Label every image of a pool; see `Plan` and `Labeler`. The labeler's models are left on `device`.

    Args:
        together: labelled shards in a folder beside the destination that its manifest lists after its own.
        progress: called with images labelled, images in all, bytes written.

    Raises:
        InputError: when shards of something else are there, or a place cannot be read or written.
    """
    check_together(plan, together)
    made = plan.finished()
    if made is not None and made.options.get("with", {}).get("hash") == (together and together.hash):
        return made
    clear(plan.destination, plan.storage, overwrite or made is not None)
    results, jobs = plan.done(), plan.shards
    total, written = plan.pool.num_rows, sum(packed.num_bytes for packed in results.values())
    images = sum(packed.file.rows for packed in results.values() if packed.file)
    if progress is not None:
        progress(images, total, written)
    jobs = [shard for shard in jobs if shard.number not in results]
    place = Place(plan.pool, plan.destination, plan.storage, workers.threads)
    run = _in_parallel(jobs, labeler, place, workers) if workers.actors and jobs else _serially(jobs, labeler, place, device)
    for packed in run:
        results[packed.number] = packed
        images, written = images + plan.pool.files[packed.number].rows, written + packed.num_bytes
        if progress is not None:
            progress(images, total, written)
    return _finish(plan, [packed for _, packed in sorted(results.items())], together)


def clear(destination: str, storage: Storage, overwrite: bool) -> None:
    """See that a place can be written, and that no manifest is there any more while shards change."""
    storage.check_writable(destination)
    if storage.exists(join(destination, MANIFEST)):
        if not overwrite:
            raise InputError(f"--out: at {destination} there are shards of something else, or damaged ones; give --overwrite "
                             "to replace them, or another folder")
        storage.delete(join(destination, MANIFEST))


def check_together(plan: Plan, together: Manifest | None) -> None:
    """See that other shards can go into one manifest with those of the plan."""
    if together is None:
        return
    told = together.options.get(OPTION)
    if told is None:
        raise InputError(f"--with: {together.url} holds no pseudo-labels; give a set that this command made")
    if told["codebook"] != plan.labels["codebook"]:
        raise InputError(f"--with: {together.url} was labelled with another codebook; label it again with this checkpoint")
    parents = [url.rstrip("/").rpartition("/")[0] for url in (together.url, plan.destination)]
    if parents[0] != parents[1]:
        raise InputError(f"--with: {together.url} is not in a folder beside {plan.destination}; give --out beside it")


def _serially(jobs: Sequence[Shard], labeler: Labeler, place: Place, device: torch.device) -> Iterator[Packed]:
    if device.type == "cpu":
        torch.set_num_threads(place.threads)
    labeler.to(device)
    for shard in jobs:
        yield label_shard(shard, labeler, place, device)


class Actor:
    """A Ray Data actor: the models on its device, called with one shard after another."""

    def __init__(self, labeler: Any, place: Place, device: str) -> None:
        import ray

        self.device = torch.device(device)
        torch.set_num_threads(place.threads)
        self.labeler: Labeler = ray.get(labeler[0]).to(self.device)
        self.place = place

    def __call__(self, block: Any) -> Any:
        """Bad input comes back as a row: Ray Data drops the type."""
        rows = []
        for job in block.to_pylist():
            try:
                packed = label_shard(Shard(job["number"], (), job["fingerprint"]), self.labeler, self.place, self.device)
                rows.append({"packed": packed.to_json(), "error": ""})
            except InputError as error:
                rows.append({"packed": b"", "error": str(error)})
        return pa.Table.from_pylist(rows)


def _in_parallel(jobs: Sequence[Shard], labeler: Labeler, place: Place, workers: Workers) -> Iterator[Packed]:
    import ray.data

    from ecocseg.launch import start_ray

    start_ray()
    plain = [{"number": shard.number, "fingerprint": shard.fingerprint} for shard in jobs]
    shared = ray.put(labeler.to(torch.device("cpu")))
    device = "cuda" if workers.gpus else "cpu"
    dataset = ray.data.from_items(plain, override_num_blocks=len(plain)).map_batches(
        Actor, fn_constructor_args=([shared], place, device), batch_size=None, batch_format="pyarrow",
        num_cpus=1 if workers.gpus else workers.threads, num_gpus=workers.gpus or None,
        compute=ray.data.ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=2))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():  # type: ignore[union-attr]
            if row["error"]:
                raise InputError(row["error"])
            yield Packed.from_json(row["packed"])


def _finish(plan: Plan, packed: Sequence[Packed], together: Manifest | None) -> Manifest:
    files = [one.file for one in packed if one.file is not None]
    counts = np.sum([one.class_pixels for one in packed], axis=0)
    pool = plan.pool
    damaged = [f"{image_id}: {text}" for one in packed for image_id, text in one.problems]
    options: dict[str, Any] = {OPTION: plan.labels, "pool": pool.hash, "plan": plan.hash,
                               "pixel_scale": pool.options.get("pixel_scale", 1.0), **({"damaged": damaged} if damaged else {})}
    own = {file.name for file in files}
    if together is not None:
        files += _referred(together)
        counts = counts + np.array(together.class_pixels)
        options["with"] = {"hash": together.hash, OPTION: together.options[OPTION]}
    return _write_manifest(Manifest(plan.destination, pool.dataset, plan.classes, 0, 0, tuple(files), tuple(counts.tolist()),
                                    options=options), own, plan.storage)


def _referred(together: Manifest) -> list[ShardFile]:
    """The shards of a set in a folder beside the one whose manifest lists them."""
    folder = together.url.rstrip("/").rpartition("/")[2]
    return [file if file.name.startswith("../") else replace(file, name=f"../{folder}/{file.name}") for file in together.files]


def _write_manifest(manifest: Manifest, own: set[str], storage: Storage) -> Manifest:
    """Check the shards, tidy up, and write the manifest with its rows counted; `own` are the shards in its folder."""
    rows = sum(file.rows for file in manifest.files)
    manifest = replace(manifest, num_rows=rows, num_labeled=rows)
    check_files(manifest, storage)
    tidy(manifest.url, storage, own, manifest.options.get("damaged", ()))
    manifest = with_pixel_file(manifest, storage)
    storage.write_bytes(join(manifest.url, MANIFEST), manifest.to_json())
    storage.delete(join(manifest.url, NOTES))
    return manifest


# ---- the most stable images first --------------------------------------------------------------------------------------


def divide(manifest: Manifest, keep: float, storage: Storage) -> dict[str, Manifest]:
    """Copies of the share `keep` of the most stable images and of the rest: sets `stable` and `rest` below the labelled one.

    Raises:
        InputError: when the set has no stability, or a place cannot be written.
    """
    column = read_metadata(manifest, ["stability"], storage).column("stability")
    if column.null_count == len(column):
        raise InputError(f"--keep: {manifest.url} has no stability; give earlier checkpoints of the run (--checkpoints)")
    stability = np.asarray(column.to_numpy(zero_copy_only=False), np.float64)
    order = np.argsort(np.where(np.isnan(stability), np.inf, -stability), kind="stable")
    stable = np.zeros(len(order), bool)
    stable[order[:round(keep * len(order))]] = True
    return {name: _copy_part(manifest, name, chosen, keep, storage) for name, chosen in (("stable", stable), ("rest", ~stable))}


def _copy_part(manifest: Manifest, name: str, chosen: NDArray[np.bool_], keep: float, storage: Storage) -> Manifest:
    """A set of the rows for which `chosen` [rows of the manifest] holds, in their order."""
    url = join(manifest.url, name)
    digest = hashlib.sha256(f"{VERSION} {manifest.hash} {name} {keep}".encode()).hexdigest()
    try:
        made = read_manifest(url, storage)
        if made.options.get("plan") == digest and not file_problems(made, storage):
            return made
    except InputError:
        pass
    clear(url, storage, overwrite=True)
    starts = np.cumsum([0, *(file.rows for file in manifest.files)])

    def copy(number: int) -> tuple[ShardFile, NDArray[np.int64]] | None:
        mine = chosen[starts[number]:starts[number + 1]]
        if not mine.any():
            return None
        groups, first = manifest.files[number].row_groups, 0
        builder, counts = ShardBuilder(max(groups), PSEUDO_SCHEMA), np.zeros(manifest.classes.num_classes, np.int64)
        for group, rows in enumerate(groups):
            if mine[first:first + rows].any():
                table = read_row_group(manifest, number, group, PSEUDO_SCHEMA.names, storage)
                for row in table.filter(pa.array(mine[first:first + rows])).to_pylist():
                    builder.add(row)
                    counts += np.array(row["class_pixels"])
            first += rows
        data, file = builder.finish(number)
        storage.write_bytes(join(url, file.name), data)
        return file, counts

    with ThreadPoolExecutor(COPIES) as pool:
        made_shards = [one for one in pool.map(copy, range(len(manifest.files))) if one is not None]
    if not made_shards:
        raise InputError(f"--keep {keep:g} leaves '{name}' without an image; give a share between 0 and 1")
    files = tuple(file for file, _ in made_shards)
    counts = np.sum([counts for _, counts in made_shards], axis=0)
    options = {**manifest.options, "part": name, "keep": keep, "plan": digest}
    options.pop("damaged", None)
    return _write_manifest(Manifest(url, manifest.dataset, manifest.classes, 0, 0, files, tuple(counts.tolist()),
                                    options=options), {file.name for file in files}, storage)

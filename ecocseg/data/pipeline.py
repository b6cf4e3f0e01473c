"""A stream: the shards of one data set as an endless sequence of global batches, of which each rank gets its slice.

Order (order.py) -> items (reading.py) -> Ray Data tasks or threads read encoded rows -> one thread puts rows in order
and hands them to decode threads, which write crops straight into the batch, or have Ray tasks make them (decoding.py)
-> the consumer. Every queue is bounded; the memory a rank holds is one window per lane and `prefetch_bytes`, whatever
the size of the set. Legend: B samples of a micro-batch, H W pixels of the crop.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch

from ecocseg.data.decoding import TASK_ROWS, Decoder, Encoded, RayDecoder
from ecocseg.data.order import Order, RareClass, default_lanes, stream_key
from ecocseg.data.reading import Item, RaySource, ThreadSource, WindowRows, plan_items, read_rows, table_rows
from ecocseg.data.transforms import IGNORE, WeakTransform
from ecocseg.device import to_device
from ecocseg.errors import InputError

if TYPE_CHECKING:
    from ecocseg.data.shards import Manifest
    from ecocseg.storage import Storage

Taken = TypeVar("Taken")
WINDOW_BYTES = 256 << 20  # encoded bytes of the windows of all lanes; each rank holds its share
SHOWN_DAMAGE = 20
WINDOW_ROWS = (16, 256)  # bounds of a window's rows; more rows mix better

__all__ = ["Batch", "RareClass", "Stream", "window_rows"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the host."""

    image: torch.Tensor  # uint8 [B, 3, H, W], RGB; [B, 6, H, W] of two dates
    labels: torch.Tensor | None  # int64 [B, H, W], 255 = ignored; None if masks were not asked for
    valid: torch.Tensor  # bool [B, H, W], False on padding and margins
    positions: torch.Tensor  # int64 [B], places in the stream's sequence
    image_ids: list[str]
    changes: torch.Tensor | None = None  # uint8 [B, L, H, W], bits of pseudo-labels that differ from their codewords'
    weight: torch.Tensor | None = None  # float [B], of pseudo-labels; None: labels are true

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, all but its positions, without waiting."""
        if device.type == "cpu":
            return self
        tensors = {name: getattr(self, name) for name in ("image", "labels", "valid", "changes", "weight")}
        moved: dict[str, Any] = {name: to_device(t, device) for name, t in tensors.items() if t is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class _Row:
    """A row as it was read (see `table_rows`); the class it was drawn for (-1: none); where it lies."""

    content: tuple[str, bytes, bytes | None, bytes | None, bytes | None, float | None]
    focus: int
    file: int
    group: int
    row: int


@dataclass
class _Pending:
    batches: list[Batch]
    samples: list[Future] = field(default_factory=list)


def window_rows(manifest: Manifest, lanes: int) -> int:
    """Rows of a shuffle window, from the mean size of a row: a function of the set and the lanes alone."""
    return int(np.clip(WINDOW_BYTES // (lanes * max(1.0, _row_bytes(manifest))), *WINDOW_ROWS))


def _row_bytes(manifest: Manifest) -> float:
    return sum(file.bytes for file in manifest.files) / max(1, manifest.num_rows)


def make_order(manifest: Manifest, name: str, seed: int, global_batch: int, lanes: int | None, rare: RareClass | None,
               storage: Storage) -> Order:
    """The sample order of stream `name`: uniform, or with `rare` by rare classes, for which metadata of all rows is read."""
    lanes = lanes or default_lanes(global_batch)
    pixels = None
    if rare is not None:
        from ecocseg.data.pixels import read_class_pixels

        pixels = read_class_pixels(manifest, storage)
    return Order(manifest.row_group_table(), seed=seed, stream=name, global_batch=global_batch, lanes=lanes,
                 window_rows=window_rows(manifest, lanes), rare=rare, class_pixels=pixels)


class Stream:
    """Iterating yields, step by step and for ever, a list of `micro_batches` Batches: this rank's slice of the global
    batch.

    A step's content is a pure function of (manifest, name, seed, global_batch, sampling, transform, lanes, step): the
    same for any `world` that divides the lanes, any `start_step`, either loader and either place to decode.
    `loader="ray"` and `decode="ray"` need a Ray runtime; `loader="torch"` reads with threads of this process, and
    `decode="beside"` decodes with `decode_threads` of them, where `"ray"` has as many Ray tasks under way. `columns` are
    the shard columns to read; leave out "mask" to stream without labels, and give "bits" and "weight" for those of
    pseudo-labels. `pinned` batches lie in memory that a GPU copies from by itself. `wait_seconds` is the time the consumer has
    waited so far.

    A damaged row (it does not decode, its mask has another size or an id that is no class) is put aside: its place in
    the batch is padding, so that no other sample moves, and `damaged` names its shard and row. InputError with that list
    once more than `damage_limit` of the set's rows are damaged, after `on_limit` was called, and for arguments that do not
    fit together; RuntimeError naming the stage if there is no batch within `timeout_s` seconds, of which `warn` is told at
    half that time. Close it when done.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        name: str,
        seed: int,
        global_batch: int,
        transform: WeakTransform,
        sampling: Literal["uniform", "rare_class"] = "uniform",
        rare_class: RareClass | None = None,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        lanes: int | None = None,
        loader: Literal["ray", "torch"] = "ray",
        micro_batches: int = 1,
        prefetch_bytes: int = 64 << 20,
        decode: Literal["beside", "ray"] = "beside",
        decode_threads: int = 2,
        read_cpus: float = 0.25,
        storage: Storage | None = None,
        columns: Sequence[str] = ("image_id", "image", "mask"),
        timeout_s: float = 300.0,
        damage_limit: float = 0.001,
        pinned: bool = False,
    ):
        from ecocseg.storage import Storage as DefaultStorage

        self.manifest, self.name, self.seed, self.transform = manifest, name, seed, transform
        self.storage = storage or DefaultStorage()
        self.columns = tuple(dict.fromkeys(("image_id", *columns)))
        if sampling not in ("uniform", "rare_class"):
            raise InputError(f"stream {name!r}: sampling={sampling!r} is unknown; use uniform or rare_class")
        rare = rare_class or RareClass() if sampling == "rare_class" else None
        self.order = make_order(manifest, name, seed, global_batch, lanes, rare, self.storage)
        self.order.check_world(world)
        self.rank, self.world, self.step = rank, world, start_step
        self.width = global_batch // world
        if micro_batches < 1 or self.width % micro_batches:
            fitting = [d for d in range(1, self.width + 1) if self.width % d == 0]
            raise InputError(
                f"stream {name!r}: {self.width} samples per worker do not split into {micro_batches} equal "
                f"micro-batches; use one of {fitting}"
            )
        if loader not in ("ray", "torch"):
            raise InputError(f"data.loader={loader!r} is unknown; use ray or torch")
        self.micro_batches, self.timeout_s, self.wait_seconds = micro_batches, timeout_s, 0.0
        self.warn: Callable[[str], None] = lambda text: None
        self.on_limit: Callable[[], None] = lambda: None
        self.damaged: dict[tuple[str, int], str] = {}
        self.most_damaged = int(damage_limit * manifest.num_rows)
        self._loader, self._prefetch, self._read_cpus, self._pinned = loader, prefetch_bytes, read_cpus, pinned
        self._decoder = Decoder(transform, manifest.classes, seed, stream_key(name))
        self._remote = RayDecoder(self._decoder) if decode == "ray" else None
        self._task_rows = min(TASK_ROWS, max(1, -(-self.width // micro_batches // decode_threads)))
        self._stage = "planning"
        self._stopped = threading.Event()
        ahead = max(1, -(-2 * decode_threads // self.width))
        self._steps: queue.Queue[_Pending | BaseException] = queue.Queue(maxsize=ahead)
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="ecocseg-decode")
        self._source: RaySource | ThreadSource | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Stream:
        """Begin to read ahead; iterating does so by itself."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name=f"ecocseg-stream-{self.name}")
            self._thread.start()
        return self

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        began = time.perf_counter()
        try:
            return self._next(began)
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _next(self, began: float) -> list[Batch]:
        if self._stopped.is_set():
            raise RuntimeError(f"stream {self.name!r} is closed")
        self.start()
        pending = self._wait(began, lambda seconds: self._steps.get(timeout=seconds), lambda: self._stage)
        if isinstance(pending, BaseException):
            raise pending
        for sample in reversed(pending.samples):  # the last first: to be woken for each takes the decoders' time
            self._wait(began, sample.result, lambda: "decoding")
        self.step += 1
        return pending.batches

    def _wait(self, began: float, take: Callable[[float], Taken], stage: Callable[[], str]) -> Taken:
        """What `take` gives within the time that is left, with a warning when half of all is gone."""
        for share in (0.5, 1.0):
            left = began + share * self.timeout_s - time.perf_counter()
            if left <= 0 and share < 1:
                continue
            try:
                return take(max(0.0, left))
            except (queue.Empty, FutureTimeout):
                if share < 1:
                    self.warn(self._late(stage(), share * self.timeout_s))
        raise RuntimeError(self._late(stage(), self.timeout_s))

    def _late(self, stage: str, seconds: float) -> str:
        return (f"stream {self.name!r}, step {self.step}, worker {self.rank}: no batch for {seconds:g} s, stuck while {stage}; "
                "check that the storage answers and that the cluster has CPUs left for ingest (data.watchdog_seconds="
                f"{self.timeout_s:g})")

    def close(self) -> None:
        """Stop threads and reading; what is under way is dropped."""
        self._stopped.set()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self._source is not None:
            self._source.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """Thread: read, put in order, hand to the decoders."""
        try:
            items = self._plan()
            read = partial(read_rows, manifest=self.manifest, storage=self.storage, columns=self.columns)
            if self._loader == "ray":
                self._source = RaySource(items, read, self._prefetch, self._read_cpus)
            else:
                self._source = ThreadSource(items, read, self._prefetch)
            step, lanes = self.step, _Lanes(self.order, self.rank, self.world, self._receive)
            while not self._stopped.is_set():
                self._put(self._submit(step, lanes.take(step)))
                step += 1
        except BaseException as error:  # whatever it is, the consumer has to hear of it
            self._put(error)
        finally:
            if self._source is not None:
                self._source.close()

    def _plan(self) -> Iterator[Item]:
        items = plan_items(self.order, _row_bytes(self.manifest), self.rank, self.world, self.step)
        while True:
            self._stage = "planning"
            item = next(items)
            self._stage = "reading"
            yield item

    def _put(self, what: _Pending | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._steps.put(what, timeout=0.2)
            except queue.Full:
                continue

    def _receive(self) -> tuple[Item, pa.Table]:
        assert self._source is not None
        self._stage = "reading"
        if self._stopped.is_set():
            raise RuntimeError("stream closed")
        item, result = next(self._source)
        self._stage = f"reading {item.describe(self.manifest)}"
        while True:
            if self._stopped.is_set():
                raise RuntimeError("stream closed")
            try:
                table = result.result(timeout=0.2)
                break
            except FutureTimeout:
                if result.done():
                    raise
        if table.num_rows != item.request.shape[1]:
            raise RuntimeError(f"expected {item.describe(self.manifest)} but {table.num_rows} rows came")
        self._stage = "decoding"
        return item, table

    def _submit(self, step: int, rows: list[_Row]) -> _Pending:
        """Allocate the step's batches and start decoding into them."""
        size, (height, width), planes = self.width // self.micro_batches, self.transform.crop, self.transform.planes
        empty = partial(torch.empty, pin_memory=self._pinned)
        start = step * self.order.global_batch + self.rank * self.width
        pending = _Pending([])
        for begin in range(0, self.width, size):
            part = rows[begin : begin + size]
            labels = empty((size, height, width), dtype=torch.int64) if "mask" in self.columns else None
            batch = Batch(
                empty((size, 3 * self.transform.dates, height, width), dtype=torch.uint8),
                labels,
                empty((size, height, width), dtype=torch.bool),
                torch.arange(start + begin, start + begin + size),
                [row.content[0] for row in part],
                torch.zeros((size, planes, height, width), dtype=torch.uint8) if planes else None,
                torch.tensor([row.content[5] for row in part]) if "weight" in self.columns else None,
            )
            pending.batches.append(batch)
            encoded = [Encoded(*row.content, start + begin + i, row.focus) for i, row in enumerate(part)]
            step_rows, work = (1, self._decode) if self._remote is None else (self._task_rows, self._decode_remotely)
            for i in range(0, size, step_rows):
                few = slice(i, i + step_rows)
                pending.samples.append(self._decoders.submit(work, batch, i, encoded[few], part[few]))
        return pending

    def _decode(self, batch: Batch, i: int, encoded: list[Encoded], rows: list[_Row]) -> None:
        """Thread: decode one row into place `i` of its batch."""
        try:
            sample = self._decoder(encoded[0])
        except InputError as error:
            self._put_aside(rows[0], str(error))
            sample = self._decoder.blank()
        batch.image.numpy()[i] = sample.image
        batch.valid.numpy()[i] = sample.valid
        if batch.labels is not None:
            batch.labels.numpy()[i] = IGNORE if sample.labels is None else sample.labels
        if batch.changes is not None and sample.changes is not None:
            batch.changes.numpy()[i] = sample.changes

    def _decode_remotely(self, batch: Batch, i: int, encoded: list[Encoded], rows: list[_Row]) -> None:
        """Thread: have a Ray task decode some rows, and copy them into their batch from place `i` on."""
        assert self._remote is not None
        found = self._remote.decode(encoded)
        for row, damage in zip(rows, found.damage, strict=True):
            if damage is not None:
                self._put_aside(row, damage)
        few = slice(i, i + len(rows))
        batch.image.numpy()[few] = found.image
        batch.valid.numpy()[few] = found.valid
        if batch.labels is not None:
            batch.labels.numpy()[few] = found.labels
        if batch.changes is not None:
            batch.changes.numpy()[few] = found.changes

    def _put_aside(self, row: _Row, damage: str) -> None:
        """Note a damaged row; too many of them end the stream."""
        file = self.manifest.files[row.file]
        self.damaged[file.name, sum(file.row_groups[: row.group]) + row.row] = damage
        if len(self.damaged) > self.most_damaged:
            self.on_limit()
            raise damage_error(self.name, self.manifest, self.damaged, self.most_damaged) from None


class _Lanes:
    """Windows of a rank's lanes, taken from row by row; receives items until the next rows are there."""

    def __init__(self, order: Order, rank: int, world: int, receive: Callable[[], tuple[Item, pa.Table]]):
        first, last = rank * order.lanes // world, (rank + 1) * order.lanes // world
        self._width, self._receive = order.lane_width, receive
        self._windows: dict[int, deque[WindowRows]] = {lane: deque() for lane in range(first, last)}

    def take(self, step: int) -> list[_Row]:
        """This rank's slice of `step`; steps must be taken in turn."""
        taken = []
        for windows in self._windows.values():
            for k in range(step * self._width, (step + 1) * self._width):
                while not windows or windows[0].missing:
                    self._place(*self._receive())
                head = windows[0]
                at = k - head.window.first
                row, head.rows[at] = head.rows[at], None
                assert row is not None, "rows out of order"
                window = head.window
                taken.append(_Row(row, *(int(column[at]) for column in (window.focus, window.file, window.group, window.row))))
                if at + 1 == len(head.rows):
                    windows.popleft()
        return taken

    def _place(self, item: Item, table: pa.Table) -> None:
        rows = list(table_rows(table))
        for piece in item.pieces:
            target = piece.window
            for place, index in zip(piece.places.tolist(), piece.index.tolist(), strict=True):
                target.rows[place] = rows[index]
            target.missing -= 1
            if not target.queued:
                target.queued = True
                self._windows[target.window.lane].append(target)


def damage_error(name: str, manifest: Manifest, damaged: Mapping[tuple[str, int], str], most: int) -> InputError:
    """The end of a run whose data is damaged beyond the limit, with the first of the rows."""
    lines = [f"{shard}, row {row}: {what}" for (shard, row), what in sorted(damaged.items())[:SHOWN_DAMAGE]]
    more = [f"and {len(damaged) - SHOWN_DAMAGE} more"] if len(damaged) > SHOWN_DAMAGE else []
    return InputError(f"stream '{name}': {len(damaged)} damaged row(s) in {manifest.url}, more than the {most} of "
                      f"{manifest.num_rows} that data.damage_limit allows; pack them again, or raise it:\n  "
                      + "\n  ".join(lines + more))

"""What a rank reads, in which portions, and who reads it: Ray Data tasks or threads of this process, with the same
result.

`plan_items` turns the windows of an order into items: portions of about 64 rows or 8 MB, made of whole row groups
where a window needs them whole, each row at most once. A source answers every item with a table, in the items' order,
and reads ahead only so many bytes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ecocseg.data.order import Ints, Order, Window
from ecocseg.errors import InputError

if TYPE_CHECKING:
    from ecocseg.data.shards import Manifest
    from ecocseg.storage import Storage

ITEM_ROWS = 64  # distinct rows of an item, about
ITEM_BYTES = 8 << 20  # encoded bytes of an item, about
FIRST_USES, ITEM_USES = 64, 1024  # rows the first item, and any, may serve, counting repetitions: small sets repeat a lot
EXECUTION_ITEMS = (4, 16, 64, 256)  # most items of the first, second, third and every further Ray Data execution
STORE_ROOM, MIN_STORE_BYTES = 4, 256 << 20  # object store memory an execution may take, times its estimate and at least
READ_TASKS = 2  # reads under way at once, per stream
MOST_LOSSES = 3  # times in a row that reading is begun again after its actor, or what it had read, was lost


@dataclass(eq=False)
class WindowRows:
    """A window on its way: `rows[i]` is the i-th of `table_rows` once that has come."""

    window: Window
    missing: int  # pieces that have not come yet
    rows: list[tuple | None]
    queued: bool = False


@dataclass(frozen=True)
class Piece:
    """Rows of one item for one window: row `index[i]` of the item goes to place `places[i]` of the window."""

    window: WindowRows
    places: Ints
    index: Ints


@dataclass(frozen=True)
class Item:
    """One portion to read: `request` int64 [3, m] holds file, group and row in group of its m rows, sorted and
    distinct.
    """

    number: int
    request: Ints
    num_bytes: int  # estimate
    uses: int  # rows it serves, counting repetitions
    pieces: list[Piece] = field(repr=False)

    def describe(self, manifest: Manifest) -> str:
        names = sorted({manifest.files[i].name for i in self.request[0].tolist()})
        return f"{self.request.shape[1]} rows of {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def plan_items(order: Order, row_bytes: float, rank: int, world: int, start_step: int) -> Iterator[Item]:
    """Items of one rank from `start_step` on, for ever, in the order in which their rows are needed first. Each may serve
    twice as many rows as the one before, so that a small set is not planned thousands of rows ahead before its first batch.
    """
    group_span, row_span = int(order.group.max()) + 1, int(order.group_rows.max())
    sizes = dict(zip((order.file * group_span + order.group).tolist(), order.group_rows.tolist(), strict=True))
    open_pieces: list[tuple[WindowRows, Ints, Ints]] = []
    groups: set[int] = set()
    uses = distinct = number = 0
    most_uses = min(FIRST_USES, ITEM_USES)
    for window in order.windows(rank, world, start_step):
        group_keys = window.file * group_span + window.group
        places = np.argsort(group_keys, kind="stable")
        parts = np.split(places, np.flatnonzero(np.diff(group_keys[places])) + 1)
        state = WindowRows(window, len(parts), [None] * len(window.row))
        for part in parts:
            group = int(group_keys[part[0]])
            open_pieces.append((state, part, group * row_span + window.row[part]))
            uses += len(part)
            if group not in groups:
                groups.add(group)
                distinct += sizes[group]
            rows = min(uses, distinct)
            if rows >= ITEM_ROWS or rows * row_bytes >= ITEM_BYTES or uses >= most_uses:
                yield _close_item(number, open_pieces, group_span, row_span, row_bytes)
                open_pieces, groups, uses, distinct, number = [], set(), 0, 0, number + 1
                most_uses = min(2 * most_uses, ITEM_USES)


def _close_item(
    number: int, pieces: list[tuple[WindowRows, Ints, Ints]], group_span: int, row_span: int, row_bytes: float
) -> Item:
    keys, inverse = np.unique(np.concatenate([keys for _, _, keys in pieces]), return_inverse=True)
    group, row = np.divmod(keys, row_span)
    ends = np.cumsum([len(places) for _, places, _ in pieces])
    index = np.split(inverse, ends[:-1])
    request = np.stack([*np.divmod(group, group_span), row])
    placed = [Piece(state, places, i) for (state, places, _), i in zip(pieces, index, strict=True)]
    return Item(number, request, int(len(keys) * row_bytes), int(ends[-1]), placed)


def read_rows(request: Ints, manifest: Manifest, storage: Storage, columns: Sequence[str]) -> pa.Table:
    """Rows of an item as one table, in the request's order; each row group is opened once."""
    from ecocseg.data.shards import read_row_group

    tables = []
    borders = np.flatnonzero(np.diff(request[:2]).any(axis=0)) + 1
    for part in np.split(request, borders, axis=1):
        table = read_row_group(manifest, int(part[0, 0]), int(part[1, 0]), list(columns), storage)
        rows = part[2]
        if len(rows) == table.num_rows:
            tables.append(table)
        elif rows[-1] - rows[0] + 1 == len(rows):
            tables.append(table.slice(int(rows[0]), len(rows)))
        else:
            tables.append(table.take(pa.array(rows)))
    return pa.concat_tables(tables)


class ThreadSource:
    """Reads items by threads of this process; `limit_bytes` bounds what is read ahead (at least one item)."""

    def __init__(self, items: Iterator[Item], read: Callable[[Ints], pa.Table], limit_bytes: int):
        self._items, self._read, self._limit = items, read, limit_bytes
        self._pool = ThreadPoolExecutor(READ_TASKS, thread_name_prefix="ecocseg-read")
        self._ahead: deque[tuple[Item, Future]] = deque()

    def __next__(self) -> tuple[Item, Future]:
        """Next item and the future of its table."""
        while len(self._ahead) < 2 or (
            len(self._ahead) < 4 * READ_TASKS
            and sum(item.num_bytes for item, _ in self._ahead) < self._limit
            and sum(item.uses for item, _ in self._ahead) < ITEM_USES
        ):
            item = next(self._items)
            self._ahead.append((item, self._pool.submit(self._read, item.request)))
        return self._ahead.popleft()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _read_block(block: pa.Table, read: Callable[[Ints], pa.Table]) -> pa.Table:
    """Ray Data task: one item in, its rows out. Bad input comes back as a row: Ray Data drops the type."""
    request = np.frombuffer(block.column("request")[0].as_py(), np.int64).reshape(3, -1)
    try:
        return read(request)
    except InputError as error:
        return pa.table({"input_error": [str(error)]})


class Ingest:
    """Ray actor beside a worker that runs its Ray Data executions: their scheduling loop would hold the trainer's
    interpreter lock.
    """

    def __init__(self, read: Callable[[Ints], pa.Table], read_cpus: float):
        self._read, self._read_cpus = read, read_cpus

    def execute(self, requests: list[Ints], num_bytes: int) -> Iterator[pa.Table]:
        """One execution: yields the table of each request, in order. It passes encoded bytes on, which costs little
        beside decoding them; blocks referred to from another process would have to be kept here until they are read.
        """
        import ray

        count = 0
        for bundle in self._dataset(requests, num_bytes).iter_internal_ref_bundles():
            for ref in bundle.block_refs:
                count += 1
                yield ray.get(ref)
        if count != len(requests):
            raise RuntimeError(f"Ray Data gave {count} blocks for {len(requests)} requests")

    def _dataset(self, requests: list[Ints], num_bytes: int) -> Any:
        import ray.data
        from ray.data import ExecutionResources, TaskPoolStrategy

        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces every execution
        plan = [{"request": request.tobytes()} for request in requests]
        dataset = ray.data.from_items(plan, override_num_blocks=len(plan)).map_batches(
            partial(_read_block, read=self._read),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=self._read_cpus,
            compute=TaskPoolStrategy(size=READ_TASKS),
            zero_copy_batch=True,
        )
        context = dataset.context
        context.target_max_block_size = None  # one block an item, however large
        context.execution_options.preserve_order = True
        # Room for all of it: an execution that has to wait for its reader turns in its loop and keeps a core busy.
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            cpu=self._read_cpus * READ_TASKS, object_store_memory=max(STORE_ROOM * num_bytes, MIN_STORE_BYTES)
        )
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        return dataset


class RaySource:
    """Reads items by Ray Data: executions of bounded length and bytes, the next begun before the last ends."""

    def __init__(self, items: Iterator[Item], read: Callable[[Ints], pa.Table], limit_bytes: int, read_cpus: float):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._actor: Any = ray.remote(Ingest).options(num_cpus=0, max_concurrency=2, scheduling_strategy=here)
        self._arguments = read, read_cpus
        self._ingest: Any = self._actor.remote(*self._arguments)
        self._items, self._limit, self._losses = items, limit_bytes, 0
        self._sizes = iter(EXECUTION_ITEMS)
        self._closed = threading.Event()
        self._executions: deque[tuple[list[Item], Any]] = deque()
        self._tables = self._iterate()

    def _start(self) -> None:
        """Begin an execution over the next items, half of the bytes that may be read ahead."""
        count, num_bytes = next(self._sizes, EXECUTION_ITEMS[-1]), 0
        items: list[Item] = []
        while len(items) < count and (not items or num_bytes < self._limit // 2):
            items.append(next(self._items))
            num_bytes += items[-1].num_bytes
        self._execute(items)

    def _execute(self, items: list[Item]) -> None:
        call = self._ingest.execute.options(num_returns="streaming")
        num_bytes = sum(item.num_bytes for item in items)
        self._executions.append((items, call.remote([item.request for item in items], num_bytes)))

    def _iterate(self) -> Iterator[tuple[Item, Future]]:
        self._start()
        while True:
            items = self._executions[0][0]
            for count, item in enumerate(items):
                if count == len(items) // 2:
                    self._start()
                result: Future = Future()
                result.set_result(self._table(items[count:]))
                yield item, result
            self._executions.popleft()

    def _table(self, items: list[Item]) -> pa.Table:
        """The table of the first of the items that are left of an execution, mapped from the object store."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        while True:
            blocks = self._executions[0][1]
            try:
                while not ray.wait([blocks], timeout=0.2)[0]:
                    if self._closed.is_set():
                        raise RuntimeError("stream closed")
                table = ray.get(next(blocks))
                break
            except (RayActorError, ObjectLostError, RayTaskError) as error:
                lost = isinstance(error, RayActorError | ObjectLostError) or isinstance(
                    error.cause, RayActorError | ObjectLostError)
                self._losses += 1
                if not lost or self._losses > MOST_LOSSES or self._closed.is_set():
                    raise
                self._begin_again(items)
        self._losses = 0
        if "input_error" in table.column_names:
            raise InputError(table.column("input_error")[0].as_py())
        return table

    def _begin_again(self, items: list[Item]) -> None:
        """Another actor for what has not been read of the executions under way: their items say all that it needs."""
        import ray

        ray.kill(self._ingest)
        self._ingest = self._actor.remote(*self._arguments)
        left = [items, *(later for later, _ in list(self._executions)[1:])]
        self._executions.clear()
        for some in left:
            self._execute(some)

    def __next__(self) -> tuple[Item, Future]:
        return next(self._tables)

    def close(self) -> None:
        import ray

        self._closed.set()
        if ray.is_initialized():
            ray.kill(self._ingest)


def table_rows(table: pa.Table) -> Iterable[tuple]:
    """(image_id, image, mask, image_b, bits, weight) of every row, None for what was not read, copied out of the table so
    that its memory can go."""
    names = ("image_id", "image", "mask", "image_b", "bits", "weight")
    there = [table.column(n).to_pylist() if n in table.column_names else [None] * table.num_rows for n in names]
    return zip(*there, strict=True)

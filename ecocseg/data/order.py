"""Which row stands at which position of an endless stream: pure functions of (seed, stream, row groups), no I/O.

A stream is one global sequence of rows at positions p = 0, 1, 2, ... Step t takes the global batch of positions [t G,
(t + 1) G). A global batch consists of L lanes of G / L positions each: lane(p) = (p % G) // (G / L). Rank r of W owns
lanes [r L / W, (r + 1) L / W), its contiguous slice of every global batch; so any W that divides L sees the
same global batches. MosaicML Streaming's canonical nodes are the same idea.

The sequence comes in passes of n positions, a pass in one or more rounds. A round is a list of rows with the rows of
one row group side by side (a *run*). It is cut into contiguous lane segments, as long as each lane has positions in
that round, and each segment into windows of about `window_rows` rows, which never split a row group. Rows are
shuffled inside their window only. So a rank reads only what it uses, keeps one window per lane in memory, and can
start at any step without replaying what came before.

- uniform: a pass is one round, a permutation of all n rows; group order, row order and windows are drawn anew in
  every pass.
- rare class (after DAFormer's rare class sampling): a pass is a planned multiset of n rows; see
  `_RareClassPasses`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ecocseg.errors import InputError

Ints = NDArray[np.int64]
MAX_LANES = 64
MAX_ROUNDS = 64
_EXPAND_ROWS = 8192  # rows resolved by one vectorised call; bounds memory for passes of any length


@dataclass(frozen=True)
class RareClass:
    """How often each class is drawn: P(c) = softmax((1 - f_c) / temperature), f_c = share of pixels of class c."""

    temperature: float = 0.01  # DAFormer; smaller = rarer classes more often
    min_pixels: int = 3000  # DAFormer; an image counts for class c if it has more pixels of c than this


@dataclass(frozen=True)
class Window:
    """Consecutive rows of one lane, in the order in which they are consumed; arrays of shape [m], m >= 1.

    `first` is the lane's own index of the first row: index k of lane l stands at position (k // w) G + l w + k % w, w
    = G / L.
    """

    lane: int
    first: int
    file: Ints
    group: Ints
    row: Ints  # row inside its row group
    focus: Ints  # class the row was drawn for; -1 in uniform streams


@dataclass(frozen=True)
class Read:
    """One row group (or a part of it) that a window needs. `order[i]` is the place in the window of row `rows[i]`."""

    window: int  # counts the windows of this generator: 0, 1, ...
    lane: int
    file: int
    group: int
    rows: Ints
    order: Ints


@dataclass(frozen=True)
class RankRows:
    """Rows of one rank for a range of steps; arrays of shape [steps, G / W], columns in the order of the global
    batch.
    """

    position: Ints
    file: Ints
    group: Ints
    row: Ints
    focus: Ints


def default_lanes(global_batch: int) -> int:
    """Largest divisor of `global_batch` that is at most 64."""
    return max(d for d in range(1, min(global_batch, MAX_LANES) + 1) if global_batch % d == 0)


def stream_key(stream: str) -> int:
    """Number that stands for a stream's name in seeds."""
    return zlib.crc32(stream.encode())


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that scatters neighbours."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _random_words(seed: tuple[int, ...], *counters: Ints) -> NDArray[np.uint64]:
    """One random 64-bit word for each tuple of counters, a pure function of it: any part can be made without the
    rest.
    """
    word = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    words = np.full(np.broadcast(*counters).shape, word, np.uint64)
    for counter in counters:
        words = _mix(words ^ _mix(counter.astype(np.uint64)))
    return words


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _ramp(counts: Ints) -> Ints:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - np.repeat(ends - counts, counts)


@dataclass(frozen=True)
class _Round:
    start: int  # position of the round's first row
    run_group: Ints  # index of each run's row group in the table
    run_start: Ints  # [runs + 1] where each run begins in the round's row list

    def rows(self, index: Ints, run: Ints) -> tuple[Ints, Ints]:
        """Row inside its row group, and class, of places `index` of the row list, which lie in runs `run`."""
        raise NotImplementedError


@dataclass(frozen=True)
class _UniformRound(_Round):
    seed: tuple[int, ...]

    def rows(self, index: Ints, run: Ints) -> tuple[Ints, Ints]:
        runs, inverse = np.unique(run, return_inverse=True)
        sizes = self.run_start[runs + 1] - self.run_start[runs]
        row, which = _ramp(sizes), np.repeat(np.arange(len(runs)), sizes)
        words = _random_words(self.seed, np.repeat(self.run_group[runs], sizes), row)
        shuffled = row[np.lexsort((words, which))]
        begins = np.cumsum(sizes) - sizes
        return shuffled[begins[inverse] + index - self.run_start[run]], np.full(len(index), -1, np.int64)


class _UniformPasses:
    """Every pass is a permutation of all rows: row groups in random order, rows in random order inside each."""

    def __init__(self, group_rows: Ints, seed: tuple[int, int]):
        self.group_rows, self.seed, self.length = group_rows, seed, int(group_rows.sum())

    def rounds(self, number: int) -> list[_Round]:
        order = np.random.default_rng((*self.seed, number, 0)).permutation(len(self.group_rows)).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(self.group_rows[order])]).astype(np.int64)
        return [_UniformRound(number * self.length, order, starts, (*self.seed, number, 1))]


@dataclass(frozen=True)
class _ListedRound(_Round):
    row: Ints
    focus: Ints

    def rows(self, index: Ints, run: Ints) -> tuple[Ints, Ints]:
        return self.row[index], self.focus[index]


def class_probabilities(class_pixels: Ints, rare: RareClass) -> NDArray[np.float64]:
    """P(c) over [N] classes from pixel counts [n, N] by image.

    Classes of which no image has more than `min_pixels` pixels cannot be drawn; the others share their probability in
    proportion to their own.
    """
    drawable = (class_pixels > rare.min_pixels).any(axis=0)
    if not drawable.any():
        raise InputError(
            f"data.rare_min_pixels: no image has more than {rare.min_pixels} pixels of any class "
            f"(the most is {class_pixels.max(initial=0)}); lower it, or use data.sampling=uniform"
        )
    frequency = class_pixels.sum(axis=0, dtype=np.float64)
    frequency /= frequency.sum()
    logits = np.where(drawable, (1 - frequency) / rare.temperature, -np.inf)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class _RareClassPasses:
    """Every pass emits n rows with the marginals of DAFormer's draw: c from P, then an image of S_c, those with c.

    Image i has mean m_i = n sum_c P(c) [i in S_c] / |S_c|; systematic resampling gives it floor(m_i) or ceil(m_i)
    emissions, and each draws its class from the posterior P(c | i). Copy j of the c_i copies of an image gets key
    (j + u) / c_i, which spreads them over the pass; u is drawn for each row group, so that images with as many copies
    go together. The pass has R rounds, and the key says in which a copy falls; every round visits row groups in the
    pass's order, so it reads a group at most once, and copies stay about 1 / c_i of a pass apart. R is the number of
    copies that 99 % of the emissions do not exceed, at most 64.
    """

    def __init__(self, group_rows: Ints, seed: tuple[int, int], class_pixels: Ints, rare: RareClass):
        self.group_rows, self.seed, self.length = group_rows, seed, int(group_rows.sum())
        self.group_start = np.cumsum(group_rows) - group_rows
        probability = class_probabilities(class_pixels, rare)
        self.member = class_pixels > rare.min_pixels  # [n, N]
        self.class_weight = probability / np.maximum(self.member.sum(axis=0), 1)
        self.mean = self.member @ self.class_weight
        self.mean *= self.length / self.mean.sum()
        ascending = np.sort(self.mean)
        enough = int(np.searchsorted(np.cumsum(ascending), 0.99 * self.length))
        most = ascending[min(enough, self.length - 1)]
        self.num_rounds = int(np.clip(np.ceil(most), 1, MAX_ROUNDS))
        self._rounds = lru_cache(maxsize=1)(self._plan)

    def rounds(self, number: int) -> list[_Round]:
        return self._rounds(number)

    def _emissions(self, number: int) -> tuple[Ints, Ints]:
        """Images of the pass, each once per copy, and the number of the copy; both [n]."""
        rng = np.random.default_rng((*self.seed, number, 2))
        order = rng.permutation(self.length)
        edges = np.cumsum(self.mean[order])
        edges *= self.length / edges[-1]
        edges[-1] = self.length
        hits = np.floor(edges + rng.random())
        hits[-1] = self.length  # against rounding: exactly n emissions
        counts = np.zeros(self.length, np.int64)
        counts[order] = np.diff(np.minimum(hits, self.length), prepend=0).astype(np.int64)
        return np.repeat(np.arange(self.length), counts), _ramp(counts)

    def _classes(self, number: int, image: Ints, copy: Ints) -> Ints:
        """Class of each emission, from its posterior given the image."""
        draws = _uniform(_random_words((*self.seed, number, 3), image, copy))
        focus = np.empty(len(image), np.int64)
        for begin in range(0, len(image), _EXPAND_ROWS):
            part = slice(begin, begin + _EXPAND_ROWS)
            edges = np.cumsum(self.member[image[part]] * self.class_weight, axis=1)
            focus[part] = (edges <= (draws[part] * edges[:, -1])[:, None]).sum(axis=1)
        return focus

    def _plan(self, number: int) -> list[_Round]:
        image, copy = self._emissions(number)
        counts = np.bincount(image, minlength=self.length)[image]
        group = np.searchsorted(self.group_start, image, "right") - 1
        offset = _uniform(_random_words((*self.seed, number, 4), group))
        when = np.minimum(((copy + offset) / counts * self.num_rounds).astype(np.int64), self.num_rounds - 1)
        rank_of_group = np.random.default_rng((*self.seed, number, 0)).permutation(len(self.group_rows))
        shuffle = _random_words((*self.seed, number, 1), image, copy)
        order = np.lexsort((shuffle, rank_of_group[group], when))
        image, copy, group, when = image[order], copy[order], group[order], when[order]
        focus, row = self._classes(number, image, copy), image - self.group_start[group]
        rounds: list[_Round] = []
        limits = np.searchsorted(when, np.arange(self.num_rounds + 1))
        for begin, end in zip(limits[:-1].tolist(), limits[1:].tolist(), strict=True):
            if begin < end:
                part = group[begin:end]
                starts = np.concatenate([[0], np.flatnonzero(np.diff(part)) + 1, [end - begin]])
                start = number * self.length + begin
                rounds.append(_ListedRound(start, part[starts[:-1]], starts, row[begin:end], focus[begin:end]))
        return rounds


@dataclass(frozen=True)
class _Cut:
    """Windows of one round that a rank needs, sorted by the position of their first row; arrays [windows]."""

    lane: Ints
    first: Ints  # lane's own index
    begin: Ints  # place in the round's row list
    size: Ints
    place: Ints  # position of the first row needed

    def part(self, keep: slice | NDArray) -> _Cut:
        return _Cut(self.lane[keep], self.first[keep], self.begin[keep], self.size[keep], self.place[keep])


class Order:
    """The sequence of one stream. See the module's text.

    `table`: (file, group, rows), int64 [groups] each, as `Manifest.row_group_table()` gives it. `rare` with
    `class_pixels` [n, N] (pixels by row, in the table's order) makes a rare-class stream; without, it is uniform.
    Raises InputError for an empty set, lanes that do not divide the global batch, or pixel counts without a drawable
    class.
    """

    def __init__(
        self,
        table: tuple[Ints, Ints, Ints],
        *,
        seed: int,
        stream: str,
        global_batch: int,
        lanes: int | None = None,
        window_rows: int = 256,
        rare: RareClass | None = None,
        class_pixels: Ints | None = None,
    ):
        file, group, rows = (np.asarray(column, np.int64) for column in table)
        keep = rows > 0
        self.file, self.group, self.group_rows = file[keep], group[keep], rows[keep]
        if not len(self.group_rows):
            raise InputError(f"stream {stream!r}: the shards hold no rows; pack at least one image")
        self.global_batch, self.lanes = global_batch, lanes or default_lanes(global_batch)
        if global_batch % self.lanes:
            fitting = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
            raise InputError(f"data.lanes: {self.lanes} lanes do not divide the global batch of {global_batch} images of "
                             f"stream {stream!r}; use one of {fitting}, or null")
        self.lane_width = global_batch // self.lanes
        self.window_rows, self.stream, self.seed = window_rows, stream, (seed, stream_key(stream))
        self._passes: _UniformPasses | _RareClassPasses = _UniformPasses(self.group_rows, self.seed)
        if rare is not None:
            if class_pixels is None or len(class_pixels) != self._passes.length:
                raise InputError(f"stream {stream!r}: rare-class sampling needs class pixel counts; pack masks too")
            self._passes = _RareClassPasses(self.group_rows, self.seed, np.asarray(class_pixels), rare)
        self.num_rows = self._passes.length

    def lane_count(self, positions: int) -> Ints:
        """How many of the positions [0, positions) each lane has; int64 [L]."""
        whole, rest = divmod(positions, self.global_batch)
        lane = np.arange(self.lanes, dtype=np.int64)
        return whole * self.lane_width + np.clip(rest - lane * self.lane_width, 0, self.lane_width)

    def check_world(self, world: int) -> None:
        """InputError unless `world` ranks can share the lanes."""
        if world < 1 or self.lanes % world:
            fitting = [d for d in range(1, self.lanes + 1) if self.lanes % d == 0]
            raise InputError(
                f"launch.workers: {world} workers cannot share the {self.lanes} lanes of stream {self.stream!r} evenly "
                f"(global batch {self.global_batch}); use one of {fitting} workers, or other data.lanes"
            )

    def windows(
        self, rank: int = 0, world: int = 1, start_step: int = 0, stop_step: int | None = None
    ) -> Iterator[Window]:
        """Windows of `rank`, in the order of their first position, from `start_step` on and, without `stop_step`, for
        ever.

        A lane's windows follow each other without gaps, and the first begins exactly at `start_step`. Starting costs
        at most the planning of one pass. With `stop_step` (exclusive) the last windows may reach beyond it.
        """
        self.check_world(world)
        owned = range(rank * self.lanes // world, (rank + 1) * self.lanes // world)
        number = start_step * self.global_batch // self.num_rows
        while True:
            rounds = self._passes.rounds(number)
            ends = [r.start for r in rounds[1:]] + [(number + 1) * self.num_rows]
            for index, (item, end) in enumerate(zip(rounds, ends, strict=True)):
                if end <= start_step * self.global_batch:
                    continue
                if stop_step is not None and item.start >= stop_step * self.global_batch:
                    return
                cut = self._cut(item, end, owned, start_step, stop_step)
                yield from self._expand(item, cut, (*self.seed, number, 5 + index), start_step)
            number += 1

    def reads(self, rank: int = 0, world: int = 1, start_step: int = 0) -> Iterator[Read]:
        """What `windows` needs from storage, in the same order, one item for each row group of a window."""
        for number, window in enumerate(self.windows(rank, world, start_step)):
            keys = window.file * (int(self.group.max()) + 1) + window.group
            order = np.argsort(keys, kind="stable")
            for places in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
                at = places[0]
                yield Read(number, window.lane, int(window.file[at]), int(window.group[at]), window.row[places], places)

    def rank_rows(self, start_step: int, stop_step: int, rank: int = 0, world: int = 1) -> RankRows:
        """Rows of `rank` in steps [start_step, stop_step)."""
        self.check_world(world)
        width, first_lane = self.global_batch // world, rank * self.lanes // world
        steps = stop_step - start_step
        column = np.arange(width, dtype=np.int64)
        position = np.arange(start_step, stop_step, dtype=np.int64)[:, None] * self.global_batch + rank * width + column
        out = np.full((4, steps * width), -1, np.int64)
        for window in self.windows(rank, world, start_step, stop_step):
            step, within = np.divmod(window.first + np.arange(len(window.row)), self.lane_width)
            keep = step < stop_step
            place = ((step - start_step) * width + (window.lane - first_lane) * self.lane_width + within)[keep]
            for target, source in zip(out, (window.file, window.group, window.row, window.focus), strict=True):
                target[place] = source[keep]
        return RankRows(position, *out.reshape(4, steps, width))

    def _cut(self, item: _Round, end: int, owned: range, start_step: int, stop_step: int | None) -> _Cut:
        """Cut a round's rows into the windows of lanes `owned`.

        A window takes the runs that begin in it, so no row group is read for two windows of a lane. Lane l's grid is
        shifted by l / L of a window: lanes then run out one after another, and reading has no bursts.
        """
        before = self.lane_count(item.start)
        segment = np.concatenate([[0], np.cumsum(self.lane_count(end) - before)])
        low, high = segment[owned.start], segment[owned.stop]
        inner = item.run_start[np.searchsorted(item.run_start, low, "right") : np.searchsorted(item.run_start, high)]
        lane_starts = segment[owned.start : owned.stop]
        begin = np.unique(np.concatenate([inner, lane_starts[lane_starts < high]]))
        lane = np.searchsorted(segment, begin, "right") - 1
        offset = begin - segment[lane]
        grid = (offset + lane * self.window_rows // self.lanes) // self.window_rows
        opens = np.ones(len(begin), bool)
        opens[1:] = (np.diff(lane) != 0) | (np.diff(grid) != 0)
        begin, lane, offset = begin[opens], lane[opens], offset[opens]
        first = before[lane] + offset
        due = np.maximum(first, start_step * self.lane_width)
        place = due // self.lane_width * self.global_batch + lane * self.lane_width + due % self.lane_width
        cut = _Cut(lane, first, begin, np.diff(begin, append=high), place)
        wanted = first + cut.size > start_step * self.lane_width
        if stop_step is not None:
            wanted &= first < stop_step * self.lane_width
        cut = cut.part(wanted)
        return cut.part(np.argsort(cut.place))

    def _expand(self, item: _Round, cut: _Cut, seed: tuple[int, ...], start_step: int) -> Iterator[Window]:
        """Resolve windows to rows, several at a time."""
        ends = np.cumsum(cut.size)
        begin = 0
        while begin < len(ends):
            done = int(ends[begin - 1]) if begin else 0
            stop = max(begin + 1, int(np.searchsorted(ends, done + _EXPAND_ROWS, "right")))
            part = cut.part(slice(begin, stop))
            which, within = np.repeat(np.arange(len(part.size)), part.size), _ramp(part.size)
            words = _random_words(seed, part.first[which], part.lane[which], within)
            index = (part.begin[which] + within)[np.lexsort((words, which))]
            run = np.searchsorted(item.run_start, index, "right") - 1
            row, focus = item.rows(index, run)
            table = item.run_group[run]
            file, group = self.file[table], self.group[table]
            limits = np.concatenate([[0], np.cumsum(part.size)]).tolist()
            for i, (lane, first) in enumerate(zip(part.lane.tolist(), part.first.tolist(), strict=True)):
                skip = max(0, start_step * self.lane_width - first)
                rows = slice(limits[i] + skip, limits[i + 1])
                yield Window(lane, first + skip, file[rows], group[rows], row[rows], focus[rows])
            begin = stop

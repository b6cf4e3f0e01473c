"""Order: passes, lanes, resume and rare-class sampling, against plain definitions."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecocseg.data.order import Order, RareClass, class_probabilities, default_lanes
from ecocseg.errors import InputError


def table(group_sizes, files=2):
    """(file, group, rows) with the groups dealt to a few files."""
    sizes = np.asarray(group_sizes, np.int64)
    file = np.sort(np.arange(len(sizes)) % files)
    group = np.arange(len(sizes)) - np.searchsorted(file, file)
    return file, group, sizes


def row_numbers(order, rows, of):
    """Row number in the set of every (file, group, row)."""
    starts = {(f, g): s for f, g, s in zip(*of[:2], np.cumsum(of[2]) - of[2], strict=True)}
    flat = zip(rows.file.ravel(), rows.group.ravel(), rows.row.ravel(), strict=True)
    return np.array([starts[f, g] + r for f, g, r in flat]).reshape(rows.row.shape)


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def orders(draw):
    global_batch = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 64, 96]))
    groups = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    lanes = draw(st.sampled_from([None, *divisors(global_batch)]))
    of = table(groups, draw(st.integers(1, 4)))
    arguments = {
        "seed": draw(st.integers(0, 2**32)),
        "stream": draw(st.sampled_from(["source", "target"])),
        "global_batch": global_batch,
        "lanes": lanes,
        "window_rows": draw(st.integers(1, 40)),
    }
    if draw(st.booleans()):
        n, classes = sum(groups), draw(st.integers(1, 5))
        pixels = np.random.default_rng(arguments["seed"]).integers(0, 20, (n, classes))
        pixels[0, 0] = 20
        arguments |= {"rare": RareClass(draw(st.sampled_from([0.01, 0.1, 1.0])), 10), "class_pixels": pixels}
    return Order(of, **arguments), of


@settings(max_examples=120, deadline=None)
@given(orders(), st.data())
def test_passes_worlds_and_resume(made, data):
    """Every pass is what it should be; every world and every starting step sees the same global batches."""
    order, of = made
    n, G = order.num_rows, order.global_batch
    steps = min(-(-3 * n // G) + 1, 200)
    whole = order.rank_rows(0, steps)
    assert (whole.position == np.arange(steps * G).reshape(steps, G)).all()
    numbers, focus = row_numbers(order, whole, of), whole.focus.ravel()
    for start in range(0, steps * G - n + 1, n):
        if focus[0] < 0:
            assert sorted(numbers.ravel()[start : start + n]) == list(range(n))
        else:
            counts = np.bincount(numbers.ravel()[start : start + n], minlength=n)
            assert (np.abs(counts - order._passes.mean) < 1 + 1e-6).all()
            assert order._passes.member[numbers.ravel(), focus].all()
    world = data.draw(st.sampled_from(divisors(order.lanes)))
    begin = data.draw(st.integers(0, steps - 1))
    parts = [order.rank_rows(begin, steps, rank, world) for rank in range(world)]
    for name in ("position", "file", "group", "row", "focus"):
        assert (np.concatenate([getattr(p, name) for p in parts], axis=1) == getattr(whole, name)[begin:]).all(), name


@settings(max_examples=40, deadline=None)
@given(orders(), st.data())
def test_windows_are_gapless_and_reads_cover_them(made, data):
    """A rank's windows follow each other lane by lane, come in the order of need, and `reads` names their rows."""
    order, _ = made
    world = data.draw(st.sampled_from(divisors(order.lanes)))
    rank, start = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, 50))
    windows = [w for w, _ in zip(order.windows(rank, world, start), range(60), strict=False)]
    width, expected, last = order.lane_width, {}, -1
    for window in windows:
        assert rank * order.lanes // world <= window.lane < (rank + 1) * order.lanes // world
        assert window.first == expected.get(window.lane, start * width)
        expected[window.lane] = window.first + len(window.row)
        place = window.first // width * order.global_batch + window.lane * width + window.first % width
        assert place > last
        last = place
    for read in order.reads(rank, world, start):
        if read.window >= len(windows):
            break
        window = windows[read.window]
        assert (window.file[read.order] == read.file).all() and (window.group[read.order] == read.group).all()
        assert (window.row[read.order] == read.rows).all()


def test_lane_counts_are_those_of_the_definition():
    order = Order(table([5]), seed=0, stream="s", global_batch=12, lanes=4)
    for positions in range(40):
        lane = np.arange(positions) % 12 // 3
        assert (order.lane_count(positions) == np.bincount(lane, minlength=4)).all()


def test_no_row_group_is_read_twice_in_a_pass_by_a_lane():
    """But for groups cut between two lanes, one pass reads every group once."""
    of = table([32] * 300)
    order = Order(of, seed=3, stream="s", global_batch=8, window_rows=100)
    windows = order.windows(stop_step=1200)
    reads = [(w.lane, f, g) for w in windows for f, g in {*zip(w.file.tolist(), w.group.tolist(), strict=True)}]
    assert len(reads) == len(set(reads)) <= 300 + 8


def test_order_changes_with_pass_seed_and_stream():
    def batches(**change):
        arguments = {"seed": 0, "stream": "a", "global_batch": 4} | change
        return Order(table([10] * 6), **arguments).rank_rows(0, 30)

    base = batches()
    first, second = base.group[:15] * 10 + base.row[:15], base.group[15:] * 10 + base.row[15:]
    assert (first != second).mean() > 0.5
    for change in ({"seed": 1}, {"stream": "b"}):
        assert (batches(**change).row != base.row).mean() > 0.5


def test_rows_mix_within_and_across_groups():
    """Neighbours in a global batch come from different row groups, and no place of a pass is fixed to a row."""
    order = Order(table([32] * 64), seed=0, stream="s", global_batch=16, window_rows=128)
    rows = order.rank_rows(0, 128)
    distinct = [len({*zip(f, g, strict=True)}) for f, g in zip(rows.file, rows.group, strict=True)]
    assert np.mean(distinct) > 12
    neighbours = (np.diff(rows.row[:, 0]) == 1).mean()
    assert neighbours < 0.15


def test_rare_class_frequencies_match_the_formula():
    """Over many passes: class c with P(c), then uniformly an image that has it, as drawing in two steps gives."""
    rng = np.random.default_rng(0)
    n, N = 120, 5
    pixels = rng.integers(3001, 9000, (n, N)) * (rng.random((n, N)) < [1, 0.9, 0.4, 0.1, 0])
    pixels[:, 0] *= 20
    rare = RareClass(temperature=0.3)
    of = table([16] * 7 + [8])
    order = Order(of, seed=5, stream="s", global_batch=8, rare=rare, class_pixels=pixels)
    passes = 400
    rows = order.rank_rows(0, passes * n // 8)
    numbers, focus = row_numbers(order, rows, of).ravel(), rows.focus.ravel()

    frequency = pixels.sum(0) / pixels.sum()
    weights = np.exp((1 - frequency) / rare.temperature) * [1, 1, 1, 1, 0]  # no image has class 4
    probability = weights / weights.sum()
    member = pixels > 3000
    joint = member * (probability / np.maximum(member.sum(0), 1))
    drawn = np.zeros((n, N))
    np.add.at(drawn, (numbers, focus), 1)
    drawn /= len(numbers)
    assert np.abs(drawn.sum(1) - joint.sum(1)).max() * n < 4.5 * 0.5 / np.sqrt(passes)  # copies of each image per pass
    assert np.allclose(drawn.sum(0), probability, atol=0.006)
    assert np.abs(drawn - joint).max() < 5 * np.sqrt(joint.max() / len(numbers))


def test_rare_class_copies_are_spread_over_the_pass():
    """An image with about 8 copies in 4000 rows: gaps like 1/8 of the pass, never two copies close together."""
    n = 4096
    pixels = np.zeros((n, 2), np.int64)
    pixels[:, 0] = 10_000
    pixels[::16, 1] = 5_000  # 256 images carry half of the emissions: 8 copies each
    rare = {"rare": RareClass(temperature=1e9), "class_pixels": pixels}
    order = Order(table([32] * 128), seed=1, stream="s", global_batch=4, window_rows=64, **rare)
    assert order._passes.num_rounds >= 4
    rows = order.rank_rows(0, n // 4)
    numbers = row_numbers(order, rows, table([32] * 128)).ravel()
    gaps = [np.diff(np.flatnonzero(numbers == i)) for i in range(0, n, 16)]
    assert 7 <= np.mean([len(g) + 1 for g in gaps]) <= 9.5
    gaps = np.concatenate(gaps)
    assert np.median(gaps) > n / 8 / 2
    assert (gaps < n / 8 / 4).mean() < 0.06  # independent draws would have 1 - exp(-8 / 32) = 22 % here


def test_absent_classes_give_their_probability_to_the_others():
    pixels = np.array([[9000, 0, 4000], [9000, 100, 0]])
    probability = class_probabilities(pixels, RareClass(1.0, 3000))
    assert probability[1] == 0 and probability.sum() == pytest.approx(1)
    full = np.exp(1 - pixels.sum(0) / pixels.sum())
    assert probability[0] / probability[2] == pytest.approx(full[0] / full[2])
    with pytest.raises(InputError, match="more than 20000 pixels"):
        class_probabilities(pixels, RareClass(1.0, 20_000))


def test_default_lanes():
    assert [default_lanes(g) for g in (1, 7, 64, 65, 96, 128, 134, 1024)] == [1, 7, 64, 13, 48, 64, 2, 64]


def test_messages_name_what_fits():
    order = Order(table([8]), seed=0, stream="s", global_batch=12)
    with pytest.raises(InputError, match=r"5 workers.*\[1, 2, 3, 4, 6, 12\]"):
        order.rank_rows(0, 1, 0, 5)
    with pytest.raises(InputError, match="data.lanes: 5 lanes"):
        Order(table([8]), seed=0, stream="s", global_batch=12, lanes=5)
    with pytest.raises(InputError, match="no rows"):
        Order(table([0]), seed=0, stream="s", global_batch=4)
    with pytest.raises(InputError, match="class pixel"):
        Order(table([8]), seed=0, stream="s", global_batch=4, rare=RareClass())


def test_a_large_pool_starts_anywhere_at_once():
    """100 million rows, step in the 8th pass: only row groups are counted, no row is enumerated."""
    groups = 200_000
    of = (np.arange(groups) // 500, np.arange(groups) % 500, np.full(groups, 500))
    tracemalloc.start()
    order = Order(of, seed=0, stream="s", global_batch=64)
    rows = order.rank_rows(12_000_000, 12_000_010, 1, 4)
    assert rows.row.shape == (10, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # a number for each row would be 800 MB

"""Streams: batches against the order, whichever loader, worker count or starting step; errors; memory; closing."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from conftest import damage_rows
from PIL import Image

from ecocseg.data import reading
from ecocseg.data.classes import ClassList
from ecocseg.data.order import RareClass, stream_key
from ecocseg.data.pipeline import Stream
from ecocseg.data.pixels import class_pixel_array
from ecocseg.data.shards import Record, read_manifest, read_metadata, write_shards
from ecocseg.data.transforms import WeakTransform
from ecocseg.errors import InputError

CLASSES = ClassList("demo", ("a", "b", "c", "d"), ((0, 0, 0), (9, 9, 9), (99, 0, 0), (0, 99, 0)))
CROP = WeakTransform(crop=(24, 32), scale=(0.8, 1.5), min_class_pixels=20)
ROWS = 90


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def records(count, seed=0, labelled=True):
    rng = np.random.default_rng(seed)
    for i in range(count):
        image = rng.integers(0, 256, (30 + i % 3, 40, 3), np.uint8)
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[:, 20:] = 1 + i % 2
        if i % 10 == 0:
            mask[:8, :8] = 3
        yield Record(f"image-{i}", png(image), png(mask) if labelled else None)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    where = str(tmp_path_factory.mktemp("shards"))
    write_shards(records(ROWS), where, dataset="demo", classes=CLASSES, shard_bytes=120_000, row_group_rows=8)
    made = read_manifest(where)
    assert len(made.files) > 1
    return made


def stream(manifest, **change):
    arguments = {"name": "source", "seed": 3, "global_batch": 8, "transform": CROP, "loader": "torch"} | change
    return Stream(manifest, **arguments)


def take(source, steps):
    with source:
        return list(islice(source, steps))


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip([b for step in one for b in step], [b for step in other for b in step], strict=True):
        assert a.image_ids == b.image_ids
        for name in ("image", "labels", "valid", "positions"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("sampling", ["uniform", "rare_class"])
def test_batches_are_the_orders_rows_transformed(manifest, sampling):
    """Every sample equals the transform called by hand on the row that the order names, seeded by its position."""
    source = stream(manifest, sampling=sampling, rare_class=RareClass(0.2, 50), micro_batches=2)
    steps = 2 * ROWS // 8
    batches = take(source, steps)
    rows = source.order.rank_rows(0, steps)
    table = read_metadata(manifest, ["image_id", "image", "mask"]).to_pylist()
    file, group, size = manifest.row_group_table()
    starts = dict(zip(zip(file.tolist(), group.tolist(), strict=True), (np.cumsum(size) - size).tolist(), strict=True))
    for step, parts in enumerate(batches):
        assert [len(p.image_ids) for p in parts] == [4, 4]
        assert torch.cat([p.positions for p in parts]).tolist() == list(range(step * 8, step * 8 + 8))
        for j in range(8):
            part, i = parts[j // 4], j % 4
            row = table[starts[int(rows.file[step, j]), int(rows.group[step, j])] + int(rows.row[step, j])]
            focus = int(rows.focus[step, j])
            rng = np.random.default_rng([3, stream_key("source"), step * 8 + j])
            sample = CROP(row["image"], row["mask"], rng, focus if focus >= 0 else None)
            assert part.image_ids[i] == row["image_id"]
            assert (part.image[i].numpy() == sample.image).all()
            assert (part.labels[i].numpy() == sample.labels).all() and part.labels.dtype == torch.int64
            assert (part.valid[i].numpy() == sample.valid).all()


def test_workers_share_a_global_batch_and_any_step_can_begin(manifest):
    whole = take(stream(manifest), 30)
    for world in (1, 2, 4, 8):
        for start in (0, 7, 23):
            parts = [take(stream(manifest, rank=r, world=world, start_step=start), 4) for r in range(world)]
            for step in range(4):
                expected = whole[start + step][0]
                assert sum((p[step][0].image_ids for p in parts), []) == expected.image_ids
                assert torch.equal(torch.cat([p[step][0].image for p in parts]), expected.image)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A set of 32 rows and one of 10,000, both labelled."""
    picture, mask = png(np.zeros((8, 8, 3), np.uint8)), png(np.zeros((8, 8), np.uint8))
    found = {}
    for count in (32, 10_000):
        where = str(tmp_path_factory.mktemp(f"rows-{count}"))
        write_shards((Record(f"{count}-{i}", picture, mask) for i in range(count)), where, dataset="demo", classes=CLASSES,
                     row_group_rows=32)
        found[count] = read_manifest(where)
    return found


@pytest.fixture(scope="module")
def local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(("labeled", "loader"), [(32, "torch"), (10_000, "torch"), (32, "ray"),
                                                 pytest.param(10_000, "ray", marks=pytest.mark.slow)])
def test_streams_of_unequal_length_go_on_together(sizes, labeled, loader, local_ray):
    """32 rows beside 10,000, two workers that wait for each other at every step: each stream cycles by itself."""
    counts, steps, width = {"labeled": labeled, "unlabeled": 10_032 - labeled}, 40, 16
    together, seen = threading.Barrier(2, timeout=60), [{name: [] for name in counts} for _ in range(2)]
    with ExitStack() as stack:
        streams = [{name: iter(stack.enter_context(
            stream(sizes[count], name=name, global_batch=width, transform=WeakTransform(crop=(8, 8)), rank=rank, world=2,
                   loader=loader)))
            for name, count in counts.items()} for rank in range(2)]

        def work(rank):
            for _ in range(steps):
                for name, batches in streams[rank].items():
                    seen[rank][name].append(next(batches)[0].image_ids)
                together.wait()

        with ThreadPoolExecutor(2) as workers:
            for done in [workers.submit(work, rank) for rank in range(2)]:
                done.result()
    for name, count in counts.items():
        rows = [row for step in range(steps) for rank in range(2) for row in seen[rank][name][step]]
        assert len(rows) == steps * width
        for first in range(0, len(rows), count):
            assert len(set(rows[first:first + count])) == min(count, len(rows) - first)  # no row twice in a pass


def test_a_pass_is_a_permutation_and_passes_need_no_restart(manifest):
    batches = take(stream(manifest, global_batch=6, columns=("image",)), 4 * ROWS // 6)
    assert all(b[0].labels is None for b in batches)
    ids = [i for b in batches for i in b[0].image_ids]
    for begin in range(0, 4 * ROWS, ROWS):
        assert len(set(ids[begin : begin + ROWS])) == ROWS


def test_tiny_sets_are_read_in_few_portions(tmp_path, monkeypatch):
    """5 rows, hundreds of passes: portions span passes, and each ships a row once."""
    write_shards(records(5), str(tmp_path), dataset="demo", classes=CLASSES, row_group_rows=2)
    manifest, sizes = read_manifest(str(tmp_path)), []
    plain = reading.read_rows

    def counted(request, **rest):
        sizes.append(request.shape[1])
        return plain(request, **rest)

    monkeypatch.setattr("ecocseg.data.pipeline.read_rows", counted)
    batches = take(stream(manifest, global_batch=16), 100)
    ids = [i for b in batches for i in b[0].image_ids]
    assert all(len(set(ids[i : i + 5])) == 5 for i in range(0, 1600, 5))
    assert max(sizes) <= 5 and len(sizes) <= 2 + 4 * reading.READ_TASKS


def test_small_sets_are_not_planned_far_ahead(tmp_path, monkeypatch):
    """Rows and bytes do not bound what 5 rows may serve; what is planned before the first batch is bounded all the same."""
    write_shards(records(5), str(tmp_path), dataset="demo", classes=CLASSES, row_group_rows=2)
    planned = []
    monkeypatch.setattr(reading, "_close_item", lambda *a, made=reading._close_item: planned.append(made(*a)) or planned[-1])
    with stream(read_manifest(str(tmp_path))) as source:
        next(source)
        time.sleep(0.2)
        assert sum(item.uses for item in planned) < 2 * reading.ITEM_USES


def test_what_is_read_ahead_is_bounded(manifest, monkeypatch):
    """A consumer that stops taking stops the reading."""
    monkeypatch.setattr(reading, "ITEM_ROWS", 8)
    count = []
    plain = reading.read_rows
    monkeypatch.setattr("ecocseg.data.pipeline.read_rows", lambda *a, **k: count.append(1) or plain(*a, **k))
    with stream(manifest, prefetch_bytes=1, global_batch=2) as source:
        next(source)
        time.sleep(0.5)
        seen = len(count)
        assert seen <= ROWS // 8 + 6  # both lanes' windows hold the whole set
        time.sleep(0.3)
        assert len(count) == seen


def test_unlabelled_rows_give_ignored_labels(tmp_path):
    write_shards(records(4, labelled=False), str(tmp_path), dataset="demo", classes=CLASSES)
    batch = take(stream(read_manifest(str(tmp_path)), global_batch=4), 1)[0][0]
    assert (batch.labels == 255).all()


def test_class_pixels_of_unlabelled_rows_count_nothing():
    kind = pa.list_(pa.int64())
    column = pa.chunked_array([pa.array([[1, 2], None], kind), pa.array([[3, 4]], kind)])
    assert class_pixel_array(column, 2).tolist() == [[1, 2], [0, 0], [3, 4]]
    assert class_pixel_array(pa.chunked_array([pa.array([None], kind)]), 2).tolist() == [[0, 0]]


def damaged_set(where):
    """8 rows: the image of one is cut, the mask of one has an id too many, that of another is of another size."""
    rows = list(records(8))
    odd = np.asarray(Image.open(io.BytesIO(rows[2].mask))).copy()
    odd[:] = 4
    write_shards(rows, str(where), dataset="demo", classes=CLASSES, row_group_rows=3)
    damage_rows(str(where), {
        7: {"image_id": "broken-7", "image": rows[7].image[:60]}, 2: {"image_id": "broken-2", "mask": png(odd)},
        5: {"image_id": "broken-5", "mask": png(np.zeros((8, 8), np.uint8))}})
    return read_manifest(str(where))


@pytest.mark.parametrize("decode", ["beside", "ray"])
def test_damaged_rows_are_put_aside(tmp_path, decode, local_ray):
    """Their places are padding, all other samples are as without damage, and each is named once by shard and row."""
    manifest = damaged_set(tmp_path / "bad")
    write_shards(records(8), str(tmp_path / "good"), dataset="demo", classes=CLASSES, row_group_rows=3)
    with stream(manifest, damage_limit=0.5, decode=decode) as source:
        batches = list(islice(source, 3))
        damaged = source.damaged
    whole = take(stream(read_manifest(str(tmp_path / "good"))), 3)
    for (batch,), (good,) in zip(batches, whole, strict=True):
        for i, name in enumerate(batch.image_ids):
            if name.startswith("broken"):
                assert not batch.valid[i].any() and (batch.labels[i] == 255).all() and not batch.image[i].any()
            else:
                assert name == good.image_ids[i] and torch.equal(batch.image[i], good.image[i])
                assert torch.equal(batch.labels[i], good.labels[i]) and torch.equal(batch.valid[i], good.valid[i])
    assert sorted(row for _, row in damaged) == [2, 5, 7]
    assert {shard for shard, _ in damaged} == {manifest.files[0].name}
    text = "\n".join(damaged.values())
    assert "holds id 4" in text and "does not decode" in text and "8x8" in text


def test_too_many_damaged_rows_end_the_stream_by_name(tmp_path):
    manifest = damaged_set(tmp_path)
    with pytest.raises(InputError, match=r"(?s)3 damaged row\(s\).*the 2 of 8 that data.damage_limit.*row 2: .*broken-2"):
        take(stream(manifest, damage_limit=0.25), 3)


def test_a_missing_shard_reaches_the_consumer_by_name(tmp_path):
    write_shards(records(8), str(tmp_path), dataset="demo", classes=CLASSES)
    manifest = read_manifest(str(tmp_path))
    (tmp_path / manifest.files[0].name).unlink()
    with pytest.raises(InputError, match=manifest.files[0].name):
        take(stream(manifest), 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"world": 3}, r"3 workers.*\[1, 2, 4, 8\]"),
        ({"micro_batches": 3}, r"3 equal micro-batches; use one of \[1, 2, 4, 8\]"),
        ({"loader": "tf"}, "data.loader='tf'"),
        ({"sampling": "odd"}, "sampling='odd'"),
        ({"sampling": "rare_class", "rare_class": RareClass(min_pixels=10**6)}, "more than 1000000 pixels"),
    ],
)
def test_bad_arguments_say_what_fits(manifest, change, message):
    with pytest.raises(InputError, match=message):
        stream(manifest, **change)


@pytest.mark.parametrize("stage", ["reading", "decoding"])
def test_the_watchdog_names_the_stage(manifest, monkeypatch, stage):
    held = threading.Event()
    if stage == "reading":
        monkeypatch.setattr("ecocseg.data.pipeline.read_rows", lambda *a, **k: held.wait(20))
    else:
        monkeypatch.setattr(Stream, "_decode", lambda *a: held.wait(20))
    source = stream(manifest, timeout_s=0.6)
    warnings = []
    source.warn = warnings.append
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match=f"'source', step 0, worker 0: no batch for 0.6 s, stuck while {stage}"):
        next(source)
    held.set()
    (warning,) = warnings
    assert f"no batch for 0.3 s, stuck while {stage}" in warning
    assert time.perf_counter() - began < 8
    assert source.wait_seconds >= 0.6


def test_closing_ends_the_threads(manifest):
    before = set(threading.enumerate())
    source = stream(manifest)
    next(source)
    source.close()
    source.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(source)
    deadline = time.time() + 5
    while time.time() < deadline and set(threading.enumerate()) - before:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before


def test_the_seed_decides_on_order_and_crops(manifest):
    one, again, other = (take(stream(manifest, seed=s), 5) for s in (3, 3, 4))
    same(one, again)
    assert any(a[0].image_ids != b[0].image_ids for a, b in zip(one, other, strict=True))


def test_ray_gives_the_same_batches(manifest, monkeypatch, local_ray):
    """Several executions in a row, both ends of a resume, two workers, errors: as with threads, batch by batch."""
    monkeypatch.setattr(reading, "EXECUTION_ITEMS", (2, 3))
    monkeypatch.setattr(reading, "ITEM_ROWS", 24)
    rare = {"sampling": "rare_class", "rare_class": RareClass(0.2, 50)}
    same(take(stream(manifest, loader="ray"), 25), take(stream(manifest), 25))
    part = {"start_step": 9, "rank": 1, "world": 2} | rare
    same(take(stream(manifest, loader="ray", **part), 6), take(stream(manifest, **part), 6))
    same(take(stream(manifest, decode="ray", decode_threads=3, **part), 6), take(stream(manifest, **part), 6))
    missing = read_manifest(manifest.url)
    object.__setattr__(missing, "url", manifest.url + "-gone")
    with pytest.raises(InputError, match="gone"):
        next(stream(missing, loader="ray"))

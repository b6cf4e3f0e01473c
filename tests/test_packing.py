"""Packing: the same shards by one process or many, after any end, and never half a one; bad files named together."""

from __future__ import annotations

import http.client
import importlib.util
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from ecocseg.data import packing
from ecocseg.data.packing_plan import Settings, plan
from ecocseg.data.packing_shard import Packed, task_of
from ecocseg.data.reencoding import changed
from ecocseg.data.shards import ROW_GROUP_BYTES, Record, ShardBuilder, check_files, iter_rows, read_manifest
from ecocseg.data.sources import change, folder, images
from ecocseg.data.sources.pairs import Pair, id_table, read_pair
from ecocseg.errors import InputError, run_main
from ecocseg.storage import Storage, join

SCRIPT = Path(__file__).resolve().parents[1] / "jobs" / "prepare_shards.py"
NAMES = ("ground", "sky", "tree")
SMALL = 100_000
"""Bytes of a shard of about four test images."""


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def scene(seed: int, size: tuple[int, int] = (80, 100)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 3, size).astype(np.uint8)
    mask[:4] = 255
    return rng.integers(0, 256, (*size, 3), np.uint8), mask


def make(root: Path, count: int, size: tuple[int, int] = (80, 100)) -> Path:
    """A folder of images of noise, 24 kB each at 80 x 100, and masks."""
    for i in range(count):
        image, mask = scene(i, size)
        save(root / "images" / f"im-{i:03d}.png", image)
        save(root / "masks" / f"im-{i:03d}.png", mask)
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "raw", 18)


def listed(root: Path):
    return folder.source(root, root / "classes.txt")


def files(where: Path) -> dict[str, bytes]:
    return {path.relative_to(where).as_posix(): path.read_bytes() for path in sorted(where.rglob("*")) if path.is_file()}


def times(where: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in where.glob("shard-*.parquet")}


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("prepare_shards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(job, capsys):
    def call(*arguments):
        code = run_main(lambda: job.main([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return call


def test_parallel_and_serial_give_the_same_bytes(root, tmp_path):
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        seen = []
        packing.pack(listed(root), str(tmp_path / "many"), shard_bytes=SMALL, workers=2,
                     progress=lambda *counts: seen.append(counts))
    finally:
        ray.shutdown()
    one = packing.pack(listed(root), str(tmp_path / "one"), shard_bytes=SMALL, workers=1)
    many = read_manifest(str(tmp_path / "many"))
    assert len(one.files) == 5 and many.files == one.files and many.hash == one.hash
    for file in one.files:
        assert (tmp_path / "many" / file.name).read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    assert seen[0] == (0, 18, 0) and seen[-1] == (18, 18, sum(file.bytes for file in one.files)) and len(seen) == 6


def test_a_task_answers_with_problems_and_errors_as_data(root, tmp_path):
    (root / "masks" / "im-003.png").write_bytes(b"")
    (tmp_path / "file").write_text("")
    part = plan(listed(root), str(tmp_path / "out"))
    shard = part.shards[0]

    def answer(count: int, place: str) -> dict:
        task = task_of(replace(part, destination=str(tmp_path / place)), skip_bad=False, threads=1)
        jobs = pa.table({"job": [pickle.dumps((0, replace(shard, entries=shard.entries[:count])))]})
        return packing._block(jobs, [task]).to_pylist()[0]

    bad = answer(18, "out")
    assert not bad["error"] and [image_id for image_id, _ in Packed.from_json(bad["packed"]).problems] == ["im-003"]
    assert "cannot write" in answer(1, "file")["error"]


def test_what_is_packed_is_what_is_there(root, tmp_path):
    manifest = packing.pack(listed(root), str(tmp_path / "out"), shard_bytes=SMALL)
    assert files(tmp_path / "out").keys() == {"manifest.json", "class_pixels.arrow", *(file.name for file in manifest.files)}
    assert read_manifest(str(tmp_path / "out")) == manifest and manifest.num_labeled == manifest.num_rows == 18
    totals = np.zeros(3, np.int64)
    for i, row in enumerate(iter_rows(manifest, columns=["image_id", "image", "mask", "class_pixels"])):
        path = root / "images" / f"im-{i:03d}.png"
        assert row["image_id"] == path.stem and row["image"] == path.read_bytes()
        assert row["mask"] == (root / "masks" / path.name).read_bytes()
        totals += np.bincount(scene(i)[1].reshape(-1), minlength=256)[:3]
    assert manifest.class_pixels == tuple(totals) and manifest.options["pixel_scale"] == 1.0
    for file in manifest.files[:-1]:
        assert abs(file.bytes - SMALL) < 40_000


def command(*arguments) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def test_a_killed_packing_goes_on_where_it_was(tmp_path):
    root = make(tmp_path / "raw", 100, (256, 300))  # 230 kB each: 25 shards of 1 MiB
    arguments = ("folder", root, "--classes", root / "classes.txt", "--shard-mb", 1, "--workers", 1, "--out")
    process = subprocess.Popen(command(*arguments, tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    notes, deadline = tmp_path / "out" / ".packing", time.monotonic() + 60
    while len(list(notes.glob("shard-*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = [f"{note.stem}.parquet" for note in notes.glob("shard-*.json")]
    before = times(tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists() and 3 <= len(done) < 25
    (tmp_path / "out" / "shard-00024.parquet.0a1b2c3d.part").write_bytes(b"cut off")
    again = subprocess.run(command(*arguments, tmp_path / "out"), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "going on: " in again.stderr and "100 images were packed before" in again.stderr
    after = times(tmp_path / "out")
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    packing.pack(listed(root), str(tmp_path / "undisturbed"), shard_bytes=1 << 20)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_a_shard_is_redone_when_it_is_damaged_or_its_files_changed(root, tmp_path):
    out = tmp_path / "out"
    (root / "images" / "im-017.png").write_bytes(b"bad")  # so that there is no manifest
    with pytest.raises(packing.SourceProblems, match="4 of 5 shard"):
        packing.pack(listed(root), str(out), shard_bytes=SMALL)
    before = times(out)
    assert sorted(before) == [f"shard-{i:05d}.parquet" for i in range(4)]
    os.truncate(out / "shard-00001.parquet", 100)
    save(root / "images" / "im-010.png", scene(77)[0])
    save(root / "images" / "im-017.png", scene(17)[0])
    manifest = packing.pack(listed(root), str(out), shard_bytes=SMALL)
    after = times(out)
    assert [after[name] == before[name] for name in sorted(before)] == [True, False, False, True]
    rows = {row["image_id"]: row["image"] for row in iter_rows(manifest)}
    assert len(rows) == 18 and rows["im-010"] == (root / "images" / "im-010.png").read_bytes()


def test_the_same_command_again_does_nothing_another_one_asks(root, tmp_path, run):
    arguments = ("folder", root, "--classes", root / "classes.txt", "--out", tmp_path / "out")
    assert run(*arguments)[0] == 0
    before = times(tmp_path / "out")
    code, printed, _ = run(*arguments)
    assert code == 0 and "18 images, 18 labelled" in printed and times(tmp_path / "out") == before
    code, _, message = run(*arguments, "--jpeg-quality", 90)
    assert code == 2 and "give --overwrite" in message and times(tmp_path / "out") == before
    (tmp_path / "out" / "shard-00000.parquet").unlink()
    code, _, message = run(*arguments)
    assert code == 2 and "or damaged ones; give --overwrite" in message
    assert run(*arguments, "--overwrite")[0] == 0 and len(times(tmp_path / "out")) == 1
    assert run(*arguments, "--overwrite", "--jpeg-quality", 90)[0] == 0
    assert read_manifest(str(tmp_path / "out")).options["jpeg_quality"] == 90


def test_bad_files_are_named_together_and_the_rest_is_kept(root, tmp_path, run):
    arguments = ("folder", root, "--classes", root / "classes.txt", "--row-group-rows", 2, "--out", tmp_path / "out")
    cut = root / "images" / "im-000.png"
    cut.write_bytes(cut.read_bytes()[:500])
    save(root / "masks" / "im-009.png", np.zeros((9, 9), np.uint8))
    save(root / "masks" / "im-013.png", np.full((80, 100), 3, np.uint8))
    code, _, message = run(*arguments)
    assert code == 2 and "3 problem(s) in the source" in message and "there is no manifest yet" in message
    for part in ("im-000.png: the image does not decode", "im-009.png: the mask is 9 x 9, the image 100 x 80",
                 "im-013.png: unknown id(s) 3", "known ids are 0, 1, 2 and 255"):
        assert part in message
    assert not (tmp_path / "out" / "manifest.json").exists()
    code, printed, _ = run(*arguments, "--skip-bad")
    manifest = read_manifest(str(tmp_path / "out"))
    assert code == 0 and "15 images" in printed and "3 file(s) left out, see skipped.txt" in printed
    assert manifest.num_rows == 15 and len(manifest.options["skipped"]) == 3
    assert [line.split(":")[0] for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines()] == [
        "im-000", "im-009", "im-013"]
    assert "im-009" not in [row["image_id"] for row in iter_rows(manifest)]
    for i in (0, 9, 13):
        save(root / "images" / f"im-{i:03d}.png", scene(i)[0])
        save(root / "masks" / f"im-{i:03d}.png", scene(i)[1])
    assert run(*arguments)[0] == 2  # the set without them is another one
    assert run(*arguments, "--overwrite")[0] == 0 and not (tmp_path / "out" / "skipped.txt").exists()
    assert read_manifest(str(tmp_path / "out")).num_rows == 18


def test_names_that_do_not_fit_can_be_left_out(root, tmp_path, run):
    (root / "masks" / "im-004.png").unlink()
    arguments = ("folder", root, "--classes", root / "classes.txt", "--out", tmp_path / "out")
    code, printed, message = run(*arguments, "--dry-run")
    assert code == 2 and "im-004.png has no mask" in message and "17 images, 17 labelled" in printed
    assert run(*arguments)[0] == 2 and run(*arguments, "--skip-bad")[0] == 0
    assert "im-004.png has no mask" in (tmp_path / "out" / "skipped.txt").read_text()


def test_nothing_good_is_no_set(root, tmp_path):
    for path in (root / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="there is no image to pack"):
        packing.pack(listed(root), str(tmp_path / "out"), skip_bad=True)


def test_image_ids_are_unique(root, tmp_path):
    source = listed(root)
    with pytest.raises(InputError, match=r"1 image id\(s\) come twice, first 'im-003'"):
        packing.pack(replace(source, entries=[*source.entries, source.entries[3]]), str(tmp_path / "out"))


def broken_reader(pair: Pair) -> Record:
    raise KeyError(pair.image_id)


def test_an_error_of_a_reader_names_the_image(root, tmp_path):
    with pytest.raises(RuntimeError, match=r"packing 'im-000' from .*im-000.png: KeyError"):
        packing.pack(replace(listed(root), read=broken_reader), str(tmp_path / "out"))


def test_dry_run_counts_and_writes_nothing(root, tmp_path, run):
    arguments = ("folder", root, "--classes", root / "classes.txt", "--out", tmp_path / "out", "--dry-run")
    code, printed, _ = run(*arguments)
    size = sum(path.stat().st_size for name in ("images", "masks") for path in (root / name).iterdir())
    assert code == 0 and f"18 images, 18 labelled, {size / 2**20:.1f} MiB of files, 1 shard(s)" in printed
    assert "18 images, 0 labelled" in run(*arguments, "--unlabeled")[1]
    assert not (tmp_path / "out").exists()


def test_reduced_images_and_masks(tmp_path):
    """A mask keeps ids of its own pixels, an image the mean of them; what is small enough stays as it is."""
    ids = np.kron(np.random.default_rng(0).integers(0, 3, (10, 12)).astype(np.uint8), np.ones((12, 12), np.uint8))
    shades = np.array([[10, 20, 30], [200, 100, 50], [90, 90, 250]], np.uint8)
    save(tmp_path / "images" / "large.png", shades[ids])
    save(tmp_path / "masks" / "large.png", ids)
    save(tmp_path / "images" / "small.jpg", scene(0, (20, 30))[0])
    save(tmp_path / "masks" / "small.png", scene(0, (20, 30))[1])
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    manifest = packing.pack(listed(tmp_path), str(tmp_path / "out"), max_side=48)
    large, small = iter_rows(manifest, columns=["image", "mask", "height", "width", "class_pixels"])
    assert (large["height"], large["width"]) == (40, 48)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(large["mask"]))), ids[1::3, 1::3])
    assert large["class_pixels"] == np.bincount(ids[1::3, 1::3].reshape(-1), minlength=3).tolist()
    image = Image.open(io.BytesIO(large["image"]))
    assert image.format == "PNG" and np.abs(np.asarray(image, int) - shades[ids[1::3, 1::3]]).mean() < 12
    assert small["image"] == (tmp_path / "images" / "small.jpg").read_bytes()
    assert small["mask"] == (tmp_path / "masks" / "small.png").read_bytes()
    assert manifest.options["pixel_scale"] == pytest.approx((40 * 48 + 600) / (120 * 144 + 600))
    assert manifest.options["max_side"] == 48 and manifest.options["jpeg_quality"] is None


def encode(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


CLASSES = folder.read_classes("voc").classes


def test_reencoded_images():
    smooth = np.linspace(0, 255, 60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8)
    mask = encode(np.zeros((60, 80), np.uint8))
    for quality, limit in ((95, 2), (30, 8)):
        record, found = changed(Record("a", encode(smooth), mask), CLASSES, None, quality, "a")
        image = Image.open(io.BytesIO(record.image))
        assert image.format == "JPEG" and found == 4800 and record.mask == mask
        assert np.abs(np.asarray(image, int) - smooth).mean() < limit
    record, _ = changed(Record("a", encode(smooth, "JPEG", quality=90), mask), CLASSES, 40, None, "a")
    image = Image.open(io.BytesIO(record.image))
    assert image.format == "JPEG" and image.size == (40, 30)
    same, _ = changed(Record("a", encode(smooth), mask), CLASSES, 80, None, "a")
    assert same.image == encode(smooth) and same.mask == mask


def test_images_of_16_bits_keep_them_or_are_refused():
    values = np.kron(np.array([[0, 30000], [65535, 1000]], np.uint16), np.ones((8, 8), np.uint16))
    record, _ = changed(Record("a", encode(values)), CLASSES, 4, None, "a")
    image = np.asarray(Image.open(io.BytesIO(record.image)))
    assert image.shape == (4, 4) and np.abs(image[::3, ::3].astype(int) - values[::8, ::8]).max() < 3000
    with pytest.raises(InputError, match=r"a: an image of 16 bits cannot become a JPEG; pack without --jpeg-quality"):
        changed(Record("a", encode(values)), CLASSES, None, 90, "a")


def test_sizes_that_differ_are_found_before_they_are_reduced():
    """200 x 100 and 100 x 50 would both become 50 x 25."""
    image, mask = encode(np.zeros((100, 200, 3), np.uint8)), encode(np.zeros((50, 100), np.uint8))
    with pytest.raises(InputError, match="the mask is 100 x 50, the image 200 x 100"):
        changed(Record("a", image, mask), CLASSES, 50, None, "a")
    with pytest.raises(InputError, match="the two images differ in size"):
        changed(Record("a", image, None, encode(np.zeros((50, 100, 3), np.uint8))), CLASSES, 50, None, "a")


def test_both_dates_of_a_pair_are_packed_and_reduced(tmp_path):
    for i in range(3):
        save(tmp_path / "raw" / "A" / f"{i}.png", scene(i, (40, 40))[0])
        save(tmp_path / "raw" / "B" / f"{i}.png", scene(i + 9, (40, 40))[0])
        save(tmp_path / "raw" / "label" / f"{i}.png", (scene(i, (40, 40))[1] == 1).astype(np.uint8) * 255)
    source = change.source(tmp_path / "raw")
    rows = list(iter_rows(packing.pack(source, str(tmp_path / "out")), columns=["image", "image_b"]))
    assert [row["image_b"] for row in rows] == [(tmp_path / "raw" / "B" / f"{i}.png").read_bytes() for i in range(3)]
    for row in iter_rows(packing.pack(source, str(tmp_path / "less"), max_side=20), columns=["image", "image_b"]):
        assert Image.open(io.BytesIO(row["image"])).size == Image.open(io.BytesIO(row["image_b"])).size == (20, 20)
    pair = replace(source.entries[0], mask=None)
    assert read_pair(pair, id_table({})).image_b == rows[0]["image_b"]


def test_row_groups_are_of_some_rows_or_some_bytes():
    def groups(size: int, count: int) -> tuple[int, ...]:
        builder = ShardBuilder(32)
        for i in range(count):
            builder.add({"image_id": str(i), "image": bytes(size), "mask": None, "image_b": None, "height": 1, "width": 1,
                         "class_pixels": None, "group": None, "index": None})
        return builder.finish(0)[1].row_groups

    assert groups(100, 70) == (32, 32, 6)
    assert groups(ROW_GROUP_BYTES // 4, 10) == (4, 4, 2) and groups(ROW_GROUP_BYTES + 1, 2) == (1, 1)


def test_shards_of_reduced_images_are_planned_by_what_they_become(root):
    """Images of 24 kB become ones of about 400 bytes: they go into one shard."""
    assert len(plan(listed(root), "nowhere", Settings(SMALL)).shards) == 5
    assert len(plan(listed(root), "nowhere", Settings(SMALL, max_side=10)).shards) == 1


def test_progress_is_one_line_on_a_terminal_and_rare_elsewhere(job):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, lines in ((Terminal(), 1), (io.StringIO(), 0)):
        line = job.ProgressLine(stream)
        for packed in (0, 4, 10):
            line(packed, 10, packed << 20)
        assert stream.getvalue().count("\n") == lines
    assert job.ProgressLine(stream)(3, 10, 0) is None and "going on: 3 of 10 images" in stream.getvalue()


@pytest.mark.parametrize("options", [["--jpeg-quality", "101"], ["--max-side", "0"], ["--labeled-fraction", "a/b"],
                                     ["--workers", "-1"]])
def test_options_out_of_range_are_refused(root, run, options):
    with pytest.raises(SystemExit) as ended:
        run("folder", root, "--classes", "voc", "--out", "nowhere", *options)
    assert ended.value.code == 2


@pytest.fixture
def bucket(monkeypatch):
    """A bucket on an S3 server, its address in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
                        "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    connection.close()
    yield "s3://bucket"
    server.stop()


def test_into_a_bucket_from_a_folder_and_from_a_bucket(bucket, root, tmp_path, run):
    out, storage = f"{bucket}/sets/mine", Storage()
    bad = root / "masks" / "im-009.png"
    bad.write_bytes(b"")
    with pytest.raises(packing.SourceProblems, match="im-009.png: the mask does not decode"):
        packing.pack(listed(root), out, shard_bytes=SMALL)
    assert "manifest.json" not in storage.list_files(out) and storage.list_files(join(out, ".packing"))
    save(bad, scene(9)[1])
    made = packing.pack(listed(root), out, shard_bytes=SMALL)
    local = packing.pack(listed(root), str(tmp_path / "out"), shard_bytes=SMALL)
    assert made.num_rows == 18 and storage.list_files(out, recursive=True) == sorted(
        ["class_pixels.arrow", "manifest.json", *(file.name for file in made.files)])
    assert [row["image_id"] for row in iter_rows(made)] == [row["image_id"] for row in iter_rows(local)]

    storage.upload_dir(str(root / "images"), f"{bucket}/raw")
    pool = packing.pack(images.source(f"{bucket}/raw", root / "classes.txt"), f"{bucket}/sets/pool", shard_bytes=SMALL)
    assert pool.num_labeled == 0 and 4 <= len(pool.files) <= 6
    assert [row["image"] for row in iter_rows(pool)] == [row["image"] for row in iter_rows(made)]

    split = ("folder", root, "--classes", root / "classes.txt", "--labeled-count", 5, "--unlabeled-includes-labeled")
    assert run(*split, "--out", f"{bucket}/split")[0] == 0
    every = read_manifest(f"{bucket}/split/unlabeled")
    check_files(every, checksums=True)
    assert every.num_rows == 18 and len({row["image_id"] for row in iter_rows(every)}) == 18
    assert run("check", f"{bucket}/split/unlabeled", "--all")[0] == 0


def test_a_source_pickles_as_it_must(root):
    source = pickle.loads(pickle.dumps(listed(root)))
    assert isinstance(source.read, partial) and source.read(source.entries[0]).image_id == "im-000"

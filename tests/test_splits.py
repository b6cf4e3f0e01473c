"""Splits: lists and draws, each image in one part and stored once, and parts that refer to the shards of another."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecocseg.data import packing
from ecocseg.data.shards import iter_rows, read_manifest
from ecocseg.data.sources import folder
from ecocseg.data.sources.pairs import Pair
from ecocseg.data.splits import Split, divide, ranking
from ecocseg.errors import InputError, run_main

SCRIPT = Path(__file__).resolve().parents[1] / "jobs" / "prepare_shards.py"


def save(path: Path, seed: int, channels: tuple[int, ...] = (3,)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 2, (10, 12, *channels)).astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 images, 9 of them with masks; names with a space, and one name in two folders."""
    root = tmp_path / "raw"
    names = [f"north/im {i}" for i in range(4)] + [f"south/im-{i}" for i in range(7)] + ["north/im-1"]
    for i, name in enumerate(names):
        save(root / "images" / f"{name}.jpg", i)
        if i % 3 or i == 9:
            save(root / "masks" / f"{name}.png", i, ())
    (root / "classes.txt").write_text("ground\nsky\n")
    return root


def both(root: Path):
    """The images with masks, and all."""
    return folder.source(root, root / "classes.txt"), folder.source(root, root / "classes.txt", unlabeled=True)


def ids(source) -> set[str]:
    return {entry.image_id for entry in source.entries}


@pytest.fixture
def run(capsys):
    spec = importlib.util.spec_from_file_location("prepare_shards", SCRIPT)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)

    def call(*arguments):
        code = run_main(lambda: job.main([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return call


def test_fractions_are_nested_rounded_up_and_drawn_by_the_seed(root):
    source, pool = both(root)
    many = [Pair(f"{i:06d}", Path(f"/r/{i:06d}.jpg")) for i in range(10_582)]  # as many as VOC's augmented set
    voc = replace(source, entries=many, problems=())
    parts = {n: divide(voc, voc, "/r", Split(labeled_fraction=Fraction(1, n))) for n in (16, 8, 4)}
    assert [len(parts[n]["labeled"].entries) for n in (16, 8, 4)] == [662, 1323, 2646]
    assert ids(parts[16]["labeled"]) < ids(parts[8]["labeled"]) < ids(parts[4]["labeled"])
    assert all(len(part["labeled"].entries) + len(part["unlabeled"].entries) == 10_582 for part in parts.values())
    other = divide(voc, voc, "/r", Split(labeled_fraction=Fraction(1, 16), seed=1))
    assert len(ids(other["labeled"]) & ids(parts[16]["labeled"])) < 100
    assert ids(divide(voc, voc, "/r", Split(labeled_count=662))["labeled"]) == ids(parts[16]["labeled"])
    some = ranking([entry.image_id for entry in many[:500]], 3)
    assert [name for name in ranking([entry.image_id for entry in many], 3) if name in set(some)] == some


def test_images_without_masks_are_unlabelled(root):
    source, pool = both(root)
    parts = divide(source, pool, str(root), Split(labeled_fraction=Fraction(1)))
    assert ids(parts["labeled"]) == ids(source) and len(source.entries) == 9
    assert ids(parts["unlabeled"]) == ids(pool) - ids(source) and not parts["labeled"].problems
    parts = divide(source, pool, str(root), Split(labeled_count=2, eval_count=3))
    assert [len(parts[name].entries) for name in ("labeled", "unlabeled", "eval")] == [2, 7, 3]
    assert ids(parts["eval"]) | ids(parts["labeled"]) < ids(source)
    assert len(ids(parts["labeled"]) | ids(parts["unlabeled"]) | ids(parts["eval"])) == 12
    record = parts["unlabeled"].read(next(entry for entry in source.entries if entry.image_id in ids(parts["unlabeled"])))
    assert record.mask is None


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_lists_name_images_in_some_ways(root, tmp_path):
    source, pool = both(root)
    labeled = write(tmp_path / "labeled.txt", "images/south/im-1.jpg masks/south/im-1.png", "north/im-1", "", "im-4.jpg",
                    "images/north/im 1.jpg masks/north/im 1.png")
    parts = divide(source, pool, str(root), Split(labeled_list=labeled))
    assert ids(parts["labeled"]) == {"south/im-1", "north/im-1", "south/im-4", "north/im 1"}
    assert ids(parts["unlabeled"]) == ids(pool) - ids(parts["labeled"])
    unlabeled = write(tmp_path / "unlabeled.txt", "images/south/im-0.jpg", "images/south/im-2.jpg masks/south/im-2.png")
    held = write(tmp_path / "val.txt", "images/south/im-6.jpg")
    parts = divide(source, pool, str(root), Split(labeled_list=labeled, unlabeled_list=unlabeled, eval_list=held))
    assert ids(parts["unlabeled"]) == {"south/im-0", "south/im-2"} and ids(parts["eval"]) == {"south/im-6"}
    overlapping = write(tmp_path / "all.txt", "images/south/im-0.jpg", "images/south/im-1.jpg")
    split = Split(labeled_list=labeled, unlabeled_list=overlapping, with_labeled=True)
    assert ids(divide(source, pool, str(root), split)["unlabeled"]) == {"south/im-0"}  # im-1 is referred to
    split = parts["eval"].options["split"]
    assert split["labeled_list"] == "labeled.txt" and split["part"] == "eval" and "seed" not in split
    assert split["images"] == {"labeled": 4, "unlabeled": 2, "eval": 1} and len(split["hash"]) == 64


def test_lists_that_cannot_be_are_refused_with_all_that_is_wrong(root, tmp_path):
    source, pool = both(root)
    labeled = write(tmp_path / "l.txt", "images/south/im-1.jpg", "south/im-1", "images/nowhere.jpg", "images/north/im 0.jpg",
                    "im-1.jpg", "images/south/im-2.jpg")
    unlabeled = write(tmp_path / "u.txt", "images/south/im-2.jpg", "images/south/im-0.jpg")
    with pytest.raises(InputError) as caught:
        divide(source, pool, str(root), Split(labeled_list=labeled, unlabeled_list=unlabeled))
    for part in ("6 problem(s)", "l.txt:2: 'south/im-1' comes twice, first in line 1",
                 "l.txt:3: 'images/nowhere.jpg' is no image", "l.txt:5: 'im-1.jpg' is no image",
                 "'north/im 0' is to be in labeled and has no mask", "'south/im-2' is to be in labeled and has no mask",
                 "'south/im-2' is in both labeled and unlabeled; --unlabeled-includes-labeled allows that",
                 f"relative to {root}; one there is 'images/"):
        assert part in str(caught.value)
    for split, message in ((Split(labeled_list=str(tmp_path / "none.txt")), "there is no list .*none.txt"),
                           (Split(labeled_list=write(tmp_path / "e.txt", "")), "e.txt is empty"),
                           (Split(labeled_list=str(root / "images/south/im-1.jpg")), "is no text"),
                           (Split(labeled_count=2, labeled_fraction=Fraction(1, 2)), "takes one of .*given are --l"),
                           (Split(eval_count=2), "takes one of .*given are none"),
                           (Split(labeled_count=10), "10 images are asked for, 9 with masks are left"),
                           (Split(labeled_count=2, eval_count=9), "2 images are asked for, 0 with masks"),
                           (Split(labeled_fraction=Fraction(3, 2)), "no share above 0 and up to 1"),
                           (Split(labeled_count=1, eval_count=1, eval_list="x"), "exclude each other")):
        with pytest.raises(InputError, match=message):
            divide(source, pool, str(root), split)


def test_nothing_left_for_a_part_is_named(root):
    source, _ = both(root)
    with pytest.raises(InputError, match="no image is left for unlabeled"):
        divide(source, source, str(root), Split(labeled_fraction=Fraction(1)))
    every = divide(source, source, str(root), Split(labeled_fraction=Fraction(1), with_labeled=True))
    assert not every["unlabeled"].entries


def test_a_split_stores_every_image_once(root, tmp_path, run):
    out = tmp_path / "out"
    arguments = ("folder", root, "--classes", root / "classes.txt", "--labeled-fraction", "1/4", "--eval-count", 2, "--seed", 7)
    code, printed, _ = run(*arguments, "--out", out)
    parts = {name: read_manifest(str(out / name)) for name in ("labeled", "unlabeled", "eval")}
    assert code == 0 and [part.num_rows for part in parts.values()] == [2, 8, 2]
    assert [part.num_labeled for part in parts.values()] == [2, 0, 2]
    rows = [row for part in parts.values() for row in iter_rows(part, columns=["image_id", "mask"])]
    assert len(rows) == len({row["image_id"] for row in rows}) == 12 and sum(row["mask"] is not None for row in rows) == 4
    options = [part.options["split"] for part in parts.values()]
    assert len({split["hash"] for split in options}) == 1
    assert [(split["part"], split["labeled_fraction"], split["seed"], split["eval_count"]) for split in options] == [
        (name, "1/4", 7, 2) for name in parts]
    assert parts["unlabeled"].options["unlabeled"] is True and parts["labeled"].options["unlabeled"] is False

    lists = [f"--{name}-list={out / name}.txt" for name in parts]
    assert run("folder", root, "--classes", root / "classes.txt", *lists, "--out", tmp_path / "again")[0] == 0
    for name, part in parts.items():
        again = read_manifest(str(tmp_path / "again" / name))
        assert again.files == part.files and again.options["split"]["hash"] == part.options["split"]["hash"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    assert run(*arguments, "--out", out)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == before
    code, _, message = run(*arguments[:-1], 8, "--out", out)
    assert code == 2 and "out/labeled" in message and "--overwrite" in message


def test_an_unlabelled_part_refers_to_the_labelled_shards(root, tmp_path, run, monkeypatch):
    out = tmp_path / "out"
    arguments = ("folder", root, "--classes", root / "classes.txt", "--labeled-count", 3, "--unlabeled-includes-labeled")
    code, printed, _ = run(*arguments, "--out", out)
    assert code == 0 and "12 images, 3 labelled, 2 shard(s)" in printed and "1 of the shards in another part" in printed
    labeled, every = read_manifest(str(out / "labeled")), read_manifest(str(out / "unlabeled"))
    assert [file.name for file in every.files] == ["shard-00000.parquet", "../labeled/shard-00000.parquet"]
    assert len(list(out.rglob("*.parquet"))) == 2 and every.class_pixels == labeled.class_pixels
    assert {row["image_id"] for row in iter_rows(every)} == ids(both(root)[1])
    monkeypatch.chdir(out / "unlabeled")
    assert len(list(iter_rows(read_manifest(".")))) == 12
    code, printed, _ = run("check", out / "unlabeled", "--all")
    assert code == 0 and "2 checksums are right, 12 of 12 images decode" in printed

    shard = out / "labeled" / "shard-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[data.index(next(iter_rows(labeled))["image"]) + 30] ^= 1
    shard.write_bytes(data)
    code, _, message = run("check", out / "unlabeled")
    assert code == 2 and f"{shard} was changed" in message and "../labeled/shard-00000.parquet" not in message.split("\n")[1]
    shard.unlink()
    code, _, message = run("check", out / "unlabeled")
    assert code == 2 and f"{shard} is missing" in message
    assert run(*arguments, "--out", out, "--overwrite")[0] == 0 and run("check", out / "unlabeled")[0] == 0


def test_bad_files_of_all_parts_are_named_together(root, tmp_path, run):
    arguments = ("folder", root, "--classes", root / "classes.txt", "--labeled-count", 3, "--out", tmp_path / "out")
    assert run(*arguments)[0] == 0
    names = [next(iter_rows(read_manifest(str(tmp_path / "out" / part))))["image_id"] for part in ("labeled", "unlabeled")]
    for name in names:
        (root / "images" / f"{name}.jpg").write_bytes(b"broken")
    code, _, message = run(*arguments, "--overwrite")
    assert code == 2 and "2 problem(s)" in message
    assert all(f"{name}.jpg: the image does not decode" in message for name in names)


def test_a_manifest_refers_to_parts_beside_it_alone(root, tmp_path):
    packing.pack(folder.source(root, root / "classes.txt", unlabeled=True), str(tmp_path / "out"))
    where = tmp_path / "out" / "manifest.json"
    whole = read_manifest(str(tmp_path / "out"))
    for name in ("../../elsewhere/shard-00000.parquet", "/etc/shard-00000.parquet", "..", "../..", "a/b.parquet"):
        changed = replace(whole, files=(replace(whole.files[0], name=name),))
        where.write_bytes(changed.to_json())
        with pytest.raises(InputError, match="was changed"):
            read_manifest(str(tmp_path / "out"))


def test_a_split_of_unlabelled_images_is_refused_and_a_dry_run_shows_parts(root, tmp_path, run):
    arguments = ("folder", root, "--classes", root / "classes.txt", "--labeled-count", 3, "--out", tmp_path / "out")
    code, _, message = run(*arguments, "--unlabeled")
    assert code == 2 and "--unlabeled: a split has a labelled part" in message
    code, printed, _ = run(*arguments, "--dry-run", "--unlabeled-includes-labeled")
    assert code == 0 and "out/labeled: 3 images, 3 labelled" in printed and "out/unlabeled: 9 images, 0 labelled" in printed
    assert "and those of the labelled part" in printed
    options = divide(*both(root), str(root), Split(labeled_count=3))["labeled"].options
    assert json.loads(json.dumps(options))["split"]["seed"] == 0

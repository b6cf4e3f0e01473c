"""jobs/prepare_shards.py and its sources: what is packed, every problem named before anything is written, damage found."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.shards import iter_rows, read_manifest, read_row_group
from ecocseg.data.sources import folder
from ecocseg.errors import InputError, run_main

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "jobs" / "prepare_shards.py"
COLUMNS = ["image_id", "image", "mask", "group", "index"]


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("prepare_shards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(job, capsys):
    """Run the command in this process: exit code, stdout, stderr."""
    def call(*arguments):
        code = run_main(lambda: job.main([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return call


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture(seed, size=(12, 16)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def ids(seed, choices, size=(12, 16)):
    return np.random.default_rng(seed).choice(np.array(choices, np.uint8), size)


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


CAMVID = {"train": ["0001TP_006690", "0006R0_f00930", "0016E5_00390"], "val": ["0016E5_07959"], "test": ["0001TP_008550"]}


@pytest.fixture(params=["jpg", "png"])
def camvid_tree(tmp_path, request):
    root, seed = tmp_path / "camvid", 0
    for split, stems in CAMVID.items():
        for stem in stems:
            save(root / split / f"{stem}.{request.param}", picture(seed))
            save(root / f"{split}annot" / f"{stem}.png", ids(seed, range(12)))
            seed += 1
    (root / "train" / ".hidden.png").write_bytes(b"")
    return root


def test_camvid_round_trip(camvid_tree, tmp_path, run):
    out = tmp_path / "out"
    code, printed, _ = run("camvid", camvid_tree, "--out", out, "--split", "train,test")
    assert code == 0 and "4 images, 4 labelled, 1 shard(s)" in printed and "bicyclist" in printed
    manifest = read_manifest(str(out))
    assert manifest.dataset == "camvid" and manifest.classes == CLASS_LISTS["camvid"]
    assert manifest.options["splits"] == ["train", "test"]
    rows = list(iter_rows(manifest, columns=COLUMNS))
    assert [row["image_id"] for row in rows] == CAMVID["train"] + CAMVID["test"]
    assert [(row["group"], row["index"]) for row in rows] == [("0001TP", 6690), ("0006R0", 930), ("0016E5", 390),
                                                             ("0001TP", 8550)]
    totals = np.zeros(11, int)
    for row, seed in zip(rows, (0, 1, 2, 4), strict=True):
        raw = ids(seed, range(12))
        assert np.array_equal(decoded(row["mask"]), np.where(raw == 11, 255, raw))
        split = "test" if seed == 4 else "train"
        assert row["image"] == next((camvid_tree / split).glob(f"{row['image_id']}.*")).read_bytes()
        totals += np.bincount(raw.reshape(-1), minlength=12)[:11]
    assert manifest.class_pixels == tuple(totals)


def test_camvid_sequences_and_unlabelled(camvid_tree, tmp_path, run):
    code, _, _ = run("camvid", camvid_tree, "--out", tmp_path / "day", "--sequences", "0006R0,0016E5")
    rows = list(iter_rows(read_manifest(str(tmp_path / "day")), columns=COLUMNS))
    assert code == 0 and [row["group"] for row in rows] == ["0006R0", "0016E5"] and all(row["mask"] for row in rows)
    for folder_name in ("trainannot", "valannot"):
        for path in (camvid_tree / folder_name).iterdir():
            path.unlink()
        (camvid_tree / folder_name).rmdir()
    code, printed, _ = run("camvid", camvid_tree, "--out", tmp_path / "dusk", "--sequences", "0001TP", "--unlabeled")
    manifest = read_manifest(str(tmp_path / "dusk"))
    assert code == 0 and "1 images, 0 labelled" in printed and manifest.num_labeled == 0
    assert [row["mask"] for row in iter_rows(manifest)] == [None]
    code, _, message = run("camvid", camvid_tree, "--out", tmp_path / "no", "--sequences", "0001TP")
    assert code == 2 and "trainannot with their masks" in message and "unlabelled" in message


@pytest.mark.parametrize(("arguments", "message"), [
    (["--sequences", "0001TP,0099XX"], r"no image of sequence 0099XX .*sequences there: 0001TP, 0006R0, 0016E5"),
    (["--split", "train,dusk"], r"splits: dusk; the splits of CamVid are train, val, test"),
    (["--split", ""], r"splits: none given")])
def test_camvid_selection_that_is_not_there(tmp_path, arguments, message, run):
    for stem in CAMVID["train"]:
        save(tmp_path / "c" / "train" / f"{stem}.png", picture(0))
        save(tmp_path / "c" / "trainannot" / f"{stem}.png", ids(0, range(12)))
    code, _, error = run("camvid", tmp_path / "c", "--out", tmp_path / "out", *arguments)
    assert code == 2 and not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(InputError, match=message):
        raise InputError(error)


def test_camvid_all_problems_are_named_before_anything_is_written(camvid_tree, tmp_path, run):
    annot = camvid_tree / "trainannot"
    save(annot / "0001TP_006690.png", ids(0, [0, 12, 77]))
    save(annot / "0006R0_f00930.png", ids(0, range(11), (12, 10)))
    (annot / "0016E5_00390.png").write_bytes((annot / "0016E5_00390.png").read_bytes()[:60])
    save(annot / "0016E5_99999.png", ids(0, range(11)))
    save(camvid_tree / "train" / "0006R0_f11111.png", picture(0))
    code, _, message = run("camvid", camvid_tree, "--out", tmp_path / "out")
    assert code == 2 and "5 problem(s)" in message and "nothing was written" in message
    assert not (tmp_path / "out").exists()
    for part in ("0001TP_006690.png: unknown id(s) 12, 77", "the mask is 10 x 12, the image 16 x 12",
                 "0016E5_00390.png: the mask does not decode", "0016E5_99999.png has no image",
                 "0006R0_f11111.png has no mask", "0 to 10, 11 (void) and 255"):
        assert part in message


def test_many_problems_are_counted(tmp_path, run):
    for i in range(30):
        save(tmp_path / "train" / f"s_{i:02d}.png", picture(i))
        save(tmp_path / "trainannot" / f"s_{i:02d}.png", ids(i, [99]))
    code, _, message = run("camvid", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(InputError, match=r"30 problem(?s:.*)s_19\.png: unknown(?s:.*)and 10 more"):
        raise InputError(message)
    assert code == 2 and "s_20.png" not in message and not (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture
def own(tmp_path):
    """A folder of one's own: three images of two kinds, masks of raw ids 0, 6, 9."""
    root = tmp_path / "own"
    for i, name in enumerate(("a.jpg", "b.png", "north/a.jpeg")):
        save(root / "images" / name, picture(i))
        save((root / "masks" / name).with_suffix(".png"), ids(i, [0, 6, 9]))
    (tmp_path / "classes.yaml").write_text("names: [background, kidney]\npalette: [[0, 0, 0], [255, 0, 10]]\n"
                                           "ids: {0: 0, 6: 1, 9: 255}\n")
    return root


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_folder_with_an_id_map(own, tmp_path, run, kind):
    file = tmp_path / "classes.yaml"
    if kind == "json":
        file = tmp_path / "classes.json"
        file.write_text(json.dumps({"names": ["background", "kidney"], "palette": [[0, 0, 0], [255, 0, 10]],
                                    "ids": {"0": 0, "6": 1, "9": 255}}))
    code, printed, _ = run("folder", own, "--classes", file, "--out", tmp_path / "out")
    assert code == 0 and "3 images, 3 labelled" in printed
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest.dataset == "own" and manifest.classes.name == "classes"
    assert manifest.classes.names == ("background", "kidney") and manifest.classes.palette == ((0, 0, 0), (255, 0, 10))
    rows = list(iter_rows(manifest, columns=COLUMNS))
    assert [(row["image_id"], row["group"]) for row in rows] == [("a", None), ("b", None), ("north/a", "north")]
    table = np.full(256, 99)
    table[[0, 6, 9]] = 0, 1, 255
    for i, row in enumerate(rows):
        assert np.array_equal(decoded(row["mask"]), table[ids(i, [0, 6, 9])])


def test_folder_with_names_alone_keeps_the_bytes(tmp_path, run):
    root = tmp_path / "set"
    save(root / "images" / "x.png", picture(0))
    save(root / "masks" / "x.png", ids(0, [0, 1, 2, 255]))
    (tmp_path / "classes.txt").write_text("\ufeff# ids 0, 1, 2\nground\n\nblue sky\ntree\n", encoding="utf-8")
    code, _, _ = run("folder", root, "--classes", tmp_path / "classes.txt", "--out", tmp_path / "out", "--name", "mine")
    manifest = read_manifest(str(tmp_path / "out"))
    assert code == 0 and manifest.dataset == "mine" and manifest.classes.names == ("ground", "blue sky", "tree")
    row = next(iter_rows(manifest))
    assert row["mask"] == (root / "masks" / "x.png").read_bytes() and row["image"] == (root / "images" / "x.png").read_bytes()


def test_folder_unlabelled_and_built_in_classes(own, tmp_path, run):
    (own / "masks" / "a.png").unlink()
    code, _, message = run("folder", own, "--classes", "voc", "--out", tmp_path / "out")
    assert code == 2 and "a.jpg has no mask of the same stem" in message
    code, printed, _ = run("folder", own, "--classes", "voc", "--out", tmp_path / "out", "--unlabeled")
    assert code == 0 and "3 images, 0 labelled" in printed
    assert read_manifest(str(tmp_path / "out")).classes == CLASS_LISTS["voc"]


def test_folder_problems_are_named(own, tmp_path, run):
    save(own / "images" / "b.jpg", picture(0))
    save(own / "masks" / "a.png", ids(0, [0, 5]))
    save(own / "masks" / "north" / "a.png", picture(0))
    (own / "images" / "cut.jpg").write_bytes((own / "images" / "a.jpg").read_bytes()[:300])
    save(own / "masks" / "cut.png", ids(0, [0]))
    code, _, message = run("folder", own, "--classes", tmp_path / "classes.yaml", "--out", tmp_path / "out")
    assert code == 2
    for part in ("b.png and b.jpg have one stem", "a.png: unknown id(s) 5", "a.png: the mask is a RGB PNG",
                 "cut.jpg: the image does not decode", "known ids are 0, 6, 9 and 255"):
        assert part in message


def test_folder_without_images(tmp_path):
    classes = folder.read_classes("voc")
    with pytest.raises(InputError, match=r"there is no local folder .*images"):
        folder.source(tmp_path, classes)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"no image \(.jpg, .jpeg, .png\)"):
        folder.source(tmp_path, classes)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("c.txt", "one\n", r"give a list of 2 to 255 names"),
    ("c.txt", "road\nsky\nroad\n", r"'road' comes 2 times"),
    ("c.yaml", "names: [a, b\n", r"cannot be read"),
    ("c.json", "{", r"cannot be read"),
    ("c.yaml", "just text", r"neither a list of names nor has 'names'"),
    ("c.yaml", "names: [a, b]\ncolours: []\n", r"unknown key\(s\) colours; known are name, names, palette"),
    ("c.yaml", "names: [a, no]\n", r"False is no text; put it in quotes"),
    ("c.yaml", "names: [a, b]\npalette: [[0, 0, 0]]\n", r"palette: give 2 colours .*there are 1"),
    ("c.yaml", "names: [a, b]\npalette: [[0, 0, 0], [0, 0, 256]]\n", r"\[0, 0, 256\] is none"),
    ("c.yaml", "names: [a, b]\nids: {0: 0, 1: 2}\n", r"ids: 1: 2 does not map .* 0 to 1 or 255"),
    ("c.yaml", "names: [a, b]\nids: {300: 0}\n", r"ids: 300: 0 does not map"),
    ("c.yaml", "names: [a, b]\nids: [0, 1]\n", r"ids: give a map"),
    ("c.yaml", "names: [a, b]\nthing_ids: [2]\n", r"thing_ids: \[2\]")])
def test_class_list_mistakes(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        folder.read_classes(tmp_path / name)
    assert name in str(caught.value)


def test_class_list_that_is_not_there():
    with pytest.raises(InputError, match=r"no file 'nowhere.txt', nor a built-in list .* camvid, change, cityscapes, coco"):
        folder.read_classes("nowhere.txt")


def test_class_list_forms(tmp_path):
    (tmp_path / "c.json").write_text('["a", "b"]')
    made = folder.read_classes(tmp_path / "c.json")
    assert made.classes.names == ("a", "b") and made.ids == {0: 0, 1: 1} and len(set(made.classes.palette)) == 2


def test_shards_that_are_there_are_not_replaced_unasked(own, tmp_path, run):
    arguments = ("folder", own, "--classes", tmp_path / "classes.yaml", "--out", tmp_path / "out")
    assert run(*arguments)[0] == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    code, _, message = run(*arguments, "--unlabeled")
    assert code == 2 and "give --overwrite" in message and (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert run(*arguments, "--unlabeled", "--overwrite")[0] == 0
    assert read_manifest(str(tmp_path / "out")).num_labeled == 0


def test_unwritable_output_is_named(own, tmp_path, run):
    (tmp_path / "file").write_text("")
    code, _, message = run("folder", own, "--classes", tmp_path / "classes.yaml", "--out", tmp_path / "file" / "out")
    assert code == 2 and f"cannot write {tmp_path}/file/out" in message


@pytest.fixture
def packed(own, tmp_path, run):
    out = tmp_path / "packed"
    assert run("folder", own, "--classes", tmp_path / "classes.yaml", "--out", out, "--row-group-rows", 2)[0] == 0
    return out


def test_check_of_whole_shards(packed, run):
    code, printed, _ = run("check", packed, "--all")
    assert code == 0 and "3 images, 3 labelled" in printed and "sizes: 3 of 16 x 12" in printed
    assert "1 checksums are right, 3 of 3 images decode" in printed
    shares = [float(line.split()[-2]) for line in printed.splitlines() if line.endswith("%")]
    assert len(shares) == 2 and sum(shares) == pytest.approx(100, abs=0.02)
    assert "1 of 3 images decode" in run("check", packed, "--sample", "1")[1]


def test_check_names_shard_and_image_of_damage(packed, run):
    manifest, shard = read_manifest(str(packed)), packed / "shard-00000.parquet"
    last = read_row_group(manifest, 0, 1, ["image"])["image"].to_pylist()[0]
    data = bytearray(shard.read_bytes())
    data[data.index(last) + 50] ^= 1
    shard.write_bytes(data)
    code, _, message = run("check", packed)
    assert code == 2 and "shard-00000.parquet was changed" in message and "row group 1 (north/a to north/a)" in message
    assert "row group 0" not in message
    shard.write_bytes(data[:-20])
    code, _, message = run("check", packed)
    assert code == 2 and f"shard-00000.parquet has {len(data) - 20} bytes, the manifest says {len(data)}" in message
    shard.unlink()
    code, _, message = run("check", packed)
    assert code == 2 and "shard-00000.parquet is missing" in message


def test_check_names_an_image_that_does_not_fit_its_row(packed, job, run, monkeypatch):
    monkeypatch.setattr(job, "image_size", lambda data, where: (16, 99))
    code, _, message = run("check", packed)
    assert code == 2 and "shard-00000.parquet: a: the image is 16 x 99, its row says 16 x 12" in message


def test_demo_parts(tmp_path, run):
    code, printed, _ = run("demo", "--out", tmp_path / "demo", "--count", "2")
    assert code == 0 and printed.count("2 images") == 4
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["source", "source_eval", "target", "target_eval"]
    code, _, message = run("demo", "--out", tmp_path / "demo")
    assert code == 2 and "demo/source" in message and "--overwrite" in message


def command(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_exit_codes_of_the_command(tmp_path):
    bad = command("check", tmp_path)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: no shards at") and "Traceback" not in bad.stderr
    usage = command("camvid", tmp_path)
    assert usage.returncode == 2 and "--out" in usage.stderr and "Traceback" not in usage.stderr


def test_every_source_has_a_command(job, capsys):
    for name in job.SOURCES:
        with pytest.raises(SystemExit) as ended:
            job.main([name, "--help"])
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and "--skip-bad" in printed and ("--labeled-fraction" in printed) == (name != "images")
    folder_of = SCRIPT.parents[1] / "ecocseg" / "data" / "sources"
    there = {path.stem for path in folder_of.glob("*.py") if "\ndef source(" in path.read_text()}
    assert set(job.SOURCES) == there


def test_keywords_of_a_source_are_options(tmp_path, run):
    for city in ("aachen", "bochum"):
        for i in range(2):
            save(tmp_path / f"leftImg8bit/train/{city}/{city}_00000{i}_000019_leftImg8bit.png", picture(i))
            save(tmp_path / f"gtFine/train/{city}/{city}_00000{i}_000019_gtFine_labelIds.png", ids(i, [7, 8, 4]))
    code, printed, _ = run("cityscapes", tmp_path, "--out", tmp_path / "out", "--cities", "bochum", "--max-side", 8)
    manifest = read_manifest(str(tmp_path / "out"))
    assert code == 0 and "2 images, 2 labelled" in printed and manifest.options["cities"] == ["bochum"]
    assert manifest.options["pixel_scale"] == 0.25 and sum(manifest.class_pixels[2:]) == 0
    code, _, message = run("cityscapes", tmp_path, "--out", tmp_path / "no", "--annotation", "rough")
    assert code == 2 and "annotation: rough" in message
    code, printed, _ = run("images", tmp_path / "leftImg8bit", "--classes", "cityscapes", "--out", tmp_path / "pool")
    assert code == 0 and "4 images, 0 labelled" in printed


def test_help_has_examples(job, capsys):
    for arguments, parts in (([], ["--sequences 0006R0,0016E5", "check data/camvid/day"]), (["folder"], ["palette", "ids:"]),
                             (["camvid"], ["--unlabeled", "trainannot"]), (["check"], ["--all"])):
        with pytest.raises(SystemExit) as ended:
            job.main([*arguments, "--help"])
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and all(part in printed for part in parts)

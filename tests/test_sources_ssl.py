"""Sources of the data sets that few labels are studied on: small trees in the published layouts, exact pixels out of them."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys

import h5py
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ecocseg.data.classes import CLASS_LISTS, default_palette
from ecocseg.data.shards import inspect_record
from ecocseg.data.sources import acdc_cardiac, ade20k, change, coco, voc
from ecocseg.data.sources.lists import read_names
from ecocseg.data.transforms import decode_image
from ecocseg.errors import InputError

SIZE = (12, 16)


def picture(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def ids(seed, choices, size=SIZE):
    return np.random.default_rng(seed).choice(np.array(choices, np.uint8), size)


def save(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette([channel for colour in palette for channel in colour])
    image.save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def read_all(made):
    """Records by image id, each fit to be packed, read by what another process would get; of a source without problems."""
    assert list(made.problems) == [] and json.loads(json.dumps(made.options)) == made.options
    assert [entry.image_id for entry in made.entries] == sorted({entry.image_id for entry in made.entries})
    read, entries = pickle.loads(pickle.dumps((made.read, made.entries)))
    records = {entry.image_id: read(entry) for entry in entries}
    for image_id, record in records.items():
        assert record.image_id == image_id
        inspect_record(record, made.classes)
    return records


# ---- PASCAL VOC 2012

TRAIN, VAL = ["2007_000032", "2007_000039"], ["2007_000033"]
SBD = ["2008_000002", "2008_000003"]


@pytest.fixture
def voc_root(tmp_path):
    """The devkit: palette masks of VOC's own images, images without masks, and grey masks of SBD's."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for seed, name in enumerate(TRAIN + VAL + SBD + ["2008_000001"]):
        save(base / "JPEGImages" / f"{name}.jpg", picture(seed))
    for seed, name in enumerate(TRAIN + VAL):
        save(base / "SegmentationClass" / f"{name}.png", ids(seed, [*range(21), 255]), default_palette(256))
    for seed, name in enumerate(TRAIN + VAL + SBD):  # coarse masks of VOC's own images, too, and of validation images
        save(base / "SegmentationClassAug" / f"{name}.png", ids(seed + 10, range(21)))
    for name, names in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
        write(base / "ImageSets" / "Segmentation" / f"{name}.txt", "\n".join(names) + "\n")
    return tmp_path


@pytest.mark.parametrize("root", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_split(voc_root, root):
    made = voc.source(voc_root / root)
    records = read_all(made)
    assert list(records) == TRAIN and made.dataset == "voc" and made.classes == CLASS_LISTS["voc"]
    assert made.options["source"] == "voc" and made.options["split"] == "train"
    for seed, name in enumerate(TRAIN):
        assert records[name].image == (voc_root / f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg").read_bytes()
        assert np.array_equal(decoded(records[name].mask), ids(seed, [*range(21), 255]))
    assert list(read_all(voc.source(voc_root / root, "val"))) == VAL
    assert list(read_all(voc.source(voc_root / root, "trainval"))) == sorted(TRAIN + VAL)


def test_voc_augmented_takes_sbd_for_what_voc_has_not(voc_root):
    records = read_all(voc.source(voc_root, augmented=True))
    assert list(records) == TRAIN + SBD
    for seed, name in enumerate(TRAIN + VAL + SBD):
        if name in records:
            expected = ids(seed, [*range(21), 255]) if name in TRAIN else ids(seed + 10, range(21))
            assert np.array_equal(decoded(records[name].mask), expected), name


@pytest.mark.parametrize(("folder", "name"), [("Segmentation", "trainaug"), ("SegmentationAug", "train_aug")])
def test_voc_augmented_by_its_list(voc_root, folder, name):
    lines = [f"/JPEGImages/{one}.jpg /SegmentationClassAug/{one}.png" for one in (SBD[0], TRAIN[1])]
    write(voc_root / "VOCdevkit" / "VOC2012" / "ImageSets" / folder / f"{name}.txt", "\n".join(lines))
    assert list(read_all(voc.source(voc_root, augmented=True))) == [TRAIN[1], SBD[0]]


def test_voc_published_list_and_unlabelled(voc_root, tmp_path):
    chosen = tmp_path / "labeled.txt"
    chosen.write_text(f"JPEGImages/{SBD[1]}.jpg SegmentationClass/{SBD[1]}.png\nJPEGImages/{TRAIN[0]}.jpg SegmentationClass/\n")
    made = voc.source(voc_root, augmented=True, list_file=chosen)
    assert list(read_all(made)) == [TRAIN[0], SBD[1]] and made.options["list"] == "labeled.txt"
    turned = tmp_path / "turned.txt"
    turned.write_text(f"{TRAIN[0]}\n{SBD[1]}\n")
    other = voc.source(voc_root, augmented=True, list_file=turned).options["list_sha256"]
    assert made.options["list_sha256"] == other != voc.source(voc_root, list_file=write_list(tmp_path, TRAIN)).options[
        "list_sha256"]
    chosen.write_text("2008_000001\n")
    made = voc.source(voc_root, list_file=chosen)
    assert made.entries == [] and made.problems == [f"{voc_root}/VOCdevkit/VOC2012/JPEGImages/2008_000001.jpg has no mask of "
                                                    "the same stem"]
    records = read_all(voc.source(voc_root, list_file=chosen, unlabeled=True))
    assert list(records) == ["2008_000001"] and records["2008_000001"].mask is None


def write_list(folder, names):
    (folder / "names.txt").write_text("\n".join(names))
    return folder / "names.txt"


def test_voc_mistakes(voc_root, tmp_path):
    base = voc_root / "VOCdevkit" / "VOC2012"
    made = voc.source(voc_root, list_file=write_list(tmp_path, ["2007_000032", "2099_000001"]))
    assert len(made.entries) == 1 and made.problems == [f"{base}/JPEGImages has no file of the listed name 2099_000001"]
    save(base / "SegmentationClass" / "2007_000039.png", ids(0, [0, 21]))
    made = voc.source(voc_root)
    with pytest.raises(InputError, match=r"2007_000039.png: unknown id\(s\) 21"):
        made.read(made.entries[1])
    with pytest.raises(InputError, match=r"no folder 'JPEGImages' in .*ImageSets.* folders there: ImageSets|folders there: "):
        voc.source(base / "ImageSets")
    for arguments, message in [
            ({"split": "test"}, "split: test; the splits of VOC 2012 are train, val, trainval"),
            ({"split": "val", "augmented": True}, "split: val; with augmented masks, the splits are train"),
            ({"list_file": tmp_path / "none.txt"}, r"none.txt cannot be read \(No such file"),
            ({"list_file": write_list(tmp_path, ["2099_000001"])}, "none of the 1 listed images; 2099_000001.jpg is one")]:
        with pytest.raises(InputError, match=message):
            voc.source(voc_root, **arguments)
    (base / "SegmentationClassAug").rename(base / "elsewhere")
    with pytest.raises(InputError, match="no folder 'SegmentationClassAug'"):
        voc.source(voc_root, augmented=True, unlabeled=True)


# ---- COCO 2017

CATEGORY_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
PERSON, CAT, CUP, TOOTHBRUSH = 1, 17, 47, 90  # category ids
PERSON_ID, CAT_ID, CUP_ID, TOOTHBRUSH_ID = 1, 16, 42, 80  # class ids


def box(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def box_pixels(left, top, right, bottom, size=(24, 32)):
    """Pixels in a polygon of whole corners: coco's rasteriser takes pixel centres inside it."""
    pixels = np.zeros(size, bool)
    pixels[top:bottom, left:right] = True
    return pixels


@pytest.fixture
def coco_root(tmp_path):
    """Three images of 24 x 32: overlaps, a crowd as published run lengths, several polygons, compressed run lengths."""
    names = ["000000000009", "000000000025", "000000000030"]
    for seed, name in enumerate(names):
        save(tmp_path / "train2017" / f"{name}.jpg", picture(seed, (24, 32)))
    save(tmp_path / "unlabeled2017" / "000000000001.jpg", picture(7))
    categories = [{"id": number, "name": name, "supercategory": "thing"}
                  for number, name in zip(CATEGORY_IDS, CLASS_LISTS["coco"].names[1:], strict=True)]
    crowd = np.zeros((24, 32), np.uint8, order="F")
    crowd[4:20, 2:30] = 1
    runs, value, length = [], 0, 0
    for pixel in crowd.ravel(order="F"):
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    runs.append(length)
    compressed = coco_mask.encode(np.asfortranarray(box_pixels(20, 10, 26, 16).astype(np.uint8)))
    painted = [(9, CAT, [box(2, 2, 20, 20)]), (9, CUP, [box(10, 10, 14, 14), box(24, 2, 28, 6)]),
               (25, TOOTHBRUSH, [box(0, 0, 8, 8)]), (25, PERSON, [box(4, 2, 12, 10)]),
               (25, PERSON, {"counts": runs, "size": [24, 32]}),
               (25, CAT, {"counts": compressed["counts"].decode(), "size": [24, 32]}), (25, CUP, [[1.0, 1.0, 3.0, 3.0]])]
    annotations = [{"segmentation": segmentation, "area": 1.0, "iscrowd": int(number == 4), "image_id": image_id,
                    "bbox": [0, 0, 1, 1], "category_id": category, "id": number}
                   for number, (image_id, category, segmentation) in enumerate(painted)]
    listed = [{"license": 1, "file_name": f"{name}.jpg", "height": 24, "width": 32, "id": int(name)} for name in names]
    plain = {"info": {}, "licenses": [], "images": listed, "annotations": annotations, "categories": categories}
    write(tmp_path / "annotations" / "instances_train2017.json", json.dumps(plain))
    return tmp_path


def test_coco_paints_later_instances_over_earlier_ones_and_crowds(coco_root, capsys):
    made = coco.source(coco_root)
    assert made.classes.num_classes == 81 and made.options["overlap"] == "later in the file"
    records = read_all(made)
    assert list(records) == ["000000000009", "000000000025", "000000000030"]
    expected = np.zeros((24, 32), np.uint8)
    expected[box_pixels(2, 2, 20, 20)] = CAT_ID
    expected[box_pixels(10, 10, 14, 14) | box_pixels(24, 2, 28, 6)] = CUP_ID
    assert np.array_equal(decoded(records["000000000009"].mask), expected)
    expected = np.zeros((24, 32), np.uint8)
    expected[4:20, 2:30] = 255  # later in the file than the instances below, which are seen nevertheless
    expected[box_pixels(0, 0, 8, 8)] = TOOTHBRUSH_ID
    expected[box_pixels(4, 2, 12, 10)] = PERSON_ID
    expected[box_pixels(20, 10, 26, 16)] = CAT_ID
    assert np.array_equal(decoded(records["000000000025"].mask), expected)
    assert not decoded(records["000000000030"].mask).any()
    for name, record in records.items():
        assert record.image == (coco_root / "train2017" / f"{name}.jpg").read_bytes()
    assert capsys.readouterr().out == ""


def test_coco_annotations_are_parsed_at_the_first_mask_and_once(coco_root, monkeypatch):
    parsed, load = [], json.load
    monkeypatch.setattr(json, "load", lambda *a, **k: parsed.append(1) or load(*a, **k))
    made = coco.source(coco_root)
    assert parsed == []
    read_all(made)
    read_all(coco.source(coco_root))
    assert parsed == [1]


@pytest.mark.parametrize("inner", ["", "train2017"])
def test_coco_ready_masks(coco_root, inner, tmp_path):
    names = ["000000000009", "000000000025", "000000000030"]
    for seed, name in enumerate(names):
        save(tmp_path / "masks" / inner / f"{name}.png", ids(seed, [*range(81), 255], (24, 32)))
    save(tmp_path / "masks" / inner / "000000000139.png", ids(9, [0]))  # of val2017: UniMatch's folder holds both splits
    made = coco.source(coco_root, masks="masks")
    for seed, (name, record) in enumerate(read_all(made).items()):
        assert np.array_equal(decoded(record.mask), ids(seed, [*range(81), 255], (24, 32))), name
    assert made.options["labels"] == "masks"
    lines = "".join(f"train2017/{name}.jpg masks/{name}.png\n" for name in reversed(names[1:]))
    write(tmp_path / "labeled.txt", lines)
    assert list(read_all(coco.source(coco_root, masks=tmp_path / "masks", list_file=tmp_path / "labeled.txt"))) == names[1:]
    (tmp_path / "masks" / inner / f"{names[0]}.png").unlink()
    assert "000000000009.jpg has no mask of the same stem" in coco.source(coco_root, masks="masks").problems[0]


def test_coco_unlabelled_and_mistakes(coco_root, monkeypatch):
    records = read_all(coco.source(coco_root, "unlabeled", unlabeled=True))
    assert list(records) == ["000000000001"] and records["000000000001"].mask is None
    for arguments, message in [
            ({"split": "unlabeled"}, "unlabeled2017 has no annotations; pack it unlabelled"),
            ({"split": "test"}, "split: test; the splits of COCO 2017 are train, val, unlabeled"),
            ({"split": "val"}, r"no folder 'val2017' in .*folders there: annotations, train2017, unlabeled2017"),
            ({"masks": "none"}, "there is no local folder .*none with masks")]:
        with pytest.raises(InputError, match=message):
            coco.source(coco_root, **arguments)
    save(coco_root / "train2017" / "000000000031.jpg", picture(3))
    made = coco.source(coco_root)
    with pytest.raises(InputError, match=r"000000000031.jpg is not in .*instances_train2017.json"):
        made.read(made.entries[3])
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(InputError, match=r"COCO is read with pycocotools, which is not installed; pip install pycocotools"):
        coco.source(coco_root)
    coco.source(coco_root, unlabeled=True)
    (coco_root / "annotations" / "instances_train2017.json").unlink()
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"no file .*instances_train2017.json; add it, give masks"):
        coco.source(coco_root)


@pytest.mark.parametrize(("change_it", "message"), [
    (lambda plain: plain["categories"].append({"id": 91, "name": "hat"}), "categories that COCO has not: hat"),
    (lambda plain: plain.pop("images"), r"is no instances file of COCO \(KeyError: 'images'\)"),
    (lambda plain: plain["annotations"][0].pop("category_id"), r"is no instances file of COCO \(KeyError"),
    (lambda plain: plain["annotations"][4]["segmentation"].update(size=[9, 9]), "a segmentation of 000000000025.jpg")])
def test_coco_damaged_annotations(coco_root, change_it, message):
    file = coco_root / "annotations" / "instances_train2017.json"
    plain = json.loads(file.read_text())
    change_it(plain)
    file.write_text(json.dumps(plain))
    made = coco.source(coco_root)
    with pytest.raises(InputError, match=message):
        made.read(made.entries[1])


def test_coco_is_listed_without_opening_a_file(coco_root):
    for number in range(1000):
        os.symlink("nowhere", coco_root / "train2017" / f"{number + 1000:012d}.jpg")
    (coco_root / "annotations" / "instances_train2017.json").write_text("not looked at yet")
    assert len(coco.source(coco_root).entries) == 1003


# ---- ADE20K

def test_ade20k(tmp_path):
    base = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "train"), ("validation", "val")):
        for number in (1, 2):
            save(base / "images" / split / f"ADE_{name}_{number:08d}.jpg", picture(number))
            save(base / "annotations" / split / f"ADE_{name}_{number:08d}.png", ids(number, range(151)))
    for root in (tmp_path, base):
        records = read_all(ade20k.source(root))
        assert list(records) == ["ADE_train_00000001", "ADE_train_00000002"]
        for number, record in enumerate(records.values(), start=1):
            raw = ids(number, range(151))
            assert np.array_equal(decoded(record.mask), np.where(raw == 0, 255, raw - 1))
            assert record.image == (base / "images" / "training" / f"{record.image_id}.jpg").read_bytes()
    assert list(read_all(ade20k.source(tmp_path, "validation"))) == ["ADE_val_00000001", "ADE_val_00000002"]
    names = ade20k.CLASSES.names
    assert len(set(names)) == 150 and (names[0], names[12], names[149]) == ("wall", "person", "flag")
    assert len(ade20k.CLASSES.thing_ids) == 100 and len(set(ade20k.CLASSES.palette)) == 150
    write(tmp_path / "list.txt", "images/training/ADE_train_00000002.jpg annotations/training/ADE_train_00000002.png\n")
    assert list(read_all(ade20k.source(tmp_path, list_file=tmp_path / "list.txt"))) == ["ADE_train_00000002"]
    (base / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    assert "ADE_train_00000001.jpg has no mask" in ade20k.source(tmp_path).problems[0]
    assert read_all(ade20k.source(tmp_path, unlabeled=True))["ADE_train_00000001"].mask is None
    with pytest.raises(InputError, match="split: train; the splits of ADE20K are training, validation"):
        ade20k.source(tmp_path, "train")
    with pytest.raises(InputError, match=r"no folder 'images' in .*folders there: images_detectron2|folders there: training"):
        ade20k.source(base / "annotations")


def test_ade20k_masks_of_train_ids_are_not_shifted_twice(tmp_path):
    save(tmp_path / "images" / "training" / "ADE_train_00000001.jpg", picture(0))
    save(tmp_path / "annotations" / "training" / "ADE_train_00000001.png", ids(0, [*range(150), 255]))
    made = ade20k.source(tmp_path)
    with pytest.raises(InputError, match=r"ADE_train_00000001.png: unknown id\(s\) 255"):
        made.read(made.entries[0])
    assert "with 'reduced'" in made.remedy
    record = read_all(ade20k.source(tmp_path, reduced=True))["ADE_train_00000001"]
    assert record.mask == (tmp_path / "annotations" / "training" / "ADE_train_00000001.png").read_bytes()


# ---- WHU-CD and LEVIR-CD

def save_change(base, name, seed, size=SIZE, changed=255):
    save(base / "A" / f"{name}.png", picture(seed, size))
    save(base / "B" / f"{name}.png", picture(seed + 50, size))
    save(base / "label" / f"{name}.png", ids(seed, [0, changed], size))


def test_change_flat_layout_with_lists(tmp_path):
    for seed in range(4):
        save_change(tmp_path, f"whucd_{seed:05d}", seed, changed=1 if seed == 3 else 255)
    write(tmp_path / "list" / "train.txt", "whucd_00003.png\nwhucd_00001.png\n")
    write(tmp_path / "list" / "5_train_supervised.txt", "whucd_00001.png\n")
    records = read_all(change.source(tmp_path))
    assert list(records) == [f"whucd_{seed:05d}" for seed in range(4)]
    for seed, (name, record) in enumerate(records.items()):
        assert np.array_equal(decoded(record.mask), ids(seed, [0, 255]) == 255), name
        assert decoded(record.mask).max() == 1
        assert record.image == (tmp_path / "A" / f"{name}.png").read_bytes()
        assert record.image_b == (tmp_path / "B" / f"{name}.png").read_bytes()
    assert change.CLASSES.names == ("unchanged", "changed")
    made = change.source(tmp_path, "train")
    assert list(read_all(made)) == ["whucd_00001", "whucd_00003"] and made.options["list"] == "train.txt"
    assert list(read_all(change.source(tmp_path, "5_train_supervised"))) == ["whucd_00001"]
    unlabelled = read_all(change.source(tmp_path, "train", unlabeled=True))
    assert [record.mask for record in unlabelled.values()] == [None, None] and unlabelled["whucd_00003"].image_b
    with pytest.raises(InputError, match=r"split: dusk; the lists in .*list are 5_train_supervised, train"):
        change.source(tmp_path, "dusk")


def test_change_tiles_are_cut_row_by_row(tmp_path):
    for seed, name in enumerate(("train_1", "train_2", "train_10")):
        save_change(tmp_path / "train", name, seed, (16, 24))
    save_change(tmp_path / "train", "small", 9, (8, 8))
    save_change(tmp_path / "test", "test_1", 5)
    records = read_all(change.source(tmp_path, "train", tile=8))
    assert len(records) == 3 * 6 + 1 and list(records)[:2] == ["small", "train_10_1"]
    for seed, name in enumerate(("train_1", "train_2", "train_10")):
        for number in range(1, 7):
            record, top, left = records[f"{name}_{number}"], (number - 1) // 3 * 8, (number - 1) % 3 * 8
            part = np.s_[top:top + 8, left:left + 8]
            assert np.array_equal(decoded(record.image), picture(seed, (16, 24))[part])
            assert np.array_equal(decoded(record.image_b), picture(seed + 50, (16, 24))[part])
            assert np.array_equal(decoded(record.mask), ids(seed, [0, 255], (16, 24))[part] == 255)
            assert (record.group, record.index) == (name, number)
    assert records["small"].image == (tmp_path / "train" / "A" / "small.png").read_bytes()
    assert (records["small"].group, records["small"].index) == (None, None)
    whole = read_all(change.source(tmp_path, "train"))
    assert list(whole) == ["small", "train_1", "train_10", "train_2"]
    write(tmp_path / "labeled.txt", "train_2_6.png\ntrain_1_2.png\n")
    made = change.source(tmp_path, "train", tile=8, list_file=tmp_path / "labeled.txt")
    assert list(read_all(made)) == ["train_1_2", "train_2_6"]
    edge = read_all(change.source(tmp_path, "train", tile=10))
    assert decoded(edge["train_1_6"].image).shape == (6, 4, 3) and len(edge) == 3 * 6 + 1
    assert all(record.mask is None for record in read_all(change.source(tmp_path, "train", 8, unlabeled=True)).values())


def test_change_decodes_a_large_pair_once_for_its_tiles(tmp_path, monkeypatch):
    for name in ("train_1", "train_2"):
        save_change(tmp_path / "train", name, 1, (32, 32))
    opened, read_file = [], change.read_file
    monkeypatch.setattr(change, "read_file", lambda path: opened.append(path) or read_file(path))
    assert len(read_all(change.source(tmp_path, "train", tile=8))) == 32 and len(opened) == 6


def test_change_labels_of_other_forms(tmp_path):
    save_change(tmp_path, "one", 0)
    label, made = tmp_path / "label" / "one.png", change.source(tmp_path)
    Image.fromarray(ids(0, [0, 255]) == 255).save(label, bits=1)
    assert label.read_bytes()[24] == 1 and np.array_equal(decoded(read_all(made)["one"].mask), ids(0, [0, 255]) == 255)
    save(label, ids(0, [0, 1]), default_palette(2))
    assert np.array_equal(decoded(read_all(made)["one"].mask), ids(0, [0, 1]))
    for bad, message in ((ids(0, [0, 1, 255]), r"unknown id\(s\) 1$"), (ids(0, [0, 128, 255]), r"unknown id\(s\) 128"),
                         (picture(0), "the mask is a RGB PNG")):
        save(label, bad)
        with pytest.raises(InputError, match=rf"one.png: {message}"):
            made.read(made.entries[0])


def test_change_mistakes(tmp_path):
    for seed, name in enumerate("abcd"):
        save_change(tmp_path, name, seed)
    (tmp_path / "B" / "a.png").unlink()
    (tmp_path / "A" / "b.png").unlink()
    (tmp_path / "label" / "c.png").unlink()
    save(tmp_path / "label" / "e.png", ids(0, [0]))
    problems = sorted(problem.rpartition("/")[2] for problem in change.source(tmp_path).problems)
    assert problems == ["a.png has no second date of the same stem in B", "b.png has no first date of the same stem in A",
                        "c.png has no mask of the same stem", "e.png has no image of the same stem"]
    write(tmp_path / "some.txt", "d.png\nc.png\n")
    made = change.source(tmp_path, list_file=tmp_path / "some.txt")
    assert [entry.image_id for entry in made.entries] == ["d"]
    assert made.problems == [f"{tmp_path} has no whole pair of the listed name c"]
    save(tmp_path / "B" / "d.png", picture(1, (20, 20)))
    tiled = change.source(tmp_path, tile=8, list_file=write_list(tmp_path, ["d_1"]))
    with pytest.raises(InputError, match=r"B/d.png is 20 x 20, .*A/d.png 16 x 12"):
        tiled.read(tiled.entries[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no folder A in .*folders there: none"):
        change.source(tmp_path / "empty")
    (tmp_path / "levir" / "train" / "A").mkdir(parents=True)
    with pytest.raises(InputError, match="split: none given; the splits there are train"):
        change.source(tmp_path / "levir")
    with pytest.raises(InputError, match=r"no folder 'B' in .*levir/train"):
        change.source(tmp_path / "levir", "train")
    with pytest.raises(InputError, match="tile: 0 is no size"):
        change.source(tmp_path, tile=0)


# ---- ACDC, cardiac

DEPTHS = {"patient099": 3, "patient038": 2, "patient050": 2, "patient028": 4}


def heart(name, size=(10, 14)):
    """A volume of 0 to 1, and its labels."""
    seed, depth = int(name[7:10]) * 10 + int(name[-1]), DEPTHS[name[:10]]
    rng = np.random.default_rng(seed)
    volume = rng.random((depth, *size), np.float32)
    volume.reshape(-1)[:2] = 0, 1
    return volume, rng.integers(0, 4, (depth, *size), np.uint8)


def save_h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip")


@pytest.fixture
def heart_root(tmp_path):
    """Three patients to train on, in the list's order, as slices; one to validate on, as volumes."""
    lines = []
    for patient in ("patient099", "patient038", "patient050"):
        for frame in ("frame01", "frame02"):
            volume, labels = heart(f"{patient}_{frame}")
            for place in reversed(range(len(volume))):
                name = f"{patient}_{frame}_slice_{place + 1}"
                save_h5(tmp_path / "data" / "slices" / f"{name}.h5", image=volume[place], label=labels[place])
                lines.append(name)
    for frame in ("frame01", "frame02"):
        volume, labels = heart(f"patient028_{frame}")
        save_h5(tmp_path / "data" / f"patient028_{frame}.h5", image=volume, label=labels)
    write(tmp_path / "train_slices.list", "\n".join(lines) + "\n")
    write(tmp_path / "val.list", "patient028_frame01\npatient028_frame02\n")
    return tmp_path


def test_cardiac_slices_are_16_bit_grey(heart_root):
    made = acdc_cardiac.source(heart_root)
    records = read_all(made)
    assert len(records) == 14 and made.options["scaling"] == "value = low + (high - low) * pixel / 65280, floored"
    assert made.classes.names == ("background", "right ventricle", "myocardium", "left ventricle")
    for name, record in records.items():
        group, _, number = name.partition("_slice_")
        volume, labels = heart(group)
        value = volume[int(number) - 1]
        assert (record.group, record.index) == (group, int(number))
        grey = decoded(record.image)
        assert grey.dtype == np.uint16 and Image.open(io.BytesIO(record.image)).mode == "I;16"
        assert np.array_equal(grey, np.floor(value.astype(np.float64) * 65280)) and grey.max() <= 65280
        # what a training sees is what the published one saw
        seen = np.asarray(decode_image(record.image))
        assert np.array_equal(seen, np.repeat(np.floor(value.astype(np.float64) * 255)[..., None], 3, axis=2))
        assert np.array_equal(decoded(record.mask), labels[int(number) - 1])


def test_cardiac_volumes_become_slices(heart_root):
    records = read_all(acdc_cardiac.source(heart_root, "val"))
    assert list(records) == [f"patient028_frame0{frame}_slice_{number}" for frame in (1, 2) for number in (1, 2, 3, 4)]
    for name, record in records.items():
        volume, labels = heart(name[:18])
        number = int(name[-1])
        assert (record.group, record.index) == (name[:18], number)
        assert np.array_equal(decoded(record.image), np.floor(volume[number - 1].astype(np.float64) * 65280))
        assert np.array_equal(decoded(record.mask), labels[number - 1])


def test_cardiac_cases_are_the_first_patients_of_the_list(heart_root):
    def patients(**selection):
        return {record.group[:10] for record in read_all(acdc_cardiac.source(heart_root, **selection)).values()}

    assert patients(cases=1) == {"patient099"} and patients(cases=3) == {"patient099", "patient038", "patient050"}
    assert patients(cases=2, rest=True) == {"patient050"}
    others = read_all(acdc_cardiac.source(heart_root, cases=1, rest=True, unlabeled=True))
    assert len(others) == 8 and all(record.mask is None for record in others.values())
    for arguments, message in [({"cases": 7}, "cases: 7; the list names 3 patients"), ({"cases": 0}, "cases: 0"),
                               ({"cases": 3, "rest": True}, "cases: 3"), ({"rest": True}, "rest: without cases")]:
        with pytest.raises(InputError, match=message):
            acdc_cardiac.source(heart_root, **arguments)


def test_cardiac_list_of_paths(heart_root, tmp_path):
    write(tmp_path / "labeled.txt", "data/slices/patient038_frame02_slice_1.h5\ndata/patient028_frame01.h5\n")
    (heart_root / "train_slices.list").unlink()
    made = acdc_cardiac.source(heart_root, list_file=tmp_path / "labeled.txt")
    assert list(read_all(made)) == [*(f"patient028_frame01_slice_{n}" for n in (1, 2, 3, 4)), "patient038_frame02_slice_1"]
    with pytest.raises(InputError, match=r"no list .*train_slices.list; .* lists there: val.list"):
        acdc_cardiac.source(heart_root)


def test_cardiac_mistakes(heart_root, monkeypatch):
    made = acdc_cardiac.source(heart_root, cases=1)
    file, volume = made.entries[0].image, heart("patient099_frame01")[0][0]
    for arrays, message in [
            ({"image": volume * 3}, r"slice_1.h5: values are 0 to 3, not all 0 to 1; give the data set's value_range"),
            ({"image": np.full((10, 14), np.nan, np.float32)}, "values are nan"),
            ({"image": volume, "label": np.full((10, 14), 4, np.uint8)}, r"slice_1.h5: unknown id\(s\) 4"),
            ({"image": volume, "label": np.full((10, 14), 0.5)}, "labels are no whole numbers"),
            ({"image": volume}, "slice_1.h5 has no image and label to read"),
            ({"image": volume[None]}, "a slice of image has 3 dimensions")]:
        save_h5(file, **arrays)
        with pytest.raises(InputError, match=message):
            made.read(made.entries[0])
    save_h5(file, image=volume * 30 - 10, label=np.zeros((10, 14), np.uint8))
    scaled = acdc_cardiac.source(heart_root, cases=1, value_range=(-10.0, 20.0))
    assert abs(decoded(scaled.read(scaled.entries[0]).image) - volume * 65280.0).max() < 2
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="slice_1.h5 has no image and label to read"):
        made.read(made.entries[0])
    (heart_root / "data" / "patient028_frame02.h5").unlink()
    assert acdc_cardiac.source(heart_root, "val").problems == [f"{heart_root}/data has no file of the listed name "
                                                               "patient028_frame02"]
    with pytest.raises(InputError, match="split: dusk; the splits of ACDC are train, val, test"):
        acdc_cardiac.source(heart_root, "dusk")
    with pytest.raises(InputError, match="no folder 'data'"):
        acdc_cardiac.source(heart_root / "data")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="ACDC is read with h5py, which is not installed; pip install h5py"):
        acdc_cardiac.source(heart_root)


# ---- lists

def test_lists(tmp_path):
    write(tmp_path / "names.txt", "\ufeff b.png\n\n/x/a.jpg /y/a_mask.png\nb.png\nfolder/c_1.2.png\n")
    assert read_names(tmp_path / "names.txt") == ["b", "a", "c_1.2"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("empty.txt", "is empty"), ("bytes.txt", "it is no text"), ("none.txt", "No such file")):
        with pytest.raises(InputError, match=message):
            read_names(tmp_path / name)

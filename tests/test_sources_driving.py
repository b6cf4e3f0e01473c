"""Sources of driving data sets, on small trees of the published names, bit depths and palettes: every published id lands on
its class, images keep their bytes, and what is missing or odd is named.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.shards import inspect_record
from ecocseg.data.sources import acdc_driving, cityscapes, dark_zurich, gta, synthia, tree
from ecocseg.errors import InputError

NAMES_19 = CLASS_LISTS["cityscapes"].names
SIZE = (6, 8)
# the published tables, by id; None where a label is not trained
LABELS = [None] * 7 + ["road", "sidewalk", None, None, "building", "wall", "fence", None, None, None, "pole", None,
                       "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
                       "bus", None, None, "train", "motorcycle", "bicycle"]
SYNTHIA = [None, "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car", "traffic sign", "person",
           "bicycle", "motorcycle", None, None, "traffic light", "terrain", "rider", "truck", "bus", "train", "wall", None]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def save(path, array, palette=None):
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)  # grey becomes a palette image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write(path, buffer.getvalue())


def picture(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def every(count, seed=0, size=SIZE):
    """A mask with each id 0 to count - 1."""
    ids = np.arange(size[0] * size[1]) % count
    return np.random.default_rng(seed).permutation(ids).reshape(size).astype(np.uint8)


def expected(ids, table, names=NAMES_19):
    trained = np.array([names.index(name) if name in names else 255 for name in table])
    return trained[ids]


def read_all(source):
    """Records by id, read by a source that went through pickle; every one is fit to be packed."""
    assert [entry.image_id for entry in source.entries] == sorted({entry.image_id for entry in source.entries})
    assert json.loads(json.dumps(dict(source.options))) == source.options
    source = pickle.loads(pickle.dumps(source))
    records = {entry.image_id: source.read(entry) for entry in source.entries}
    for entry in source.entries:
        record = records[entry.image_id]
        assert (record.image_id, record.group, record.index) == (entry.image_id, entry.group, entry.index)
        assert record.image == entry.image.read_bytes()
        inspect_record(record, source.classes)
    return records


def mask_of(record):
    image = Image.open(io.BytesIO(record.mask))
    assert image.format == "PNG" and image.mode in ("L", "P")
    return np.asarray(image)


def without_masks(source):
    records = read_all(source)
    assert source.options["unlabeled"] is True and not source.problems
    return records and all(record.mask is None for record in records.values())


# --- Cityscapes

CITY_FRAMES = {"train": ["aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "bochum/bochum_000000_000313"],
               "val": ["frankfurt/frankfurt_000000_000294"], "test": ["berlin/berlin_000000_000019"],
               "train_extra": ["augsburg/augsburg_000000_000003", "troisdorf/troisdorf_000000_000073"]}


@pytest.fixture
def cityscapes_root(tmp_path):
    root = tmp_path / "cityscapes"
    for split, frames in CITY_FRAMES.items():
        for seed, frame in enumerate(frames):
            save(root / "leftImg8bit" / split / f"{frame}_leftImg8bit.png", picture(seed))
            for kind in ("gtCoarse",) if split == "train_extra" else ("gtFine",) if split == "test" else ("gtFine", "gtCoarse"):
                ids = every(4 if split == "test" else 34, seed + (kind == "gtCoarse") * 100)
                stem = root / kind / split / f"{frame}_{kind}"
                save(Path(f"{stem}_labelIds.png"), ids)
                save(Path(f"{stem}_instanceIds.png"), ids.astype(np.uint16) * 1000)
                save(Path(f"{stem}_color.png"), picture(9))
                save(Path(f"{stem}_labelTrainIds.png"), np.zeros(SIZE, np.uint8))
                write(Path(f"{stem}_polygons.json"), b"{}")
    write(root / "leftImg8bit" / "train" / "aachen" / "._aachen_000000_000019_leftImg8bit.png", b"")
    return root


@pytest.mark.parametrize(("annotation", "offset"), [("fine", 0), ("coarse", 100)])
def test_cityscapes_every_label_id(cityscapes_root, annotation, offset):
    source = cityscapes.source(cityscapes_root, splits=("val", "train"), annotation=annotation)
    assert source.problems == [] and source.classes == CLASS_LISTS["cityscapes"] and source.dataset == "cityscapes"
    records = read_all(source)
    assert list(records) == [*(f"train/{f}" for f in CITY_FRAMES["train"]), "val/frankfurt/frankfurt_000000_000294"]
    for name, seed in zip(records, (0, 1, 2, 0), strict=True):
        ids = every(34, seed + offset)
        assert set(np.unique(ids)) == set(range(34))
        assert np.array_equal(mask_of(records[name]), expected(ids, LABELS))
    bochum = records["train/bochum/bochum_000000_000313"]
    assert (bochum.group, bochum.index) == ("bochum", 313)
    assert source.options == {"source": "cityscapes", "splits": ["val", "train"], "cities": [], "annotation": annotation,
                              "unlabeled": False}


def test_cityscapes_selections(cityscapes_root):
    some = cityscapes.source(cityscapes_root, cities=["bochum"])
    assert [entry.image_id for entry in some.entries] == ["train/bochum/bochum_000000_000313"]
    extra = read_all(cityscapes.source(cityscapes_root, splits=["train_extra"], annotation="coarse"))
    assert list(extra) == ["train_extra/augsburg/augsburg_000000_000003"]  # the empty image is left out
    assert np.array_equal(mask_of(next(iter(extra.values()))), expected(every(34, 100), LABELS))
    assert without_masks(cityscapes.source(cityscapes_root, splits=["test", "train_extra"], unlabeled=True))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"splits": ["test"]}, r"splits: test has no fine masks; pack it unlabelled"),
    ({"splits": ["train_extra"]}, r"train_extra has no fine masks; take the coarse annotation, or pack it unlabelled"),
    ({"splits": ["train", "dusk"]}, r"splits: dusk; the splits of Cityscapes are train, val, test, train_extra"),
    ({"splits": []}, r"splits: none given"),
    ({"annotation": "finest"}, r"annotation: finest; its annotations are fine, coarse"),
    ({"cities": ["aachen", "atlantis"]}, r"no image of atlantis in train; cities there are aachen, bochum")])
def test_cityscapes_selection_that_is_not_there(cityscapes_root, arguments, message):
    with pytest.raises(InputError, match=message):
        cityscapes.source(cityscapes_root, **arguments)


def test_cityscapes_problems_are_named(cityscapes_root):
    fine = cityscapes_root / "gtFine" / "train"
    (fine / "aachen" / "aachen_000000_000019_gtFine_labelIds.png").unlink()
    save(fine / "bochum" / "bochum_000000_000313_gtFine_labelIds.png", np.full(SIZE, 34, np.uint8))
    save(fine / "bochum" / "bochum_000009_000313_gtFine_labelIds.png", every(34))
    source = cityscapes.source(cityscapes_root)
    assert len(source.problems) == 2 and "labelIds.png" in source.remedy
    assert "aachen_000000_000019_leftImg8bit.png has no mask" in source.problems[0]
    assert "bochum_000009_000313_gtFine_labelIds.png has no image" in source.problems[1]
    with pytest.raises(InputError, match=r"bochum_000000_000313_gtFine_labelIds.png: unknown id\(s\) 34"):
        source.read(source.entries[-1])
    save(fine / "bochum" / "bochum_000000_000313_gtFine_labelIds.png", every(34, size=(6, 9)))
    with pytest.raises(InputError, match=r"bochum_000000_000313: the mask is 9 x 6, the image 8 x 6"):
        read_all(source)


def test_cityscapes_folder_that_is_not_there(cityscapes_root):
    with pytest.raises(InputError, match=r"there is no local folder .*nowhere with the train images"):
        cityscapes.source(cityscapes_root / "nowhere")
    with pytest.raises(InputError, match=r"no folder 'leftImg8bit' in .* folders there: test, train, train_extra, val"):
        cityscapes.source(cityscapes_root / "leftImg8bit")
    for path in (cityscapes_root / "gtFine" / "val" / "frankfurt").glob("*labelIds.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"no mask \*_gtFine_labelIds.png in .*frankfurt; add them, or pack unlabelled"):
        cityscapes.source(cityscapes_root, splits=["val"])
    (cityscapes_root / "gtFine").rename(cityscapes_root / "fine")
    with pytest.raises(InputError, match=r"no folder 'gtFine' .* folders there: fine, gtCoarse, leftImg8bit"):
        cityscapes.source(cityscapes_root)


# --- GTA5

@pytest.fixture
def gta_root(tmp_path):
    """Palette PNGs of label ids 0 to 34; 00002's label is of another size."""
    root = tmp_path / "gta"
    for number in (1, 2, 24966):
        save(root / "images" / f"{number:05d}.png", picture(number))
        save(root / "labels" / f"{number:05d}.png", every(35, number, (6, 9) if number == 2 else SIZE), palette=GTA_PALETTE)
        save(root / "labels" / f"{number:05d}_labelTrainIds.png", every(19, number))
    return root


GTA_PALETTE = [value for index in range(35) for value in (index, 128, 255 - index)]


def test_gta_every_label_id(gta_root):
    assert Image.open(gta_root / "labels" / "00001.png").mode == "P"
    source = gta.source(gta_root, skip_other_size=True)
    assert source.problems == [] and source.classes == CLASS_LISTS["cityscapes"]
    records = read_all(source)
    assert [(r.image_id, r.index, r.group) for r in records.values()] == [("00001", 1, None), ("24966", 24966, None)]
    for number in (1, 24966):
        ids = every(35, number)
        assert set(np.unique(ids)) == set(range(35))
        assert np.array_equal(mask_of(records[f"{number:05d}"]), expected(ids, [*LABELS, None]))
    assert source.options == {"source": "gta", "skip_other_size": True, "left_out": ["00002"], "unlabeled": False}


def test_gta_other_size_is_a_problem_unless_left_out(gta_root):
    source = gta.source(gta_root)
    assert len(source.entries) == 3 and source.options["left_out"] == []
    with pytest.raises(InputError, match=r"labels/00002.png is 9 x 6, its image 8 x 6 .*skip_other_size"):
        source.read(source.entries[1])
    assert without_masks(gta.source(gta_root, unlabeled=True)) and len(gta.source(gta_root, unlabeled=True).entries) == 3


def test_gta_problems_are_named(gta_root):
    save(gta_root / "labels" / "00001.png", np.full(SIZE, 35, np.uint8))
    (gta_root / "labels" / "24966.png").unlink()
    save(gta_root / "labels" / "00077.png", every(35), palette=GTA_PALETTE)
    source = gta.source(gta_root, skip_other_size=True)
    assert ["24966.png has no mask" in source.problems[0], "00077.png has no image" in source.problems[1]] == [True, True]
    with pytest.raises(InputError, match=r"00001.png: unknown id\(s\) 35"):
        source.read(source.entries[0])
    save(gta_root / "labels" / "00001.png", np.where(every(2), 255, 18).astype(np.uint8))  # of train ids
    with pytest.raises(InputError, match=r"00001.png: unknown id\(s\) 255"):
        source.read(source.entries[0])
    write(gta_root / "labels" / "00001.png", b"cut")  # neither listing nor its headers hide it
    source = gta.source(gta_root, skip_other_size=True)
    with pytest.raises(InputError, match=r"00001.png: the mask does not decode"):
        source.read(source.entries[0])


def test_gta_folder_that_is_not_there(gta_root):
    with pytest.raises(InputError, match=r"no folder 'images' in .*labels with the images; .* folders there: none"):
        gta.source(gta_root / "labels")
    (gta_root / "labels").rename(gta_root / "masks")
    with pytest.raises(InputError, match=r"no folder 'labels' .*pack unlabelled images; folders there: images, masks"):
        gta.source(gta_root)
    (gta_root / "labels").mkdir()
    with pytest.raises(InputError, match=r"no mask \*.png in .*labels"):
        gta.source(gta_root)


# --- SYNTHIA

def png16(array, filters=(0, 1, 2, 3, 4)):
    """A PNG of three 16-bit channels written by the rules of the format, its rows filtered by each of the given in turn."""
    height, width, _ = array.shape
    rows = array.astype(">u2").tobytes()
    stride, lag = width * 6, 6
    above, out = bytes(stride), bytearray()
    for y in range(height):
        row, kind = rows[y * stride:(y + 1) * stride], filters[y % len(filters)]
        out.append(kind)
        for x in range(stride):
            a, b, c = (row[x - lag] if x >= lag else 0), above[x], (above[x - lag] if x >= lag else 0)
            nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            out.append((row[x] - (0, a, b, (a + b) // 2, nearest)[kind]) & 255)
        above = row
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(out))),
              (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data
                                           + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)


def labels16(ids, seed=0):
    """Class ids in the first channel, object numbers over the whole range in the second."""
    array = np.zeros((*ids.shape, 3), np.uint16)
    array[..., 0] = ids
    array[..., 1] = np.random.default_rng(seed).integers(0, 1 << 16, ids.shape)
    return array


@pytest.fixture
def synthia_root(tmp_path):
    root = tmp_path / "RAND_CITYSCAPES"
    for number in (0, 9399):
        save(root / "RGB" / f"{number:07d}.png", picture(number))
        write(root / "GT" / "LABELS" / f"{number:07d}.png", png16(labels16(every(23, number), number)))
        save(root / "GT" / "LABELS" / f"{number:07d}_labelTrainIds.png", every(19))
        save(root / "GT" / "COLOR" / f"{number:07d}.png", picture(7))
    return root


@pytest.mark.parametrize(("arguments", "chosen"), [({}, "cityscapes"), ({"classes": "synthia16"}, "synthia16")])
def test_synthia_every_id(synthia_root, arguments, chosen):
    assert np.asarray(Image.open(synthia_root / "GT" / "LABELS" / "0000000.png"))[..., 0].max() == 0  # the low byte is lost
    source = synthia.source(synthia_root, **arguments)
    assert source.problems == [] and source.classes == CLASS_LISTS[chosen] and source.options["classes"] == chosen
    records = read_all(source)
    assert [(r.image_id, r.index, r.group) for r in records.values()] == [("0000000", 0, None), ("9399".zfill(7), 9399, None)]
    for number in (0, 9399):
        ids = every(23, number)
        assert set(np.unique(ids)) == set(range(23))
        assert np.array_equal(mask_of(records[f"{number:07d}"]), expected(ids, SYNTHIA, CLASS_LISTS[chosen].names))


def test_synthia_lists_mean_the_same_classes():
    full, shared = CLASS_LISTS["cityscapes"], CLASS_LISTS["synthia16"]
    wide, narrow = synthia.class_ids(full), synthia.class_ids(shared)
    assert [name for name in full.names if name not in shared.names] == ["terrain", "truck", "train"]
    for index in range(23):
        name = full.names[wide[index]] if wide[index] != 255 else None
        assert (shared.names[narrow[index]] if narrow[index] != 255 else None) == (name if name in shared.names else None)


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (4, 2, 0, 3, 1)])
def test_sixteen_bits_are_read_exactly(filters):
    array = np.random.default_rng(3).integers(0, 1 << 16, (11, 13, 3)).astype(np.uint16)
    read = synthia.decode_first_channel(png16(array, filters), "x.png")
    assert read.dtype == np.uint16 and np.array_equal(read, array[..., 0])


def test_sixteen_bits_of_a_whole_image_are_read_quickly():
    data = io.BytesIO()
    ids = np.kron(every(23, size=(20, 32)), np.ones((38, 40), np.uint8))
    array = labels16(ids)
    height, width, _ = array.shape
    rows = np.zeros((height, 1 + width * 6), np.uint8)
    rows[:, 1:] = array.astype(">u2").view(np.uint8).reshape(height, -1)
    for name, part in ((b"", b"\x89PNG\r\n\x1a\n"), (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
                       (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")):
        data.write(struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) if name else part)
    start = time.process_time()
    assert np.array_equal(synthia.decode_first_channel(data.getvalue(), "x.png"), ids) and ids.shape == (760, 1280)
    assert time.process_time() - start < 1  # 0.1 measured; a loop over pixels takes many


def test_synthia_problems_are_named(synthia_root):
    labels = synthia_root / "GT" / "LABELS"
    source = synthia.source(synthia_root)
    entry = source.entries[0]
    for data, message in (
            (png16(labels16(np.full(SIZE, 23))), r"0000000.png: unknown id\(s\) 23"),
            (png16(labels16(np.full(SIZE, 255))), r"unknown id\(s\) 255"),
            (png16(labels16(np.full(SIZE, 3 + 256))), r"unknown id\(s\) up to 259"),  # the high byte counts
            (png16(labels16(every(23)))[:-40], r"0000000.png: the mask does not decode"),
            ((synthia_root / "GT" / "COLOR" / "0000000.png").read_bytes(), r"no PNG of three 16-bit channels; give GT/LABELS"),
            (b"", r"no PNG of three 16-bit channels")):
        write(labels / "0000000.png", data)
        with pytest.raises(InputError, match=message):
            source.read(entry)
    write(labels / "0000000.png", png16(labels16(every(23, size=(6, 9)))))
    with pytest.raises(InputError, match=r"the mask is 9 x 6, the image 8 x 6"):
        read_all(source)
    (labels / "0000000.png").unlink()
    with pytest.raises(InputError, match=r"0000000.png cannot be read: No such file"):
        source.read(entry)
    write(labels / "0000005.png", png16(labels16(every(23))))
    problems = synthia.source(synthia_root).problems
    assert "0000000.png has no mask" in problems[0] and "0000005.png has no image" in problems[1]
    assert without_masks(synthia.source(synthia_root, unlabeled=True))


def test_synthia_selection_that_is_not_there(synthia_root):
    with pytest.raises(InputError, match=r"classes: voc; the class lists of SYNTHIA are cityscapes, synthia16"):
        synthia.source(synthia_root, classes="voc")
    with pytest.raises(InputError, match=r"no folder 'RGB' in .*GT with the images; give the folder RAND_CITYSCAPES; folders "
                                         r"there: COLOR, LABELS"):
        synthia.source(synthia_root / "GT")


# --- ACDC and Dark Zurich

def save_label_files(stem, seed, ids=True, train_ids=True, ref=""):
    """The files of one annotated frame: both kinds of ids say the same, as published."""
    raw = every(34, seed)
    if ids:
        save(stem.with_name(f"{stem.name}_gt{ref}_labelIds.png"), raw)
    if train_ids:
        save(stem.with_name(f"{stem.name}_gt{ref}_labelTrainIds.png"), expected(raw, LABELS).astype(np.uint8))
    save(stem.with_name(f"{stem.name}_gt{ref}_labelColor.png"), picture(5))
    save(stem.with_name(f"{stem.name}_gt{ref}_invIds.png"), np.ones(SIZE, np.uint8))


CONDITIONS = {"fog": "GOPR0475", "night": "GOPR0351", "rain": "GP010400", "snow": "GOPR0122"}


@pytest.fixture
def acdc_root(tmp_path):
    root = tmp_path / "acdc"
    for seed, (condition, sequence) in enumerate(CONDITIONS.items()):
        for split in ("train", "val", "test"):
            for frame in (41, 148):
                name = f"{sequence}_frame_{frame:06d}"
                save(root / "rgb_anon" / condition / split / sequence / f"{name}_rgb_anon.png", picture(seed))
                save(root / "rgb_anon" / condition / f"{split}_ref" / sequence / f"{name}_rgb_ref_anon.png", picture(seed + 50))
                if split != "test":
                    save_label_files(root / "gt" / condition / split / sequence / name, seed + frame)
                if split != "test" and frame == 41:  # some reference images have masks
                    save_label_files(root / "gt" / condition / f"{split}_ref" / sequence / name, seed + 900, ref="_ref")
    return root


def test_acdc_every_id_of_every_condition(acdc_root):
    source = acdc_driving.source(acdc_root, splits=["train", "val"])
    assert source.problems == [] and source.classes == CLASS_LISTS["cityscapes"] and source.dataset == "acdc_driving"
    records = read_all(source)
    assert list(records) == [f"{split}/{condition}/{sequence}/{sequence}_frame_{frame:06d}" for split in ("train", "val")
                             for condition, sequence in CONDITIONS.items() for frame in (41, 148)]
    for seed, (condition, sequence) in enumerate(CONDITIONS.items()):
        record = records[f"val/{condition}/{sequence}/{sequence}_frame_000148"]
        assert (record.group, record.index) == (f"{condition}/{sequence}", 148)
        assert np.array_equal(mask_of(record), expected(every(34, seed + 148), LABELS))
    assert source.options == {"source": "acdc_driving", "splits": ["train", "val"], "conditions": [*CONDITIONS],
                              "unlabeled": False}


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_acdc_with_one_kind_of_masks(acdc_root, kind):
    for path in acdc_root.rglob("*_gt_label*Ids.png"):
        if not path.name.endswith(f"_{kind}.png"):
            path.unlink()
    records = read_all(acdc_driving.source(acdc_root, conditions=["night"]))
    assert len(records) == 2
    for record in records.values():
        assert np.array_equal(mask_of(record), expected(every(34, 1 + record.index), LABELS))


def test_acdc_kinds_of_masks_are_not_mixed_up(acdc_root):
    """An id of the other kind is unknown, or another class: each file is read by its own name."""
    entry = acdc_driving.source(acdc_root, conditions=["fog"]).entries[0]
    save(entry.mask, np.full(SIZE, 26, np.uint8))
    source = acdc_driving.source(acdc_root, conditions=["fog"])
    with pytest.raises(InputError, match=r"labelTrainIds.png: unknown id\(s\) 26"):
        source.read(source.entries[0])
    entry.mask.unlink()
    labels = entry.mask.with_name(entry.mask.name.replace("TrainIds", "Ids"))
    save(labels, np.full(SIZE, 26, np.uint8))
    source = acdc_driving.source(acdc_root, conditions=["fog"])
    assert (mask_of(source.read(source.entries[0])) == NAMES_19.index("car")).all()
    save(labels, np.full(SIZE, 40, np.uint8))
    with pytest.raises(InputError, match=r"labelIds.png: unknown id\(s\) 40"):
        source.read(source.entries[0])


def test_acdc_reference_images(acdc_root):
    pool = acdc_driving.source(acdc_root, splits=["train_ref", "test_ref", "test"], conditions=["snow", "fog"], unlabeled=True)
    assert without_masks(pool) and len(pool.entries) == 12
    assert pool.entries[-1].image_id == "train_ref/snow/GOPR0122/GOPR0122_frame_000148"
    masked = acdc_driving.source(acdc_root, splits=["val_ref"])
    records = read_all(masked)
    assert masked.problems == [] and [record.index for record in records.values()] == [41] * 4
    assert np.array_equal(mask_of(records["val_ref/rain/GP010400/GP010400_frame_000041"]), expected(every(34, 902), LABELS))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"splits": ["train", "test"]}, r"splits: the masks of test are not public; pack it unlabelled"),
    ({"splits": ["day"]}, r"splits: day; the splits of ACDC are train, val, test, train_ref, val_ref, test_ref"),
    ({"conditions": ["hail"]}, r"conditions: hail; its conditions are fog, night, rain, snow"),
    ({"conditions": []}, r"conditions: none given")])
def test_acdc_selection_that_is_not_there(acdc_root, arguments, message):
    with pytest.raises(InputError, match=message):
        acdc_driving.source(acdc_root, **arguments)


def test_acdc_problems_are_named(acdc_root):
    for path in (acdc_root / "gt" / "fog" / "train").rglob("*000041_gt_label*Ids.png"):
        path.unlink()
    save_label_files(acdc_root / "gt" / "fog" / "train" / "GOPR0475" / "GOPR0475_frame_000999", 1)
    problems = acdc_driving.source(acdc_root).problems
    assert len(problems) == 2 and "GOPR0475_frame_000041_rgb_anon.png has no mask" in problems[0]
    assert "GOPR0475_frame_000999_gt_labelTrainIds.png has no image" in problems[1]
    (acdc_root / "rgb_anon" / "night").rename(acdc_root / "rgb_anon" / "dark")
    with pytest.raises(InputError, match=r"no folder 'night' in .*rgb_anon .* folders there: dark, fog, rain, snow"):
        acdc_driving.source(acdc_root)
    (acdc_root / "gt" / "rain" / "val").rename(acdc_root / "gt" / "rain" / "other")
    with pytest.raises(InputError, match=r"no folder 'val' in .*gt/rain with their masks; add it, or pack unlabelled images"):
        acdc_driving.source(acdc_root, splits=["val"], conditions=["rain"])


@pytest.fixture
def dark_zurich_root(tmp_path):
    root = tmp_path / "dark_zurich"
    for time_of_day, sequence in (("day", "GOPR0345"), ("night", "GOPR0351"), ("twilight", "GOPR0333")):
        save(root / "rgb_anon" / "train" / time_of_day / sequence / f"{sequence}_frame_000001_rgb_anon.png", picture(1))
    for split, sequence in (("val", "GOPR0356"), ("test", "GP020397")):
        for frame in (391, 392):
            name = f"{sequence}_frame_{frame:06d}"
            save(root / "rgb_anon" / split / "night" / sequence / f"{name}_rgb_anon.png", picture(frame))
            save(root / "rgb_anon" / f"{split}_ref" / "day" / f"{sequence}_ref" / f"{name}_ref_rgb_anon.png", picture(frame))
            if split == "val":
                save_label_files(root / "gt" / split / "night" / sequence / name, frame, train_ids=frame == 391)
    return root


def test_dark_zurich_every_id(dark_zurich_root):
    source = dark_zurich.source(dark_zurich_root, splits=["val"])
    assert source.problems == [] and source.classes == CLASS_LISTS["cityscapes"]
    records = read_all(source)
    assert list(records) == [f"val/night/GOPR0356/GOPR0356_frame_{frame:06d}" for frame in (391, 392)]
    for record in records.values():  # one has both kinds of masks, one label ids alone
        assert record.group == "night/GOPR0356"
        assert np.array_equal(mask_of(record), expected(every(34, record.index), LABELS))
    assert source.options == {"source": "dark_zurich", "splits": ["val"], "times": ["night"], "unlabeled": False}


def test_dark_zurich_pools(dark_zurich_root):
    night = dark_zurich.source(dark_zurich_root, unlabeled=True)
    assert without_masks(night) and [e.image_id for e in night.entries] == ["train/night/GOPR0351/GOPR0351_frame_000001"]
    every_time = dark_zurich.source(dark_zurich_root, times=["twilight", "day", "night"], unlabeled=True)
    assert [entry.group for entry in every_time.entries] == ["day/GOPR0345", "night/GOPR0351", "twilight/GOPR0333"]
    reference = dark_zurich.source(dark_zurich_root, splits=["val_ref"], times=["day"], unlabeled=True)
    assert [(e.image_id, e.index) for e in reference.entries] == [
        (f"val_ref/day/GOPR0356_ref/GOPR0356_frame_{frame:06d}", frame) for frame in (391, 392)]


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, r"splits: train has no public masks; pack it unlabelled"),
    ({"splits": ["train", "test"]}, r"splits: train, test has no public masks"),
    ({"splits": ["dusk"]}, r"the splits of Dark Zurich are train, val, test, val_ref, test_ref"),
    ({"times": ["noon"], "unlabeled": True}, r"times: noon; its times of day are day, night, twilight"),
    ({"splits": ["val"], "times": ["day"]}, r"no folder 'day' in .*val with the val images; .* folders there: night")])
def test_dark_zurich_selection_that_is_not_there(dark_zurich_root, arguments, message):
    with pytest.raises(InputError, match=message):
        dark_zurich.source(dark_zurich_root, **arguments)


# --- listing

def test_listing_opens_no_file_and_follows_links(tmp_path, monkeypatch):
    for path in ("real/a/1_x.png", "real/b/2_x.png", "real/.hidden/3_x.png", "real/a/.4_x.png", "real/a/1_y.png"):
        write(tmp_path / path, b"")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "linked").symlink_to(tmp_path / "real")
    monkeypatch.setattr("builtins.open", None)
    assert list(tree.files_ending(tmp_path / "list", "_x.png")) == ["linked/a/1", "linked/b/2"]
    assert list(tree.files_ending(tmp_path / "real", "_x.png", r"b/\d")) == ["b/2"]

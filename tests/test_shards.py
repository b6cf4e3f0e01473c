"""Shards: what is packed comes back; a manifest and its shards that do not fit are named; bad records are refused."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ecocseg.data import shards
from ecocseg.data.classes import CLASS_LISTS, ClassList
from ecocseg.data.pixels import class_pixel_array, read_class_pixels
from ecocseg.data.shards import (
    Record,
    check_files,
    iter_rows,
    read_manifest,
    read_metadata,
    read_row_group,
    write_shards,
)
from ecocseg.errors import InputError
from ecocseg.storage import Storage

CLASSES = ClassList("tiny", ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), (2,))


def encode(array, kind="PNG", **options):
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, kind, **options)
    return buffer.getvalue()


def image(seed=0, size=(20, 30), kind="PNG"):
    return encode(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8), kind)


def mask_array(seed=0, size=(20, 30)):
    mask = np.random.default_rng(seed).integers(0, 3, size).astype(np.uint8)
    mask[0] = 255
    return mask


def make(count=11):
    for i in range(count):
        size = (20, 30 + i % 2)
        mask = None if i % 4 == 3 else encode(mask_array(i, size))
        yield Record(f"im-{i:02d}", image(i, size, "JPEG" if i % 2 else "PNG"), mask, group="even" if i % 2 else None, index=i)


@pytest.fixture
def packed(tmp_path):
    url = str(tmp_path / "set")
    return write_shards(make(), url, dataset="tiny/train", classes=CLASSES, shard_bytes=6_000, row_group_rows=2,
                        options={"source": "test"})


def test_round_trip(packed):
    manifest = read_manifest(packed.url)
    assert manifest == packed and manifest.hash == packed.hash and len(manifest.files) > 1
    assert manifest.classes == CLASSES and manifest.num_rows == 11 and manifest.num_labeled == 9
    rows = list(iter_rows(manifest, columns=["image_id", "image", "mask", "height", "width", "group", "index", "class_pixels"]))
    totals = np.zeros(3, np.int64)
    for row, record in zip(rows, make(), strict=True):
        assert (row["image_id"], row["image"], row["mask"], row["group"], row["index"]) == (
            record.image_id, record.image, record.mask, record.group, record.index)
        assert (row["height"], row["width"]) == (20, 30 + record.index % 2)
        if record.mask is None:
            assert row["class_pixels"] is None
            continue
        ids = mask_array(record.index, (20, row["width"]))
        assert row["class_pixels"] == [int((ids == c).sum()) for c in range(3)]
        totals += row["class_pixels"]
    assert manifest.class_pixels == tuple(totals)


def test_row_groups_and_ranks(packed):
    file, group, rows = packed.row_group_table()
    assert rows.sum() == 11 and all(a.dtype == np.int64 for a in (file, group, rows))
    names = [n for f, g in zip(file, group, strict=True)
             for n in read_row_group(packed, int(f), int(g), ["image_id"])["image_id"].to_pylist()]
    assert names == [r.image_id for r in make()] == read_metadata(packed, ["image_id"])["image_id"].to_pylist()
    for world in (1, 2, 3, 20):
        parts = [[row["image_id"] for row in iter_rows(packed, rank, world, ["image_id"])] for rank in range(world)]
        assert [name for part in parts for name in part] == names
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_reads_no_row_group_but_those_of_its_rows(packed, monkeypatch):
    opened, read, plain = [], [], shards._parquet

    class Recorder:
        def __init__(self, number, file):
            self.number, self.file = number, file

        def read_row_group(self, group, columns):
            read.append((self.number, group))
            return self.file.read_row_group(group, columns=columns)

    def parquet(manifest, number, storage):
        opened.append(number)
        return Recorder(number, plain(manifest, number, storage))

    monkeypatch.setattr(shards, "_parquet", parquet)
    groups = len(packed.row_group_table()[0])
    for world in (1, 2, 3):
        read.clear()
        for rank in range(world):
            opened.clear()
            list(iter_rows(packed, rank, world))
            assert len(opened) == len(set(opened))
        assert len(read) <= groups + world - 1 and len(set(read)) == groups


def test_class_pixels_of_all_rows_are_one_file(packed, monkeypatch):
    want = class_pixel_array(read_metadata(packed).column("class_pixels"), 3)
    assert want.shape == (11, 3) and want.sum() == sum(packed.class_pixels)
    monkeypatch.setattr(shards, "_parquet", None)
    assert (read_class_pixels(read_manifest(packed.url), Storage()) == want).all()


def test_class_pixels_come_from_the_shards_where_the_file_is_damaged_lost_or_was_never_written(packed):
    want = read_class_pixels(packed, Storage())
    path = Path(packed.url, "class_pixels.arrow")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert (read_class_pixels(packed, Storage()) == want).all()
    path.unlink()
    assert (read_class_pixels(packed, Storage()) == want).all()
    manifest = Path(packed.url, "manifest.json")
    plain = json.loads(manifest.read_text())
    del plain["class_pixels_file"]
    manifest.write_text(json.dumps(plain))
    older = read_manifest(packed.url)
    assert older.pixel_file is None and (read_class_pixels(older, Storage()) == want).all()


def test_shards_are_about_as_large_as_asked(packed):
    for file in packed.files[:-1]:
        assert 6_000 <= file.bytes < 6_000 + 2 * 4_000 + 8_000  # at most a row group and a footer more
        assert os.path.getsize(f"{packed.url}/{file.name}") == file.bytes


def test_hash_follows_content_not_place(packed, tmp_path):
    again = write_shards(make(), str(tmp_path / "other"), dataset="tiny/train", classes=CLASSES, shard_bytes=6_000,
                         row_group_rows=2)
    assert again.hash == packed.hash
    fewer = write_shards(make(10), str(tmp_path / "other"), dataset="tiny/train", classes=CLASSES)
    assert fewer.hash != packed.hash
    renamed = ClassList("tiny", ("a", "b", "d"), CLASSES.palette)
    other = write_shards(make(), str(tmp_path / "other"), dataset="tiny/train", classes=renamed, shard_bytes=6_000,
                         row_group_rows=2)
    assert other.hash != packed.hash


def test_writing_again_leaves_no_old_shard(packed):
    fewer = write_shards(make(3), packed.url, dataset="tiny", classes=CLASSES)
    assert sorted(os.listdir(packed.url)) == ["class_pixels.arrow", "manifest.json", "shard-00000.parquet"]
    assert read_manifest(packed.url) == fewer


def test_no_manifest_while_or_when_writing_fails(packed):
    def broken():
        yield from make(6)
        assert not os.path.exists(f"{packed.url}/manifest.json")
        raise RuntimeError("reader died")

    with pytest.raises(RuntimeError):
        write_shards(broken(), packed.url, dataset="tiny", classes=CLASSES, row_group_rows=2, shard_bytes=1)
    with pytest.raises(InputError, match=r"manifest.json is missing; jobs/prepare_shards.py makes them"):
        read_manifest(packed.url)


def rewrite(manifest, change):
    path = f"{manifest.url}/manifest.json"
    with open(path) as file:
        plain = json.load(file)
    change(plain)
    with open(path, "w") as file:
        json.dump(plain, file)


@pytest.mark.parametrize(("change", "message"), [
    (lambda p: p.update(format_version=99), r"has format 99, this version reads 1; pack the shards anew"),
    (lambda p: p.pop("files"), r"is damaged \(KeyError\('files'\)\)"),
    (lambda p: p.update(files=[3]), "is damaged"),
    (lambda p: p["files"][0].update(sha256="0" * 64), "was changed"),
    (lambda p: p["classes"]["names"].reverse(), "was changed"),
    (lambda p: p.update(num_rows=10), "was changed"),
    (lambda p: p["files"][0]["row_groups"].append(1), "was changed"),
    (lambda p: p["class_pixels"].pop(), "was changed")])
def test_manifest_of_another_version_or_changed(packed, change, message):
    rewrite(packed, change)
    with pytest.raises(InputError, match=rf"manifest.json.*{message}"):
        read_manifest(packed.url)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"7"])
def test_manifest_that_is_none(packed, content):
    with open(f"{packed.url}/manifest.json", "wb") as file:
        file.write(content)
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        read_manifest(packed.url)


def flip_bit_of_an_image(manifest, shard=1):
    """Change one bit inside an image's bytes; Parquet's own structure stays whole. The row group it was in."""
    name = f"{manifest.url}/{manifest.files[shard].name}"
    first = read_row_group(manifest, shard, 0, ["image"])["image"].to_pylist()[0]
    with open(name, "rb") as file:
        data = bytearray(file.read())
    data[data.index(first) + len(first) // 2] ^= 1
    with open(name, "wb") as file:
        file.write(data)


def test_lost_truncated_and_changed_shards_are_all_named(packed):
    assert len(packed.files) >= 3
    check_files(packed, checksums=True)
    first, second, third = (f"{packed.url}/{f.name}" for f in packed.files[:3])
    flip_bit_of_an_image(packed, 1)
    os.remove(first)
    os.truncate(third, 100)
    with pytest.raises(InputError) as caught:
        check_files(packed, checksums=True)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        f"{first} is missing", f"{second} was changed: its content is not what was packed",
        f"{third} has 100 bytes, the manifest says {packed.files[2].bytes}"]
    with pytest.raises(InputError) as caught:
        check_files(packed)
    assert "00001" not in str(caught.value)  # not looked for without checksums


def test_reading_damage_names_the_shard(packed):
    flip_bit_of_an_image(packed, 1)
    with pytest.raises(InputError, match=r"shard-00001.parquet cannot be read .*CRC"):
        read_row_group(packed, 1, 0, ["image_id", "image"])
    os.truncate(f"{packed.url}/shard-00001.parquet", 100)
    with pytest.raises(InputError, match=r"shard-00001.parquet cannot be read"):
        list(iter_rows(packed))
    os.remove(f"{packed.url}/shard-00000.parquet")
    with pytest.raises(InputError, match=r"shard-00000.parquet cannot be read"):
        read_metadata(packed)


def damaged(data):
    return data[:len(data) * 2 // 3]


def grey_png_of_2_bits(height=20, width=30):
    """Ids 0 and 3, four pixels a byte, which readers scale to 0 and 255: the 3s would be ignored without a word."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = (b"\0" + b"\x33" * (-(-width // 4))) * height
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 2, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))




@pytest.mark.parametrize(("record", "message"), [
    (Record("bad", image(), encode(np.full((20, 30), 3, np.uint8))), r"holds id\(s\) \[3\].* 0 to 2 and 255 is ignored"),
    (Record("bad", image(), encode(np.zeros((30, 20), np.uint8))), r"the mask is 20 x 30, the image 30 x 20"),
    (Record("bad", image(), encode(np.zeros((20, 30, 3), np.uint8))), r"the mask is a RGB PNG of 8 bits a sample"),
    (Record("bad", image(), encode(np.zeros((20, 30), np.uint16))), r"the mask is a I;16 PNG"),
    (Record("bad", image(), encode(np.zeros((20, 30), np.uint8), "JPEG")), r"the mask is a L JPEG"),
    (Record("bad", image(), encode(Image.new("1", (30, 20)))), r"the mask is a 1 PNG"),
    (Record("bad", image(), grey_png_of_2_bits()), r"the mask is a L PNG of 2 bits a sample; save"),
    (Record("bad", b"no image"), r"the image does not decode"),
    (Record("bad", b""), r"the image does not decode"),
    (Record("bad", damaged(image())), r"the image does not decode"),
    (Record("bad", damaged(image(kind="JPEG"))), r"the image does not decode"),
    (Record("bad", image(), damaged(encode(mask_array()))), r"the mask does not decode"),
    (Record("bad", image(), image_b=image(size=(20, 20))), r"the two images differ in size"),
    (Record("im-01", image()), r"image_id 'im-01' comes twice")])
def test_bad_records_are_refused_by_name(tmp_path, record, message):
    with pytest.raises(InputError, match=message) as caught:
        write_shards([*make(3), record], str(tmp_path / "set"), dataset="tiny", classes=CLASSES)
    assert record.image_id in str(caught.value) and not (tmp_path / "set" / "manifest.json").exists()


def test_palette_masks_keep_their_ids(tmp_path):
    ids = mask_array() % 3
    coloured = Image.fromarray(ids)
    coloured.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    manifest = write_shards([Record("p", image(), encode(coloured))], str(tmp_path), dataset="t", classes=CLASSES)
    assert manifest.class_pixels == tuple(np.bincount(ids.reshape(-1), minlength=3).tolist())


def test_nothing_to_pack(tmp_path):
    with pytest.raises(InputError, match="there is no image to pack"):
        write_shards([], str(tmp_path), dataset="t", classes=CLASSES)


def test_shards_are_plain_parquet(packed):
    table = pq.read_table(f"{packed.url}/{packed.files[0].name}")
    assert table["image_id"].to_pylist()[0] == "im-00" and table.num_rows == packed.files[0].rows


def test_built_in_class_lists():
    sizes = {"cityscapes": 19, "camvid": 11, "demo": 11, "voc": 21, "coco": 81, "synthia16": 16}
    for name, size in sizes.items():
        classes = CLASS_LISTS[name]
        assert classes.num_classes == size == len(set(classes.names)) == len(classes.palette) == len(set(classes.palette))
        assert all(0 <= i < size for i in classes.thing_ids)
    things = {n: CLASS_LISTS["cityscapes"].names[i] for n, i in enumerate(CLASS_LISTS["cityscapes"].thing_ids)}
    assert "car" in things.values() and "road" not in things.values()
    assert CLASS_LISTS["voc"].palette[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0))

"""Unlabelled images: any local folder or bucket prefix of them."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from test_sources_ssl import picture, read_all, save

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.sources import images
from ecocseg.errors import InputError
from ecocseg.storage import Storage

POOL = ["a.jpg", "north/b.JPEG", "north/deep/c.png", "south.d/e.png"]


def fill(storage, root):
    data = {}
    for seed, name in enumerate(POOL):
        buffer = io.BytesIO()
        Image.fromarray(picture(seed)).save(buffer, "PNG" if name.endswith("png") else "JPEG")
        data[name] = buffer.getvalue()
        storage.write_bytes(f"{root}/{name}", data[name])
    for name in ("notes.txt", ".hidden.png", ".cache/x.png"):
        storage.write_bytes(f"{root}/{name}", b"")
    return data


def check_pool(made, data):
    records = read_all(made)
    assert list(records) == ["a", "north/b", "north/deep/c", "south.d/e"]
    assert [record.group for record in records.values()] == [None, "north", "north/deep", "south.d"]
    assert [record.image for record in records.values()] == list(data.values())
    assert all(record.mask is None for record in records.values()) and made.options["unlabeled"] is True


def test_images_of_a_local_folder(tmp_path):
    data = fill(Storage(), str(tmp_path / "pool"))
    made = images.source(tmp_path / "pool", "voc")
    check_pool(made, data)
    assert made.classes == CLASS_LISTS["voc"] and made.dataset == "pool"
    (tmp_path / "pool" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"pool/a.jpg is gone since it was listed"):
        made.read(made.entries[0])
    save(tmp_path / "pool" / "north" / "b.png", picture(0))
    assert "have one name but for their suffix" in images.source(tmp_path / "pool", "voc").problems[0]
    (tmp_path / "empty").mkdir()
    for arguments, message in [((tmp_path / "none", "voc"), "no local folder .*none of images"),
                               ((tmp_path / "empty", "voc"), r"no image \(.jpg, .jpeg, .png\) below .*empty"),
                               ((tmp_path / "pool", "vok"), "no file 'vok', nor a built-in list")]:
        with pytest.raises(InputError, match=message):
            images.source(*arguments)


def test_images_of_a_bucket_prefix(server):
    s3 = Storage(endpoint=f"http://{server}", retries=1)
    data = fill(s3, "s3://bucket/test/pool/day")
    s3.write_bytes("s3://bucket/test/pool/night/z.png", b"")
    made = images.source("s3://bucket/test/pool/day/", "cityscapes", storage=s3)
    check_pool(made, data)
    assert made.dataset == "day" and made.entries[0].url == "s3://bucket/test/pool/day/a.jpg"
    with pytest.raises(InputError, match="no image .* below s3://bucket/none"):
        images.source("s3://bucket/none", "cityscapes", storage=s3)
    s3.delete("s3://bucket/test/pool/day/a.jpg")
    with pytest.raises(InputError, match="s3://bucket/test/pool/day/a.jpg is gone"):
        made.read(made.entries[0])

"""Unlabelled images: all below a local folder, or below a bucket's prefix, s3://bucket/some/where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ecocseg.data.classes import ClassList
from ecocseg.data.shards import Record
from ecocseg.data.sources.folder import read_classes
from ecocseg.data.sources.pairs import IMAGE_SUFFIXES, Pair, Source
from ecocseg.errors import InputError
from ecocseg.storage import Storage, is_remote, join


@dataclass(frozen=True)
class StoredImage(Pair):
    """An image somewhere; `image` is its URL as a path, to be shown alone."""

    url: str = ""


def read_image(pair: Pair, storage: Storage) -> Record:
    """The record of an image, its bytes as found.

    Raises:
        InputError: when it cannot be read, naming it.
    """
    url = pair.url if isinstance(pair, StoredImage) else str(pair.image)
    try:
        return Record(pair.image_id, storage.read_bytes(url), group=pair.group, index=pair.index)
    except FileNotFoundError:
        raise InputError(f"{url} is gone since it was listed; restore it, or list anew") from None


def _found(root: str, storage: Storage) -> tuple[list[StoredImage], list[str]]:
    """Images below a root by id, hidden ones left out, and what is wrong with their names."""
    found: dict[str, StoredImage] = {}
    problems = []
    for name in storage.list_files(root, recursive=True):
        path = PurePosixPath(name)
        if path.suffix.lower() not in IMAGE_SUFFIXES or name.startswith(".") or "/." in name:
            continue
        image_id, url = str(path.with_suffix("")), join(root, name)
        if image_id in found:
            problems.append(f"{url} and {found[image_id].url} have one name but for their suffix; rename one of them")
            continue
        parent = str(path.parent)
        found[image_id] = StoredImage(image_id, Path(url), group=None if parent == "." else parent, url=url)
    return [found[image_id] for image_id in sorted(found)], problems


def source(root: str | Path, classes: str | Path | ClassList, unlabeled: bool = True,
           storage: Storage | None = None) -> Source:
    """All images (.jpg, .jpeg, .png) below a folder or prefix, listed in one go and read one by one.

    `classes`, a built-in list or a file, are those that the images will be trained for. Image ids are paths below the root
    without suffix, groups the folders of them. Images have no masks, whatever `unlabeled` says: `folder` reads those that do.

    Raises:
        InputError: when the folder, bucket or class list is not there, or there is no image.
    """
    storage = storage or Storage()
    if not is_remote(str(root)) and not Path(root).expanduser().is_dir():
        raise InputError(f"there is no local folder {root} of images; give one, or s3://bucket/prefix")
    listed = classes if isinstance(classes, ClassList) else read_classes(classes).classes
    entries, problems = _found(str(root), storage)
    if not entries:
        raise InputError(f"there is no image ({', '.join(IMAGE_SUFFIXES)}) below {root}")
    options: dict[str, Any] = {"source": "images", "root": PurePosixPath(str(root)).name, "unlabeled": True}
    return Source(PurePosixPath(str(root)).name or "images", listed, entries, partial(read_image, storage=storage), problems,
                  "images of one folder need names of their own", options)

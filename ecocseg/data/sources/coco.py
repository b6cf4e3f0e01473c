"""COCO 2017 as 81 classes, the 80 things in the order of their category ids after background (https://cocodataset.org):

    {train2017,val2017,unlabeled2017}/000000000009.jpg
    annotations/instances_{train,val}2017.json
    masks/000000000009.png or masks/{train2017,val2017}/000000000009.png     instead: 8-bit PNGs of ids 0 to 80 and 255

From annotations, instances are painted in the file's order, so that of two that overlap the later one is seen: so do the
published converters of instances to class masks (those of few-shot and of DeepLab's data sets). Which rule made the masks
that UniMatch gives away is not published; to match it, use them as `masks`. Crowd regions are outlines of groups, which hold
other things as well: they are 255, but where an instance is painted. All else is background. Images without any instance
have masks of background alone.
"""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecocseg.data.classes import CLASS_LISTS, IGNORE
from ecocseg.data.shards import Record
from ecocseg.data.sources.lists import list_options, listed, read_names
from ecocseg.data.sources.pairs import Pair, Source, id_table, match, read_pair
from ecocseg.data.sources.rasters import optional_module, png_bytes, read_file
from ecocseg.data.sources.tree import check_choice, files_ending, inside
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["coco"]
SPLITS = ("train", "val", "unlabeled")
POLYGON_NUMBERS = 6
"""Of three corners; what has fewer has no inside, and four numbers would be read as a box."""


@dataclass(frozen=True)
class Region:
    """An instance or crowd: polygons [corners x 2] each, or run lengths as pycocotools writes them."""

    train_id: int
    crowd: bool
    polygons: tuple[NDArray[np.float64], ...] = ()
    runs: Any = None


@dataclass(frozen=True)
class Annotations:
    """Of one file: (height, width) by image file name, and its regions in the file's order."""

    sizes: dict[str, tuple[int, int]]
    regions: dict[str, list[Region]]


def _compact(plain: dict[str, Any]) -> dict[str, Any]:
    """Called for each object while JSON is parsed: a list of a polygon's numbers takes four times an array's memory."""
    if isinstance(plain.get("segmentation"), list):
        plain["segmentation"] = [np.array(polygon, np.float64) for polygon in plain["segmentation"]]
    elif isinstance(plain.get("counts"), list):
        plain["counts"] = np.array(plain["counts"], np.uint32)
    return plain


_loading = threading.Lock()


@functools.lru_cache(maxsize=2)
def _load(path: str) -> Annotations:
    try:
        with open(path, encoding="utf-8") as file:
            plain = json.load(file, object_hook=_compact)
        names = {category["id"]: category["name"] for category in plain["categories"]}
        unknown = sorted(set(names.values()) - set(CLASSES.names))
        if unknown:
            raise InputError(f"{path} has categories that COCO has not: {', '.join(unknown[:5])}; take the published file, or "
                             "give masks and a class list as a folder")
        train_ids = {number: CLASSES.names.index(name) for number, name in names.items()}
        images = {image["id"]: image for image in plain["images"]}
        regions: dict[str, list[Region]] = {}
        for one in plain["annotations"]:
            segmentation, train_id, crowd = one["segmentation"], train_ids[one["category_id"]], bool(one["iscrowd"])
            region = Region(train_id, crowd, tuple(segmentation)) if isinstance(segmentation, list) else \
                Region(train_id, crowd, runs=segmentation)
            regions.setdefault(images[one["image_id"]]["file_name"], []).append(region)
        return Annotations({i["file_name"]: (i["height"], i["width"]) for i in images.values()}, regions)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no instances file of COCO ({type(error).__name__}: {error}); restore it") from None


def annotations_of(path: Path) -> Annotations:
    """What an instances file says, parsed once a process: that of train2017 is 450 MB of text.

    Raises:
        InputError: when it is damaged, or has other categories.
    """
    with _loading:  # or all threads of a pool begin to parse it
        return _load(str(path))


def _inside(region: Region, size: tuple[int, int], coding: Any) -> NDArray[np.bool_]:
    """Which pixels a region covers, as `coding`, pycocotools.mask, has it. Shape: bool [H, W]."""
    polygons = [polygon.tolist() for polygon in region.polygons if len(polygon) >= POLYGON_NUMBERS]
    if region.runs is not None:
        runs = region.runs
        # run lengths are numbers as published, or compressed text
        coded = runs if isinstance(runs["counts"], (str, bytes)) else \
            coding.frPyObjects({"size": runs["size"], "counts": runs["counts"].tolist()}, *size)
    elif polygons:
        coded = coding.merge(coding.frPyObjects(polygons, *size))
    else:
        return np.zeros(size, np.bool_)
    return coding.decode(coded).astype(np.bool_)


def paint(regions: list[Region], size: tuple[int, int], coding: Any) -> NDArray[np.uint8]:
    """Train ids of an image: background, over it crowds as 255, over them instances in order. Shape: uint8 [H, W]."""
    mask_HW = np.zeros(size, np.uint8)
    for region in sorted(regions, key=lambda region: not region.crowd):
        mask_HW[_inside(region, size, coding)] = IGNORE if region.crowd else region.train_id
    return mask_HW


def read_instances(pair: Pair, annotations: Path) -> Record:
    """The record of an image, its mask painted from an instances file.

    Raises:
        InputError: when the image or the file cannot be read, or the file does not know the image.
    """
    known = annotations_of(annotations)
    size = known.sizes.get(pair.image.name)
    if size is None:
        raise InputError(f"{pair.image} is not in {annotations}; remove it, or take the file of its split")
    coding = optional_module("pycocotools.mask", "COCO")
    try:
        mask_HW = paint(known.regions.get(pair.image.name, []), size, coding)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{annotations}: a segmentation of {pair.image.name} does not decode ({error}); restore it") from None
    return Record(pair.image_id, read_file(pair.image), png_bytes(mask_HW), group=pair.group, index=pair.index)


def source(root: str | Path, split: str = "train", masks: str | Path | None = None, list_file: str | Path | None = None,
           unlabeled: bool = False) -> Source:
    """The images of a split, of them those that `list_file` names when it is given, and their masks unless `unlabeled`.

    `masks`: a folder of ready-made masks, below the root or anywhere. Image ids are names, of 12 digits. Neither images nor
    annotations are opened here.

    Raises:
        InputError: when the root, the split, its annotations or a list is not there, naming what is.
    """
    check_choice("split", [split], SPLITS, "the splits of COCO 2017")
    if split == "unlabeled" and not unlabeled:
        raise InputError("split: unlabeled2017 has no annotations; pack it unlabelled")
    if not unlabeled and masks is None:
        optional_module("pycocotools.mask", "COCO")
    base, problems = Path(root), list[str]()
    folder = inside(base, f"{split}2017", what=f"the {split} images; give COCO's root")
    names = None if list_file is None else read_names(list_file)
    images = listed(files_ending(folder, ".jpg"), names, folder, problems)
    if not images:
        raise InputError(f"there is no image *.jpg in {folder}" + (f" that {list_file} names" if list_file else ""))
    options: dict[str, Any] = {"source": "coco", "split": split, "unlabeled": unlabeled, **list_options(list_file, names)}
    read, found = functools.partial(read_pair, table=id_table({i: i for i in range(CLASSES.num_classes)})), None
    if not unlabeled and masks is None:
        instances = inside(base, "annotations", what="the instances; add it, or give masks") / f"instances_{split}2017.json"
        if not instances.is_file():
            raise InputError(f"there is no file {instances}; add it, give masks, or pack unlabelled images")
        read = functools.partial(read_instances, annotations=instances)
        options |= {"labels": "instances", "overlap": "later in the file", "crowd": "ignored"}
    elif not unlabeled:
        ready = inside(base / str(masks), what="masks; correct it, or leave it out to paint the annotations")
        ready = ready / f"{split}2017" if (ready / f"{split}2017").is_dir() else ready
        found = {name: path for name, path in files_ending(ready, ".png").items() if name in images}
        options |= {"labels": "masks"}
    return Source("coco", CLASSES, match(images, found, problems), read, problems,
                  "masks hold ids 0 to 80 and 255, and go with images of the same names; list_file chooses fewer", options)

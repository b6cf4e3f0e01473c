"""Automated Cardiac Diagnosis Challenge, in the HDF5 form that semi-supervised work is measured on (SSL4MIS gives it away):

    data/slices/patient001_frame01_slice_1.h5     image: float [H, W] of 0 to 1; label: uint8 [H, W]
    data/patient001_frame01.h5                    image: float [D, H, W] of 0 to 1; label: uint8 [D, H, W]
    {train_slices,val,test}.list                  names of slices, and of volumes

Ids are 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle. Training is on slices, tests are on volumes, each of
them one case. Either becomes slices of 16-bit grey, numbered from 1, whose group is the volume. A value v becomes
floor(65280 v): the high byte of it is floor(255 v), the 8 bits that the published results are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.shards import Record
from ecocseg.data.sources.lists import list_options, read_names
from ecocseg.data.sources.pairs import Pair, Source, id_table
from ecocseg.data.sources.rasters import optional_module, png_bytes, train_ids
from ecocseg.data.sources.tree import check_choice, files_ending, inside
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["acdc_cardiac"]
LISTS = {"train": "train_slices.list", "val": "val.list", "test": "test.list"}
FULL_SCALE = 255 * 256
SLICE_NAME = re.compile(r"(?P<volume>.+)_slice_(?P<number>\d+)")


@dataclass(frozen=True)
class SlicePair(Pair):
    """A slice: of a file of its own, or of a volume."""

    place: int | None = None
    """Its place in the volume, from 0; None = the file is the slice."""


def _failed(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} has no image and label to read ({error}); restore or remove it")


def _read(path: Path, place: int | None, key: str) -> NDArray[Any]:
    h5py = optional_module("h5py", "ACDC")
    try:
        with h5py.File(path, "r") as file:
            array = np.asarray(file[key][()] if place is None else file[key][place])
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise _failed(path, error) from None
    if array.ndim != 2:
        raise InputError(f"{path}: a slice of {key} has {array.ndim} dimensions instead of height and width; volumes lie in "
                         "data/, slices in data/slices/")
    return array


def read_slice(pair: Pair, value_range: tuple[float, float]) -> Record:
    """The record of a slice. The values of `value_range` fill 16-bit grey.

    Raises:
        InputError: when the file cannot be read, has values outside the range, or a label other than 0 to 3.
    """
    place = pair.place if isinstance(pair, SlicePair) else None
    image_HW, (low, high) = _read(pair.image, place, "image").astype(np.float64), value_range
    if not (image_HW.size and np.isfinite(image_HW).all() and low <= image_HW.min() and image_HW.max() <= high):
        found = f"{image_HW.min():g} to {image_HW.max():g}" if image_HW.size else "none"
        raise InputError(f"{pair.image}: values are {found}, not all {low:g} to {high:g}; give the data set's value_range")
    mask = None
    if pair.mask is not None:
        label_HW = _read(pair.mask, place, "label")
        raw_HW = label_HW.astype(np.uint8)
        if (raw_HW != label_HW).any():
            raise InputError(f"{pair.mask}: labels are no whole numbers of 0 to 255; restore the file")
        mask = png_bytes(train_ids(raw_HW, id_table({i: i for i in range(CLASSES.num_classes)}), str(pair.mask)))
    grey_HW = np.floor((image_HW - low) / (high - low) * FULL_SCALE).astype(np.uint16)
    return Record(pair.image_id, png_bytes(grey_HW), mask, group=pair.group, index=pair.index)


def _slices_of(path: Path, name: str, unlabeled: bool) -> list[SlicePair]:
    """Slices of a volume, of which only the header is read."""
    h5py = optional_module("h5py", "ACDC")
    try:
        with h5py.File(path, "r") as file:
            shape = file["image"].shape
    except (OSError, KeyError, AttributeError) as error:
        raise _failed(path, error) from None
    if len(shape) != 3:
        raise InputError(f"{path} is no volume: its image has {len(shape)} dimensions instead of depth, height and width")
    return [SlicePair(f"{name}_slice_{place + 1}", path, None if unlabeled else path, name, place + 1, place=place)
            for place in range(shape[0])]


def _patient(name: str) -> str:
    return name.partition("_")[0]


def _chosen(names: Sequence[str], cases: int | None, rest: bool) -> list[str]:
    """Names of the first patients in the list's order, or of the others."""
    if cases is None:
        if rest:
            raise InputError("rest: without cases nothing is left over; give cases, the number of patients to leave out")
        return list(names)
    patients = list(dict.fromkeys(_patient(name) for name in names))
    if not 1 <= cases <= len(patients) - rest:
        raise InputError(f"cases: {cases}; the list names {len(patients)} patients, published splits take 1, 3 or 7")
    first = set(patients[:cases])
    return [name for name in names if (_patient(name) in first) != rest]


def source(root: str | Path, split: str = "train", cases: int | None = None, rest: bool = False,
           list_file: str | Path | None = None, value_range: tuple[float, float] = (0.0, 1.0),
           unlabeled: bool = False) -> Source:
    """Slices that the list of a split or `list_file` names, volumes in it slice by slice, with labels unless `unlabeled`.

    `cases` takes the first patients in the list's order, as the published splits of 1, 3 and 7 cases do; with `rest`, all
    the others, which are their unlabelled sets. Image ids are names like patient099_frame01_slice_1, groups volumes like
    patient099_frame01, indices the slices' numbers.

    Raises:
        InputError: when the root, the split or its list is not there, naming what is, or there are not so many cases.
    """
    optional_module("h5py", "ACDC")
    if not value_range[0] < value_range[1]:
        raise InputError(f"value_range: {value_range[0]:g} to {value_range[1]:g} is no range; give the lower value first")
    base = Path(root)
    folder = inside(base, "data", what="the volumes and slices; give the folder that has data/")
    if list_file is None:
        check_choice("split", [split], list(LISTS), "the splits of ACDC")
        if not (base / LISTS[split]).is_file():
            raise InputError(f"there is no list {base / LISTS[split]}; add it, or give list_file; lists there: "
                             f"{', '.join(sorted(path.name for path in base.glob('*.list'))) or 'none'}")
    names = read_names(base / LISTS[split] if list_file is None else list_file)
    entries, problems = list[SlicePair](), list[str]()
    slices = files_ending(folder / "slices", ".h5")
    for name in _chosen(names, cases, rest):
        one, volume = SLICE_NAME.fullmatch(name), folder / f"{name}.h5"
        if one and name in slices:
            path = slices[name]
            entries.append(SlicePair(name, path, None if unlabeled else path, one["volume"], int(one["number"])))
        elif not one and volume.is_file():
            entries += _slices_of(volume, name, unlabeled)
        else:
            problems.append(f"{folder} has no file of the listed name {name}")
    if not entries:
        raise InputError(f"{folder} has none of the {len(names)} listed files; {names[0]} is one")
    options = {"source": "acdc_cardiac", "split": None if list_file else split, "cases": cases, "rest": rest,
               "value_range": list(value_range), "scaling": f"value = low + (high - low) * pixel / {FULL_SCALE}, floored",
               "unlabeled": unlabeled, **list_options(list_file, names)}
    return Source("acdc_cardiac", CLASSES, sorted(entries, key=lambda pair: pair.image_id),
                  partial(read_slice, value_range=value_range), problems,
                  "names in a list are those of files in data/slices/ or data/, without .h5", options)

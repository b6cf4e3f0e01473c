"""Cityscapes, as its archives unpack into one folder (https://www.cityscapes-dataset.com):

    leftImg8bit/{train,val,test,train_extra}/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
    gtFine/{train,val}/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png
    gtCoarse/{train,val,train_extra}/CITY/CITY_SEQUENCE_FRAME_gtCoarse_labelIds.png

Masks hold label ids 0 to 33; 19 of them are trained, the others are ignored. The licence plate, -1, is in no 8-bit mask.
The one empty image, troisdorf_000000_000073 of train_extra, is left out, as the data set's authors ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ecocseg.data.classes import CLASS_LISTS, IGNORE
from ecocseg.data.sources.pairs import Pair, Source, id_table, read_pair
from ecocseg.data.sources.tree import NO_MASKS, check_choice, inside, last_number, pairs_ending, subfolders
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["cityscapes"]
TRAINED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids of the 19 classes, in the order of their train ids; cityscapesScripts, helpers/labels.py."""
LABEL_IDS = {**dict.fromkeys(range(34), IGNORE), **{label: train for train, label in enumerate(TRAINED)}}
"""Train id of each label id."""
IMAGE_SUFFIX = "_leftImg8bit.png"
SPLITS = ("train", "val", "test", "train_extra")
ANNOTATIONS = {"fine": ("gtFine", ("train", "val")), "coarse": ("gtCoarse", ("train", "val", "train_extra"))}
"""Annotation: its folder, and the splits it names classes in. gtFine/test has files too, of ignored pixels alone."""
EMPTY = "train_extra/troisdorf/troisdorf_000000_000073"
"""An image of one colour."""


def _pairs(root: Path, split: str, cities: Sequence[str], annotation: str | None, problems: list[str]) -> list[Pair]:
    """`annotation` is the folder of the masks; None: images alone."""
    folder = inside(root, "leftImg8bit", split, what=f"the {split} images; give Cityscapes' root")
    pairs = []
    for city in subfolders(folder):
        if cities and city not in cities:
            continue
        masks = annotation and inside(root, annotation, split, city, what=NO_MASKS)
        pairs += [replace(pair, image_id=f"{split}/{city}/{pair.image_id}", group=city, index=last_number(pair.image_id))
                  for pair in pairs_ending(folder / city, IMAGE_SUFFIX, masks or None, (f"_{annotation}_labelIds.png",),
                                           problems)]
    return pairs


def source(root: str | Path, splits: Sequence[str] = ("train",), cities: Sequence[str] = (), annotation: str = "fine",
           unlabeled: bool = False) -> Source:
    """Images of some splits; of some cities when they are given; with `fine` or `coarse` masks unless `unlabeled`.

    Image ids are split/city/name, groups are cities, an index is a frame's number in its sequence.

    Raises:
        InputError: for a folder, split, city or annotation that is not there, naming those that are, and for masks of a
            split that has none.
    """
    check_choice("splits", splits, SPLITS, "the splits of Cityscapes")
    check_choice("annotation", [annotation], list(ANNOTATIONS), "its annotations")
    folder, masked = ANNOTATIONS[annotation]
    if not unlabeled:
        without = [split for split in splits if split not in masked]
        if without:
            others = [name for name, (_, has) in ANNOTATIONS.items() if set(without) <= set(has)]
            raise InputError(f"splits: {', '.join(without)} has no {annotation} masks; "
                             + "".join(f"take the {name} annotation, or " for name in others) + "pack it unlabelled")
    problems: list[str] = []
    pairs = [pair for split in dict.fromkeys(splits)
             for pair in _pairs(Path(root), split, cities, None if unlabeled else folder, problems)]
    missing = [city for city in cities if city not in {pair.group for pair in pairs}]
    if missing or not pairs:
        there = sorted({city for split in splits for city in subfolders(Path(root, "leftImg8bit", split))})
        raise InputError(f"cities: there is no image of {', '.join(missing) or 'any city'} in {', '.join(splits)}; "
                         f"cities there are {', '.join(there) or 'none'}")
    pairs = sorted((pair for pair in pairs if pair.image_id != EMPTY), key=lambda pair: pair.image_id)
    options = {"source": "cityscapes", "splits": list(dict.fromkeys(splits)), "cities": list(cities),
               "annotation": None if unlabeled else annotation, "unlabeled": unlabeled}
    return Source("cityscapes", CLASSES, pairs, partial(read_pair, table=id_table(LABEL_IDS)), problems,
                  "an image x_leftImg8bit.png goes with the mask x_gtFine_labelIds.png or x_gtCoarse_labelIds.png, which "
                  "holds label ids 0 to 33", options)

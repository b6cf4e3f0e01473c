"""ACDC, the Adverse Conditions Dataset with Correspondences (https://acdc.vision.ee.ethz.ch); not the cardiac ACDC.

    rgb_anon/{fog,night,rain,snow}/{train,val,test}/SEQUENCE/SEQUENCE_frame_NNNNNN_rgb_anon.png
    rgb_anon/CONDITION/{train_ref,val_ref,test_ref}/SEQUENCE/SEQUENCE_frame_NNNNNN_rgb_ref_anon.png   (same place, clear day)
    gt/CONDITION/{train,val}/SEQUENCE/SEQUENCE_frame_NNNNNN_gt_labelTrainIds.png, and the same as _gt_labelIds.png
    gt/CONDITION/{train_ref,val_ref}/SEQUENCE/SEQUENCE_frame_NNNNNN_gt_ref_labelTrainIds.png, _gt_ref_labelIds.png

Ids are those of Cityscapes. The masks of invalid regions (_gt_invIds.png) are not used: they are not for the mean IoU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.shards import Record
from ecocseg.data.sources.cityscapes import LABEL_IDS
from ecocseg.data.sources.pairs import Pair, Source, id_table, read_pair
from ecocseg.data.sources.tree import NO_MASKS, check_choice, inside, last_number, pairs_ending
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["cityscapes"]
CONDITIONS = ("fog", "night", "rain", "snow")
SPLITS = ("train", "val", "test", "train_ref", "val_ref", "test_ref")
MASKED = ("train", "val", "train_ref", "val_ref")
"""Splits with public masks; those of the others are kept by the benchmark."""
TRAIN_IDS, IDS = "labelTrainIds.png", "labelIds.png"


def read(pair: Pair, ids: NDArray[np.int16], train_ids: NDArray[np.int16]) -> Record:
    """The record of a pair, whose mask holds train ids or label ids, as its name says; raises as `read_pair` does."""
    return read_pair(pair, train_ids if pair.mask is not None and pair.mask.name.endswith(TRAIN_IDS) else ids)


def reader() -> partial[Record]:
    """`read`, with the ids of Cityscapes."""
    return partial(read, ids=id_table(LABEL_IDS), train_ids=id_table({i: i for i in range(CLASSES.num_classes)}))


def _pairs(root: Path, split: str, condition: str, unlabeled: bool, problems: list[str]) -> list[Pair]:
    images = inside(root, "rgb_anon", condition, split, what=f"the {split} images; give ACDC's root")
    ref = "_ref" if split.endswith("_ref") else ""
    image_suffix, mask_suffixes = f"_rgb{ref}_anon.png", (f"_gt{ref}_{TRAIN_IDS}", f"_gt{ref}_{IDS}")
    masks = None if unlabeled else inside(root, "gt", condition, split, what=NO_MASKS)
    # of the reference images 1503 have masks (arXiv 2104.13395v4), of the others all
    pairs = pairs_ending(images, image_suffix, masks, mask_suffixes, problems, all_masked=not ref)
    return [replace(pair, image_id=f"{split}/{condition}/{pair.image_id}", index=last_number(pair.image_id),
                    group=f"{condition}/{pair.image_id.rpartition('/')[0]}") for pair in pairs]


def source(root: str | Path, splits: Sequence[str] = ("train",), conditions: Sequence[str] = CONDITIONS,
           unlabeled: bool = False) -> Source:
    """Images of some splits and conditions, with masks unless `unlabeled`; of the reference images, those that have one.

    Image ids are split/condition/sequence/name, groups are condition/sequence, an index is a frame's number.

    Raises:
        InputError: for a folder, split or condition that is not there, and for masks of a split that has none.
    """
    check_choice("splits", splits, SPLITS, "the splits of ACDC")
    check_choice("conditions", conditions, CONDITIONS, "its conditions")
    without = [split for split in splits if split not in MASKED]
    if without and not unlabeled:
        raise InputError(f"splits: the masks of {', '.join(without)} are not public; pack it unlabelled")
    splits, conditions = list(dict.fromkeys(splits)), list(dict.fromkeys(conditions))
    problems: list[str] = []
    pairs = [pair for split in splits for condition in conditions
             for pair in _pairs(Path(root), split, condition, unlabeled, problems)]
    return Source("acdc_driving", CLASSES, sorted(pairs, key=lambda pair: pair.image_id), reader(), problems,
                  f"an image x_rgb_anon.png goes with the mask x_gt_{TRAIN_IDS} or x_gt_{IDS}",
                  {"source": "acdc_driving", "splits": splits, "conditions": conditions, "unlabeled": unlabeled})

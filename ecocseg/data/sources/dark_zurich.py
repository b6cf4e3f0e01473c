"""Dark Zurich (https://www.trace.ethz.ch/publications/2019/GCMA_UIoU), its anonymised archives unpacked into one folder:

    rgb_anon/train/{day,night,twilight}/SEQUENCE/SEQUENCE_frame_NNNNNN_rgb_anon.png
    rgb_anon/{val,test}/night/SEQUENCE/SEQUENCE_frame_NNNNNN_rgb_anon.png
    rgb_anon/{val_ref,test_ref}/day/SEQUENCE_ref/SEQUENCE_frame_NNNNNN_ref_rgb_anon.png
    gt/val/night/SEQUENCE/SEQUENCE_frame_NNNNNN_gt_labelTrainIds.png, and the same as _gt_labelIds.png

Ids are those of Cityscapes; val alone has public masks. Those of invalid regions (_gt_invIds.png) are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ecocseg.data.sources.acdc_driving import CLASSES, IDS, TRAIN_IDS, reader
from ecocseg.data.sources.pairs import Pair, Source
from ecocseg.data.sources.tree import NO_MASKS, check_choice, inside, last_number, pairs_ending
from ecocseg.errors import InputError

TIMES = ("day", "night", "twilight")
SPLITS = ("train", "val", "test", "val_ref", "test_ref")
MASKED = ("val",)


def _pairs(root: Path, split: str, time: str, unlabeled: bool, problems: list[str]) -> list[Pair]:
    images = inside(root, "rgb_anon", split, time, what=f"the {split} images; give Dark Zurich's root")
    masks = None if unlabeled else inside(root, "gt", split, time, what=NO_MASKS)
    image_suffix = "_ref_rgb_anon.png" if split.endswith("_ref") else "_rgb_anon.png"
    return [replace(pair, image_id=f"{split}/{time}/{pair.image_id}", index=last_number(pair.image_id),
                    group=f"{time}/{pair.image_id.rpartition('/')[0]}")
            for pair in pairs_ending(images, image_suffix, masks, (f"_gt_{TRAIN_IDS}", f"_gt_{IDS}"), problems)]


def source(root: str | Path, splits: Sequence[str] = ("train",), times: Sequence[str] = ("night",),
           unlabeled: bool = False) -> Source:
    """Images of some splits and times of day, with masks unless `unlabeled`.

    Image ids are split/time/sequence/name, groups are time/sequence, an index is a frame's number.

    Raises:
        InputError: for a folder, split or time that is not there, and for masks of a split that has none.
    """
    check_choice("splits", splits, SPLITS, "the splits of Dark Zurich")
    check_choice("times", times, TIMES, "its times of day")
    without = [split for split in splits if split not in MASKED]
    if without and not unlabeled:
        raise InputError(f"splits: {', '.join(without)} has no public masks; pack it unlabelled")
    splits, times = list(dict.fromkeys(splits)), list(dict.fromkeys(times))
    problems: list[str] = []
    pairs = [pair for split in splits for time in times for pair in _pairs(Path(root), split, time, unlabeled, problems)]
    return Source("dark_zurich", CLASSES, sorted(pairs, key=lambda pair: pair.image_id), reader(), problems,
                  f"an image x_rgb_anon.png goes with the mask x_gt_{TRAIN_IDS} or x_gt_{IDS}",
                  {"source": "dark_zurich", "splits": splits, "times": times, "unlabeled": unlabeled})

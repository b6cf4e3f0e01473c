"""3-D Dice: slices of a volume (a patient's scan) are counted together, then volumes are averaged.

Shapes: V volumes, N classes, H W pixels of a slice. Counts are int64, so a volume's slices may lie on any worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecocseg.data.shards import read_metadata
from ecocseg.data.transforms import IGNORE
from ecocseg.errors import InputError

if TYPE_CHECKING:
    from ecocseg.data.shards import Manifest
    from ecocseg.storage import Storage


def volume_names(manifest: Manifest, storage: Storage | None = None) -> list[str]:
    """The volumes of a set, sorted: the groups of its rows. Raises InputError if a row belongs to none."""
    groups = read_metadata(manifest, ("group",), storage)["group"].unique().to_pylist()
    if None in groups:
        raise InputError(f"eval.metric: dice is counted by volume, but {manifest.url} has images without a group; pack it from "
                         "a source of volumes (acdc_cardiac), or set eval.metric=iou")
    return sorted(groups)


def overlap(pred_HW: Tensor, labels_HW: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in both, in the prediction, and in the truth; those labelled 255 are left out. Shape: [3, N]."""
    known_HW = labels_HW != IGNORE
    pred_P, labels_P = pred_HW[known_HW].long(), labels_HW[known_HW].long()
    return torch.stack([torch.bincount(ids, minlength=num_classes) for ids in (pred_P[pred_P == labels_P], pred_P, labels_P)])


def dice(counts_V3N: Tensor) -> Tensor:
    """Mean over volumes of 2 |A and B| / (|A| + |B|); a volume that neither has nor predicts a class is left out of that
    class's mean (NaN where all are). Shape: float64 [N]."""
    both_VN, pred_VN, true_VN = counts_V3N.double().unbind(1)
    return (2 * both_VN / (pred_VN + true_VN)).nanmean(0)

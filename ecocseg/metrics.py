"""From predictions to numbers: confusion, IoU, calibration, and the table that shows them.

Shape legend: B batch, N classes, K bits (outputs of the coding), H W pixels.

Every statistic is an int64 count, so a sum over workers or images is exact in any order: one worker or eight, during
training or from `jobs/evaluate.py`, the same checkpoint on the same images gives the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecocseg.data.classes import IGNORE
from ecocseg.errors import InputError
from ecocseg.volumes import dice

NUM_BINS = 15  # equal-width bins over [0, 1], bin i = (i / 15, (i + 1) / 15]; Guo et al. 2017
CONFIDENCE_UNIT = NUM_BINS * 1024  # confidences are counted in steps of 1 / this; rounding moves none by over 3.3e-5
_CALIBRATION_CHUNK = 1 << 22  # values binned at a time, which bounds the memory of the int64 bin indices


def confusion(pred_BHW: Tensor, labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Pixel counts int64 [N, N]: row = true class, column = predicted class; pixels labelled 255 are left out.

    Raises InputError for a label that is neither a class id nor 255.
    """
    check_ids(labels_BHW, num_classes)
    labels = labels_BHW.reshape(-1).long()
    known = labels != IGNORE
    pairs = labels[known] * num_classes + pred_BHW.reshape(-1)[known].long()
    return torch.bincount(pairs, minlength=num_classes * num_classes).view(num_classes, num_classes)


def check_ids(labels_BHW: Tensor, num_classes: int) -> None:
    """Raises InputError for a label that is neither a class id nor 255."""
    worst = int(torch.where(labels_BHW == IGNORE, 0, labels_BHW).max()) if labels_BHW.numel() else 0
    if worst >= num_classes:
        known_ids = f"{num_classes} classes (0 to {num_classes - 1}, 255 ignored)"
        raise InputError(f"a mask holds id {worst}, but there are {known_ids}; prepare the data with this class list")


def calibration_counts(probabilities_BKHW: Tensor, labels_BHW: Tensor, coding: Any) -> Tensor:
    """int64 [15, 3]: per confidence bin how many values, how many of them right, and their confidences summed.

    ECOC: one value per bit, confidence max(p_k, 1 - p_k), right when z_k >= 0 agrees with the true class's codeword.
    One-hot: one value per pixel, confidence the largest probability, right when its class is the true one. Pixels
    labelled 255 are left out. Confidences are summed in units of 1 / CONFIDENCE_UNIT.
    """
    known_BHW = labels_BHW != IGNORE
    target = coding.encode(labels_BHW)
    if target.bits is None:
        confidence_BHW, class_BHW = probabilities_BKHW.max(dim=1)
        return _bin(confidence_BHW, class_BHW == labels_BHW, known_BHW)
    num_bits = probabilities_BKHW.shape[1]
    bits_BKHW = target.dense_bits(num_bits)
    total = torch.zeros(NUM_BINS, 3, dtype=torch.int64, device=labels_BHW.device)
    chunk = max(1, _CALIBRATION_CHUNK // max(1, labels_BHW.numel()))
    for first in range(0, num_bits, chunk):
        p = probabilities_BKHW[:, first : first + chunk]
        right = (p >= 0.5) == bits_BKHW[:, first : first + chunk]  # p >= 0.5 is z >= 0
        total += _bin(torch.maximum(p, 1 - p), right, known_BHW.unsqueeze(1).expand_as(right))
    return total


def _bin(confidence: Tensor, right: Tensor, known: Tensor) -> Tensor:
    """Count values by rounded confidence and by being right, then gather the fine counts into bins."""
    num_levels = CONFIDENCE_UNIT + 1
    cells = (confidence.nan_to_num(0.0) * CONFIDENCE_UNIT).round_().to(torch.int32).mul_(2).add_(right)
    cells = torch.where(known, cells, 2 * num_levels).reshape(-1)  # one spare cell for ignored pixels
    counts = torch.bincount(cells, minlength=2 * num_levels + 1)[:-1].view(num_levels, 2)
    level = torch.arange(num_levels, device=counts.device)
    per_level = torch.stack([counts.sum(dim=1), counts[:, 1], counts.sum(dim=1) * level], dim=1)
    bins = (level - 1).clamp_min(0) // (CONFIDENCE_UNIT // NUM_BINS)
    return torch.zeros(NUM_BINS, 3, dtype=torch.int64, device=counts.device).index_add_(0, bins, per_level)


@dataclass(frozen=True)
class EvalResult:
    """Counts of one model over one set of images and the figures that follow from them (fractions, not percent)."""

    confusion: Tensor
    """int64 [N, N], row = true class, column = predicted class."""
    calibration: Tensor
    """int64 [15, 3]: values, right ones, confidence sum in units of 1 / CONFIDENCE_UNIT; see `calibration_counts`."""
    scored_classes: tuple[int, ...] | None = None
    """Class ids that `miou` and `score` average; None = all."""
    volumes: Tensor | None = None
    """int64 [V, 3, N]: pixels of each volume in both, in the prediction, in the truth; None without volumes."""

    @property
    def iou(self) -> Tensor:
        """float64 [N]: intersection over union; NaN for a class neither in the truth nor predicted anywhere."""
        counts = self.confusion.double()
        hits = counts.diagonal()
        return hits / (counts.sum(dim=0) + counts.sum(dim=1) - hits)

    @property
    def miou(self) -> float:
        """Mean of `iou` over the scored classes present in truth or prediction (NaN ones left out, as mmseg does)."""
        return self._mean(self.iou)

    @property
    def dice(self) -> Tensor | None:
        """float64 [N]: 3-D Dice, averaged over volumes; None without volumes. See `volumes.dice`."""
        return None if self.volumes is None else dice(self.volumes)

    @property
    def score(self) -> float:
        """What checkpoints are compared by: the mean Dice where volumes are counted, else the mIoU."""
        return self.miou if self.dice is None else self._mean(self.dice)

    def _mean(self, values_N: Tensor) -> float:
        chosen = values_N if self.scored_classes is None else values_N[list(self.scored_classes)]
        return float(chosen.nanmean())

    @property
    def accuracy(self) -> float:
        """Share of labelled pixels that got their class; NaN without any."""
        return float(self.confusion.diagonal().sum().double() / self.confusion.sum().double())

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |right share - mean confidence| over bins, weighted by their counts."""
        count, right, units = self.calibration.double().unbind(dim=1)
        return float((right - units / CONFIDENCE_UNIT).abs().sum() / count.sum())

    def figures(self) -> dict[str, float]:
        """What is logged."""
        return {"miou": self.miou, "accuracy": self.accuracy, "ece": self.ece} | (
            {"dice": self.score} if self.dice is not None else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the figures (None for NaN) and the counts `from_dict` rebuilds them from."""
        return {
            "miou": _or_none(self.miou),
            "accuracy": _or_none(self.accuracy),
            "ece": _or_none(self.ece),
            "score": _or_none(self.score),
            "iou": [_or_none(value) for value in self.iou.tolist()],
            "dice": None if self.dice is None else [_or_none(value) for value in self.dice.tolist()],
            "confusion": self.confusion.tolist(),
            "calibration": self.calibration.tolist(),
            "scored_classes": None if self.scored_classes is None else list(self.scored_classes),
            "volumes": None if self.volumes is None else self.volumes.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalResult:
        """The result that `to_dict` wrote."""
        scored, volumes = data.get("scored_classes"), data.get("volumes")
        return cls(
            confusion=torch.tensor(data["confusion"], dtype=torch.int64),
            calibration=torch.tensor(data["calibration"], dtype=torch.int64),
            scored_classes=None if scored is None else tuple(scored),
            volumes=None if volumes is None else torch.tensor(volumes, dtype=torch.int64),
        )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(results: Mapping[str, EvalResult], class_names: Sequence[str], *, difference: bool = True) -> str:
    """Per-class IoU (Dice where volumes are counted), mIoU, pixel accuracy and calibration error in percent, a column per
    result.

    With two or more results a last column gives the last minus the first. Classes that the mIoU leaves out are in
    brackets; a dash stands for a class that is neither in the truth nor predicted.
    """
    columns = list(results.values())
    scored = columns[0].scored_classes if columns else None
    by_volume = bool(columns) and all(r.dice is not None for r in columns)
    values = [r.dice if by_volume and r.dice is not None else r.iou for r in columns]
    rows = [
        (name if scored is None or i in scored else f"({name})", [100 * float(each[i]) for each in values])
        for i, name in enumerate(class_names)
    ]
    summary = [
        *([("mean 3-D Dice", [100 * r.score for r in columns])] if by_volume else []),
        ("mIoU", [100 * r.miou for r in columns]),
        ("pixel accuracy", [100 * r.accuracy for r in columns]),
        ("calibration error", [100 * r.ece for r in columns]),
    ]
    header = list(results)
    changed = difference and len(columns) > 1
    if changed:
        header.append("change")
    corner = "Dice, %" if by_volume else "IoU, %"
    first = max(len(corner), *(len(name) for name, _ in rows + summary))
    widths = [max(8, len(name)) for name in header]

    def line(name: str, values: list[float]) -> str:
        cells = [f"{v:.1f}" if not math.isnan(v) else "-" for v in values]
        if changed:
            change = values[-1] - values[0]
            cells.append(f"{change:+.1f}" if not math.isnan(change) else "-")
        return "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

    head = "  ".join([corner.ljust(first), *(name.rjust(width) for name, width in zip(header, widths, strict=True))])
    rule = "-" * len(head)
    return "\n".join([head, rule, *(line(*row) for row in rows), rule, *(line(*row) for row in summary)])

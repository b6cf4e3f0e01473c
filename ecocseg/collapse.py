"""Watching self-training for collapse: a class the teacher no longer sees, or labels nothing is sure of any more.

What is logged of each step's pseudo-labels is a handful of tensors that stay on the device until the loop reads them.
`CollapseWatch` looks at the numbers once they are read, and says once what has died.

Shapes: B batch, N classes, K outputs, H W pixels, h w cells of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ecocseg.target import IGNORE, Target

SHARE = "pseudo_share/"
CONFIDENT = "pseudo/confident_share"
EVERY = 4  # rows and columns from which one pixel is counted: a sixteenth of the work, and 2,000 pixels a crop and more
FLOOR = 0.01  # a class has died below this part of its share of the labelled pixels
LEAST_CONFIDENT = 0.001  # and so has confidence below this share of pixels, or below FLOOR of what it was
GRACE = 0.1  # part of a run after which is looked: before it, a teacher may not know every class yet
LEAST_IMAGES = 200  # unlabelled images seen before absence means anything


def pseudo_metrics(target: Target, confident_BHW: Tensor, num_classes: int) -> dict[str, Tensor]:
    """What is worth watching in a step's pseudo-labels, as 0-dim tensors: shares of bits, of confident pixels and of each
    class (`pseudo_share/` and its id; `named` puts the name there), mean weight and confidence."""
    assert target.confidence is not None
    counts = class_counts(target.labels, num_classes)
    shares = counts / counts.sum().clamp_min(1)
    return {**{f"pseudo/{name}": value for name, value in target.metrics.items()},
            CONFIDENT: confident_BHW.mean(dtype=torch.float32), "pseudo/weight": target.weight.mean(),
            "pseudo/confidence": target.confidence.mean(),
            **{f"{SHARE}{i}": share for i, share in enumerate(shares.unbind())}}


def class_counts(labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class on a grid of every `EVERY`-th row and column; 255 is left out. Shape: float32 [N]."""
    labels_P = labels_BHW[:, ::EVERY, ::EVERY].reshape(-1)
    counts = torch.zeros(IGNORE + 1, device=labels_P.device)
    return counts.scatter_add_(0, labels_P, torch.ones_like(labels_P, dtype=counts.dtype))[:num_classes]  # no host sync


@torch.no_grad()
def disagreement(coding: Any, logits_BKhw: Tensor, target: Target) -> Tensor:
    """Share of the cells with a pseudo-label to which the student, by these logits, gives another class. Shape: scalar."""
    rows, columns = (torch.arange(cells, device=logits_BKhw.device) * side // cells + side // cells // 2
                     for cells, side in zip(logits_BKhw.shape[-2:], target.labels.shape[-2:], strict=True))
    labels_Bhw, is_true_Bhw = target.labels[:, rows][..., columns], target.is_true[:, rows][..., columns]
    guessed_Bhw = (labels_Bhw != IGNORE) & ~is_true_Bhw
    differ_Bhw = (coding.scores(logits_BKhw).argmax(1) != labels_Bhw) & guessed_Bhw
    return differ_Bhw.sum() / guessed_Bhw.sum().clamp_min(1)


def named(scalars: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The scalars with class names in place of ids."""
    label = {f"{SHARE}{i}": SHARE + name.replace("/", " ") for i, name in enumerate(names)}
    return {label.get(key, key): value for key, value in scalars.items()}


class CollapseWatch:
    """Reads each logged record of a run; a function of the records alone, so that a resumed run can read them again.

    A class has died when in `patience` records one after another its share of the pseudo-labels is below `FLOOR` of its
    share of the labelled pixels; likewise the share of confident pixels, below `LEAST_CONFIDENT` or `FLOOR` of the highest
    yet. Records before `GRACE` of the run are left out, and a patience that covers fewer than `LEAST_IMAGES` unlabelled
    images is stretched: an absent class may be none of theirs.

    Args:
        labeled_pixels: labelled pixels of each class by name; a class without any is not watched.
        patience: number of records; 0 = never warn.
        images_per_record: unlabelled images between two records.
        steps: number of steps of the run.
    """

    def __init__(self, labeled_pixels: Mapping[str, float], *, patience: int, images_per_record: int, steps: int) -> None:
        total = max(1.0, sum(labeled_pixels.values()))
        self.least = {SHARE + name.replace("/", " "): FLOOR * pixels / total
                      for name, pixels in labeled_pixels.items() if pixels > 0}
        self.least[CONFIDENT] = LEAST_CONFIDENT
        self.patience = patience and max(patience, -(-LEAST_IMAGES // max(1, images_per_record)))
        self.first_step = GRACE * steps
        self.low = dict.fromkeys(self.least, 0)
        self.said: set[str] = set()

    def update(self, step: int, scalars: Mapping[str, float | None]) -> tuple[dict[str, float], list[str]]:
        """Scalars to log beside these, `collapse/dead` the number of what has died and a 1 for each by name; and warnings,
        one for each at its first death."""
        if not self.patience or CONFIDENT not in scalars:
            return {}, []
        self.least[CONFIDENT] = max(self.least[CONFIDENT], FLOOR * (scalars[CONFIDENT] or 0.0))
        for key, least in self.least.items():
            value = scalars.get(key)
            if value is not None and step > self.first_step:
                self.low[key] = self.low[key] + 1 if value < least else 0
        dead = [key for key, count in self.low.items() if count >= self.patience]
        warnings = [self._warning(key, step) for key in dead if key not in self.said]
        self.said.update(dead)
        names = ["confidence" if key == CONFIDENT else key.removeprefix(SHARE) for key in dead]
        return {"collapse/dead": float(len(dead)), **{f"collapse/{name}": 1.0 for name in names}}, warnings

    def _warning(self, key: str, step: int) -> str:
        where = f"(share below {self.least[key]:.2g} in {self.patience} log lines, at step {step})"
        if key == CONFIDENT:
            return (f"warning: hardly any pseudo-label is confident any more {where}; lower method.confidence_threshold or "
                    "optim.lr, and look at the loss on labelled images")
        return (f"warning: class '{key.removeprefix(SHARE)}' is missing from the pseudo-labels {where}; the teacher has "
                "forgotten it, or the unlabelled images have none of it; data.sampling=rare_class shows it more often")

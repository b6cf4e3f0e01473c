"""From a model to numbers: whole-image and sliding-window prediction, flips, scales, mIoU and calibration.

Shape legend: B batch, N classes, K bits (outputs of the coding), H W pixels.

Every statistic is an int64 count, so a sum over workers or images is exact in any order: one worker or eight, during
training or from `jobs/evaluate.py`, the same checkpoint on the same images gives the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecocseg.ahead import in_threads
from ecocseg.data.transforms import IGNORE, decode_image, decode_mask, second_date
from ecocseg.device import constant
from ecocseg.errors import InputError
from ecocseg.volumes import dice, overlap

NUM_BINS = 15  # equal-width bins over [0, 1], bin i = (i / 15, (i + 1) / 15]; Guo et al. 2017
CONFIDENCE_UNIT = NUM_BINS * 1024  # confidences are counted in steps of 1 / this; rounding moves none by over 3.3e-5
_CALIBRATION_CHUNK = 1 << 22  # values binned at a time, which bounds the memory of the int64 bin indices


@dataclass(frozen=True)
class Normalize:
    """Per-channel `(x - mean) / std` on a 0..1 scale. Takes uint8 (0..255) or float (0..1) images [..., C, H, W], or
    several of them behind one another, as change pairs are."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet, RGB
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, image: Tensor) -> Tensor:
        """float32 [..., C, H, W]."""
        unit = image.float() / 255.0 if image.dtype == torch.uint8 else image.float()
        return (unit - self._channels(self.mean, unit)) / self._channels(self.std, unit)

    def inverse(self, image: Tensor) -> Tensor:
        """The uint8 image of a normalised one, rounded and clipped to 0..255."""
        unit = image.float() * self._channels(self.std, image) + self._channels(self.mean, image)
        return (unit * 255.0).round().clamp(0, 255).to(torch.uint8)

    @staticmethod
    def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
        repeated = values * (like.shape[-3] // len(values))
        return constant(repeated, like.device).view(-1, 1, 1)


@dataclass(frozen=True)
class EvalSpec:
    """How an image is predicted. The defaults are one pass over the whole image at its own size."""

    mode: str = "whole"
    """`whole`, or `slide`: windows of `crop` every `stride` pixels, the last one moved back to the border, averaged
    where they overlap. An image smaller than the window is taken whole along that side."""
    crop: tuple[int, int] | None = None
    """Window height and width in pixels; needed by `slide`."""
    stride: tuple[int, int] | None = None
    """Vertical and horizontal step of the window in pixels, at most `crop`; needed by `slide`."""
    flip: bool = False
    """Average with the horizontally mirrored image."""
    scales: tuple[float, ...] = (1.0,)
    """Factors on the test size; the predictions are averaged."""
    average: str = "logits"
    """What windows, flips and scales average before decoding: `logits` (published UDA results) or `probabilities`
    (UniMatch)."""
    resize: tuple[int, int] | None = None
    """Test height and width in pixels; None = the image's own. Predictions return to the label's size before argmax."""
    scored_classes: tuple[int, ...] | None = None
    """Class ids the mIoU averages; None = all. SYNTHIA recipes score 16 of the 19 Cityscapes classes."""
    multiple: int = 1
    """Both sides of the test size are rounded to a multiple of this many pixels; a ViT's patch."""
    align_corners: bool = False
    """Bilinear convention for upsampling predictions: false in the UDA family, true in the UniMatch family."""

    def __post_init__(self) -> None:
        problems = []
        if self.mode not in ("whole", "slide"):
            problems.append(f"eval.mode {self.mode!r} is unknown; use whole or slide")
        if self.average not in ("logits", "probabilities"):
            problems.append(f"eval.average {self.average!r} is unknown; use logits or probabilities")
        if not self.scales or min(self.scales) <= 0:
            problems.append(f"eval.scales {list(self.scales)} must hold positive factors, e.g. [0.75, 1.0, 1.25]")
        if self.multiple < 1:
            problems.append(f"eval.multiple {self.multiple} must be at least 1 pixel")
        if self.resize is not None and min(self.resize) < 1:
            problems.append(f"eval.resize {list(self.resize)} must be a height and a width of at least 1 pixel")
        if self.mode == "slide":
            problems += self._window_problems()
        if problems:
            raise InputError("; ".join(problems))

    def _window_problems(self) -> list[str]:
        if self.crop is None or self.stride is None:
            return ["eval.mode slide needs eval.crop and eval.stride, each a height and a width in pixels"]
        if min(self.crop) < 1 or min(self.stride) < 1:
            return [f"eval.crop {list(self.crop)} and eval.stride {list(self.stride)} must be at least 1 pixel"]
        if self.stride[0] > self.crop[0] or self.stride[1] > self.crop[1]:
            return [f"eval.stride {list(self.stride)} exceeds eval.crop {list(self.crop)}: pixels between are missed"]
        return []


class Prediction(NamedTuple):
    """`scores` [B, N, H, W], whose argmax is the class, and the averaged `probabilities` [B, K, H, W] behind them."""

    scores: Tensor
    probabilities: Tensor


@torch.no_grad()
def predict(
    model: nn.Module,
    coding: Any,
    image_B3HW: Tensor,
    spec: EvalSpec,
    size: tuple[int, int] | None = None,
    autocast: torch.dtype | None = None,
) -> Prediction:
    """Predict normalised float images at `size` (default: the image's own); the model must already be in eval mode.

    Logits or probabilities (`spec.average`) of all windows, flips and scales are averaged and decoded once, in float32;
    `autocast` is the precision of the model's forward pass alone.
    """
    mean_BKHW = predict_mean(model, coding, image_B3HW, spec, size, autocast)
    if spec.average == "logits":
        return Prediction(coding.scores(mean_BKHW), coding.probabilities(mean_BKHW))
    return Prediction(coding.scores_from_probabilities(mean_BKHW), mean_BKHW)


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    coding: Any,
    image_B3HW: Tensor,
    spec: EvalSpec,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Logits [B, K, h, w] of normalised float images, as `predict` averages them. Of a single pass they are the model's own,
    still to be upsampled to the image's size."""
    if spec.mode == "whole" and not spec.flip and spec.scales == (1.0,):
        size = _test_size(image_B3HW, spec)
        with torch.autocast(image_B3HW.device.type, dtype=autocast, enabled=autocast is not None):
            return model(_resize_image(image_B3HW, size)).float()
    mean_BKHW = predict_mean(model, coding, image_B3HW, spec, autocast=autocast)
    return mean_BKHW if spec.average == "logits" else coding.logits(mean_BKHW)


@torch.no_grad()
def predict_mean(
    model: nn.Module,
    coding: Any,
    image_B3HW: Tensor,
    spec: EvalSpec,
    size: tuple[int, int] | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Logits or probabilities (`spec.average`) [B, K, H, W] at `size`, averaged over windows, flips and scales."""

    def forward(window_B3HW: Tensor) -> Tensor:
        with torch.autocast(window_B3HW.device.type, dtype=autocast, enabled=autocast is not None):
            return model(window_B3HW).float()

    size = size or (image_B3HW.shape[-2], image_B3HW.shape[-1])
    total: Tensor | None = None
    views = 0
    for scale in spec.scales:
        view = _resize_image(image_B3HW, _test_size(image_B3HW, spec, scale))
        for mirrored in (False, True) if spec.flip else (False,):
            map_BKHW = _predict_view(forward, coding, view.flip(-1) if mirrored else view, spec)
            map_BKHW = _upsample(map_BKHW.flip(-1) if mirrored else map_BKHW, size, spec.align_corners)
            total = map_BKHW if total is None else total + map_BKHW
            views += 1
    assert total is not None
    return total if views == 1 else total / views


def predict_scores(
    model: nn.Module,
    coding: Any,
    image_B3HW: Tensor,
    spec: EvalSpec,
    size: tuple[int, int] | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Scores [B, N, H, W] of normalised float images, argmax = class; see `predict`."""
    return predict(model, coding, image_B3HW, spec, size, autocast).scores


def _predict_view(forward: Callable[[Tensor], Tensor], coding: Any, image_B3HW: Tensor, spec: EvalSpec) -> Tensor:
    """Logits or probabilities [B, K, H, W] at the size of one view."""
    if spec.mode == "whole":
        return _predict_window(forward, coding, image_B3HW, spec)
    assert spec.crop is not None and spec.stride is not None
    height, width = image_B3HW.shape[-2:]
    crop_h, crop_w = min(spec.crop[0], height), min(spec.crop[1], width)
    total: Tensor | None = None
    count_HW = image_B3HW.new_zeros(height, width)
    for top in window_starts(height, crop_h, spec.stride[0]):
        for left in window_starts(width, crop_w, spec.stride[1]):
            rows, columns = slice(top, top + crop_h), slice(left, left + crop_w)
            window = _predict_window(forward, coding, image_B3HW[..., rows, columns], spec)
            if total is None:
                total = window.new_zeros(*window.shape[:2], height, width)
            total[..., rows, columns] += window
            count_HW[rows, columns] += 1
    assert total is not None
    return total / count_HW


def _predict_window(forward: Callable[[Tensor], Tensor], coding: Any, image_B3HW: Tensor, spec: EvalSpec) -> Tensor:
    logits_BKhw = forward(image_B3HW)
    logits_BKHW = _upsample(logits_BKhw, (image_B3HW.shape[-2], image_B3HW.shape[-1]), spec.align_corners)
    return logits_BKHW if spec.average == "logits" else coding.probabilities(logits_BKHW)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of windows that cover `length` pixels, each inside it: the last is moved back to the border."""
    count = max(0, math.ceil((length - window) / stride)) + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


def _test_size(image_B3HW: Tensor, spec: EvalSpec, scale: float = 1.0) -> tuple[int, int]:
    height, width = (max(1, round(side * scale / spec.multiple)) * spec.multiple
                     for side in spec.resize or image_B3HW.shape[-2:])
    return height, width


def _resize_image(image_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
    if image_B3HW.shape[-2:] == size:
        return image_B3HW
    # antialias: as PIL does when training images are made smaller
    return F.interpolate(image_B3HW, size=size, mode="bilinear", align_corners=False, antialias=True)


def _upsample(map_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    if map_BKhw.shape[-2:] == size:
        return map_BKhw
    return F.interpolate(map_BKhw, size=size, mode="bilinear", align_corners=align_corners)


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


def image_tensor(data: bytes, name: str) -> Tensor:
    """uint8 [3, H, W] of an encoded image, RGB whatever it was. InputError naming it if it does not decode."""
    try:
        return torch.from_numpy(np.array(decode_image(data, name).convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError) as error:  # a file cut off after its header
        raise InputError(f"image_id {name!r}: the image does not decode ({error}); pack it again") from error


def image_of_row(row: Mapping[str, Any], pair: bool) -> Tensor:
    """uint8 image [3, H, W] of a shard row; of a pair the two dates behind one another, [6, H, W]. InputError as below."""
    name = str(row["image_id"])
    image_3HW = image_tensor(row["image"], name)
    if not pair:
        return image_3HW
    second_date(row["image_b"], (image_3HW.shape[2], image_3HW.shape[1]), name)
    return torch.cat([image_3HW, image_tensor(row["image_b"], f"{name}, second date")])


def samples_of_rows(rows: Iterable[Mapping[str, Any]], threads: int = 1) -> Iterator[tuple[Tensor, Tensor, str | None]]:
    """Samples for `evaluate` from shard rows (`image_id`, `image`, `mask`): uint8 [3, H, W], uint8 [H, W] and the volume, if
    rows have a `group`. Rows that have `image_b` give the two dates behind one another, [6, H, W]. A few are decoded ahead.

    Raises InputError naming the image if it or its mask does not decode or their sizes differ.
    """
    yield from in_threads(_sample, rows, threads)


def _sample(row: Mapping[str, Any]) -> tuple[Tensor, Tensor, str | None]:
    name = str(row["image_id"])
    image_3HW = image_of_row(row, "image_b" in row)
    labels_HW = torch.from_numpy(np.array(decode_mask(row["mask"], name)))
    if labels_HW.shape != image_3HW.shape[1:]:
        sizes = f"{tuple(image_3HW.shape[1:])} but its mask {tuple(labels_HW.shape)} (height, width)"
        raise InputError(f"image_id {name!r}: the image is {sizes}; pack the pair again with equal sizes")
    return image_3HW, labels_HW, row.get("group")


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module],
    coding: Any,
    samples: Iterable[tuple[Tensor, Tensor, str | None]],
    spec: EvalSpec,
    *,
    normalize: Normalize,
    device: torch.device | str,
    volumes: Sequence[str] = (),
    reduce: Callable[[Tensor], Tensor] | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, EvalResult]:
    """Evaluate several models in one pass over `samples`: uint8 image [3, H, W] and labels [H, W] of any size, and the
    volume they are a slice of. With `volumes`, the names of all of them, Dice is counted too.

    Models run in eval mode and get their modes back. `reduce` sums one int64 tensor on `device` over workers; each
    worker calls it once, so one without a sample still takes part. `autocast` is the forward pass's precision.
    """
    device = torch.device(device)
    num_classes = coding.num_classes
    sizes = [(num_classes, num_classes), (NUM_BINS, 3), (len(volumes), 3, num_classes)]
    counts = {name: [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes] for name in models}
    place = {volume: i for i, volume in enumerate(volumes)}
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        for model in models.values():
            model.eval()
        for image_3HW, labels_HW, volume in samples:
            image_B3HW = normalize(image_3HW.to(device, non_blocking=True).unsqueeze(0))
            labels_BHW = labels_HW.to(device, non_blocking=True).long().unsqueeze(0)
            size = (labels_BHW.shape[-2], labels_BHW.shape[-1])
            for name, model in models.items():
                fused = None if volume in place else fused_counts(model, coding, image_B3HW, labels_BHW, spec, autocast)
                if fused is not None:
                    for total, part in zip(counts[name], fused, strict=False):
                        total.add_(part)
                    continue
                prediction = predict(model, coding, image_B3HW, spec, size, autocast)
                pred_BHW = prediction.scores.argmax(dim=1)
                counts[name][0].add_(confusion(pred_BHW, labels_BHW, num_classes))
                counts[name][1].add_(calibration_counts(prediction.probabilities, labels_BHW, coding))
                if volume in place:
                    counts[name][2][place[volume]].add_(overlap(pred_BHW, labels_BHW, num_classes))
    finally:
        for module, training in modes:
            module.training = training  # not .train(): that would also unfreeze children kept in eval mode
    return _collect(counts, spec, reduce)


def fused_counts(model: nn.Module, coding: Any, image_B3HW: Tensor, labels_BHW: Tensor, spec: EvalSpec,
                 autocast: torch.dtype | None) -> tuple[Tensor, Tensor] | None:
    """Confusion and calibration from the model's own logits by one kernel, where one pass is resized once; else None."""
    size = (labels_BHW.shape[-2], labels_BHW.shape[-1])
    if spec.mode != "whole" or spec.flip or spec.scales != (1.0,) or _test_size(image_B3HW, spec) != size:
        return None
    like_BKHW = image_B3HW[:, :1].expand(-1, coding.num_outputs, -1, -1)  # known before a forward pass is spent
    if not coding.uses_kernels(like_BKHW, size, spec.align_corners):
        return None
    check_ids(labels_BHW, coding.num_classes)
    logits_BKhw = predict_logits(model, coding, image_B3HW, spec, autocast)
    if not coding.uses_kernels(logits_BKhw, size, spec.align_corners):
        return None
    return coding.counts(logits_BKhw, labels_BHW, spec.align_corners)


def _collect(
    counts: Mapping[str, Sequence[Tensor]], spec: EvalSpec, reduce: Callable[[Tensor], Tensor] | None
) -> dict[str, EvalResult]:
    """Sum over workers with one call for all models."""
    if not counts:
        return {}
    packed = torch.cat([part.reshape(-1) for parts in counts.values() for part in parts])
    packed = (packed if reduce is None else reduce(packed)).cpu()
    results = {}
    for (name, parts), whole in zip(counts.items(), packed.chunk(len(counts)), strict=True):
        pieces = whole.split([part.numel() for part in parts])
        matrix, bins, volumes = (piece.view(part.shape).clone() for piece, part in zip(pieces, parts, strict=True))
        results[name] = EvalResult(matrix, bins, spec.scored_classes, volumes if len(volumes) else None)
    return results


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

"""From a model to counts: whole-image and sliding-window prediction, flips, scales. metrics.py makes figures of the counts.

Shape legend: B batch, N classes, K bits (outputs of the coding), H W pixels, h w those of a model's logits.
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
from ecocseg.data.transforms import decode_image, decode_mask, second_date
from ecocseg.device import constant
from ecocseg.errors import InputError
from ecocseg.metrics import NUM_BINS, EvalResult, calibration_counts, confusion
from ecocseg.resize import bilinear
from ecocseg.volumes import overlap


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

    @property
    def single_pass(self) -> bool:
        """An image goes through the model once and whole, so that its logits need no averaging."""
        return self.mode == "whole" and not self.flip and self.scales == (1.0,)

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
    if spec.single_pass:
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
            map_BKHW = bilinear(map_BKHW.flip(-1) if mirrored else map_BKHW, size, spec.align_corners)
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
    logits_BKHW = bilinear(logits_BKhw, (image_B3HW.shape[-2], image_B3HW.shape[-1]), spec.align_corners)
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
                if volume not in place and spec.single_pass and _test_size(image_B3HW, spec) == size:
                    logits_BKhw = predict_logits(model, coding, image_B3HW, spec, autocast)
                    matrix, bins = coding.counts(logits_BKhw, labels_BHW, spec.align_corners)
                    counts[name][0].add_(matrix)
                    counts[name][1].add_(bins)
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

"""HRDA: a whole image at half size for its context, parts of it at full size for detail, joined by a learned attention.

Hoyer et al., ECCV 2022. The same encoder and decoder (DAFormer's) see both scales.

B batch, C channels, K outputs, H W image pixels, h w cells of the full-size image at the decoder's stride
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ecocseg.errors import InputError
from ecocseg.evaluate import window_starts
from ecocseg.models.encoders import Encoder
from ecocseg.models.heads import HrdaHead
from ecocseg.models.segmenter import Segmenter, padded_to, trimmed
from ecocseg.target import Target


class Box(NamedTuple):
    """Part of an image in pixels, its lower and right ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def slices(self, stride: int = 1) -> tuple[slice, slice]:
        """Rows and columns of a map of this stride."""
        return slice(self.top // stride, self.bottom // stride), slice(self.left // stride, self.right // stride)


class TwoScaleLogits(NamedTuple):
    """What the model gives in training: two predictions, each with a loss of its own (`two_scale_loss`)."""

    fused: Tensor
    """[B, K, h, w] of the whole image, from both scales."""
    detail: Tensor
    """[B, K, h', w'] of the box alone, at full size."""
    box: Box
    detail_weight: float
    """Share of the detail's loss in the whole."""


def fuse(context_BKhw: Tensor, detail_BKhw: Tensor, attention_BKhw: Tensor, box: tuple[slice, slice]) -> Tensor:
    """upsample2((1 - a) * context) + upsample2(a) * detail, the attention a being 0 where there is no detail.

    Context and attention are maps of the half-size image, detail one of `box`: rows and columns of the full-size map,
    even where they begin and end. Shape: [B, K, h, w], twice as many cells a side as the context.
    """
    rows, columns = box
    inside = torch.zeros_like(attention_BKhw)
    half = (..., slice(rows.start // 2, rows.stop // 2), slice(columns.start // 2, columns.stop // 2))
    inside[half] = attention_BKhw[half]
    fused = _upsample2((1 - inside) * context_BKhw)
    height, width = fused.shape[-2:]
    detail = _upsample2(inside)[..., rows, columns] * detail_BKhw
    return fused + F.pad(detail, (columns.start, width - columns.stop, rows.start, height - rows.stop))


def _upsample2(map_BKhw: Tensor) -> Tensor:
    return F.interpolate(map_BKhw, scale_factor=2, mode="bilinear", align_corners=False)


def merge_windows(parts: Sequence[Tensor], boxes: Sequence[tuple[slice, slice]], size: tuple[int, int]) -> Tensor:
    """Mean of maps [B, K, ., .] that lie at these rows and columns of one of `size` cells. Shape: [B, K, *size]."""
    total = parts[0].new_zeros(*parts[0].shape[:2], *size)
    count_hw = parts[0].new_zeros(size)
    for part, (rows, columns) in zip(parts, boxes, strict=True):
        total[..., rows, columns] += part
        count_hw[rows, columns] += 1
    return total / count_hw


def two_scale_loss(coding: Any, output: TwoScaleLogits, target: Target, *, average: str = "all",
                   normalizer: Tensor | None = None) -> dict[str, Tensor]:
    """The coding's terms on the whole image and on the box, weighted; the box has its part of labels, weights and bits.

    A given `normalizer` counts pixels of the whole image; the box gets its share of the area of it.
    """
    rows, columns = output.box.slices()
    inside = target.cropped(rows, columns)
    part = None if normalizer is None else normalizer * (inside.labels.numel() / target.labels.numel())
    fused = coding.loss(output.fused, target, average=average, normalizer=normalizer)
    detail = coding.loss(output.detail, inside, average=average, normalizer=part)
    return {name: (1 - output.detail_weight) * fused[name] + output.detail_weight * detail[name] for name in fused}


class HrdaSegmenter(Segmenter):
    """In training each forward draws one box of full-size pixels and gives `TwoScaleLogits`; in eval mode windows of the
    box's size, half overlapping and averaged, cover the image, and the fused logits come back alone.

    `detail_crop` is the box's (height, width) in pixels, at most the image; None = half the image. Boxes come from the
    generator of `begin_step`, so that they depend on nothing else; without one, from torch's own.
    """

    decoder: HrdaHead

    def __init__(self, encoder: Encoder, decoder: HrdaHead, num_outputs: int, in_channels: int = 3,
                 detail_crop: tuple[int, int] | None = None, detail_weight: float = 0.1) -> None:
        super().__init__(encoder, decoder, num_outputs, in_channels)
        self.detail_crop, self.detail_weight = detail_crop, detail_weight
        self.stride = encoder.strides[0]
        self.grid = 2 * self.stride  # box corners lie on cells of the half-size image: multiples of 8 pixels for MiT
        self.step = math.lcm(self.grid, encoder.divisor)  # box sides are multiples of it
        self.least = -(-encoder.smallest // self.step) * self.step
        self.generator: torch.Generator | None = None

    def begin_step(self, generator: torch.Generator) -> None:
        self.generator = generator

    def forward(self, image_B3HW: Tensor, return_features: bool = False) -> Any:  # type: ignore[override]  # no factors
        """Logits [B, K, h, w], or `TwoScaleLogits` in training; with `return_features` also the context's last map."""
        size = (image_B3HW.shape[-2], image_B3HW.shape[-1])
        whole = self._whole_size(size)
        image_B3HW = padded_to(image_B3HW, whole)
        maps = self.encode(image_B3HW)
        boxes = [self._random_box(size)] if self.training else self._windows(whole)
        parts_BKhw = self.decoder(super().encode(torch.cat([image_B3HW[..., *box.slices()] for box in boxes])))
        if self.training:
            detail_BKhw, cells = parts_BKhw, boxes[0].slices(self.stride)
        else:
            height, width = whole[0] // self.stride, whole[1] // self.stride
            detail_BKhw = merge_windows(parts_BKhw.chunk(len(boxes)), [box.slices(self.stride) for box in boxes],
                                        (height, width))
            cells = (slice(0, height), slice(0, width))
        fused_BKhw = fuse(self.decoder(maps), detail_BKhw, self.decoder.scale_attention(maps), cells)
        output: Any = trimmed(fused_BKhw, size, whole)
        if self.training:
            output = TwoScaleLogits(output, detail_BKhw, boxes[0], self.detail_weight)
        return (output, maps[-1]) if return_features else output

    def encode(self, image_B3HW: Tensor) -> list[Tensor]:
        """Feature maps of the context, that is of the image at half size."""
        image_B3HW = padded_to(image_B3HW, self._whole_size(image_B3HW.shape[-2:]))
        return super().encode(F.interpolate(image_B3HW, scale_factor=0.5, mode="bilinear", align_corners=False))

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        raise NotImplementedError("hrda joins two scales of an image; it cannot decode one set of maps")

    def _whole_size(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) to pad an image to, so that the halved one has whole cells and the encoder pads no more."""
        unit = 2 * math.lcm(self.stride, self.encoder.divisor)
        height, width = (-(-max(side, 2 * self.encoder.smallest) // unit) * unit for side in size)
        return height, width

    def _box_size(self, size: Sequence[int]) -> tuple[int, int]:
        wanted = self.detail_crop or (size[0] // 2, size[1] // 2)
        height, width = (min(want, side) // self.step * self.step for want, side in zip(wanted, size, strict=True))
        return height, width

    def compile(self, *args: Any, **options: Any) -> None:
        """As of any module, but boxes are drawn uncompiled. (A decorator would import the compiler in every process.)"""
        HrdaSegmenter._random_box = torch.compiler.disable(HrdaSegmenter._random_box)  # type: ignore[method-assign]
        super().compile(*args, **options)

    def _random_box(self, size: tuple[int, int]) -> Box:
        """One draw: any corner of the grid from which the box lies inside the image."""
        height, width = self._box_size(size)
        if min(height, width) < self.least:
            raise InputError(f"model.head: hrda cuts boxes of {height} x {width} pixels out of crops of {size[0]} x {size[1]}, "
                             f"and this encoder needs {self.least}; raise data.crop to {2 * self.least} or more, or "
                             "model.detail_crop")
        top, left = (self.grid * int(torch.randint((side - box) // self.grid + 1, (), generator=self.generator))
                     for side, box in zip(size, (height, width), strict=True))
        return Box(top, left, top + height, left + width)

    def _windows(self, whole: tuple[int, int]) -> list[Box]:
        size = [max(side, self.least) for side in self._box_size(whole)]
        rows, columns = (window_starts(side, window, max(self.grid, window // 2 // self.grid * self.grid))
                         for side, window in zip(whole, size, strict=True))
        return [Box(top, left, top + size[0], left + size[1]) for top in rows for left in columns]

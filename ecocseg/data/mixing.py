"""Mixing and strong augmentation on the device. Shapes: B batch, X 64-bit words, H W pixels.

Every random choice comes from an explicit CPU generator, so it depends neither on the device nor on the number of
workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ecocseg.coding import Target
from ecocseg.device import to_device
from ecocseg.libraries import TF

BLUR_SIGMAS = 6.0  # taps further out weigh less than float32 resolves


def mix(a: Target, b: Target, mask_BHW: Tensor) -> Target:
    """Target that is `a` where the mask is True and `b` elsewhere, field by field.

    A true label's missing confidence and reliable share count as 1. Bits must be on both sides or on neither.
    """
    if (a.bits is None) != (b.bits is None):
        raise ValueError("one target has bits and the other has none; make both with the same coding")
    bits = None
    if a.bits is not None and b.bits is not None:
        bits = torch.where(mask_BHW[:, None], a.bits, b.bits)
    return Target(
        labels=torch.where(mask_BHW, a.labels, b.labels),
        weight=torch.where(mask_BHW, a.weight, b.weight),
        is_true=torch.where(mask_BHW, a.is_true, b.is_true),
        bits=bits,
        confidence=_mix_optional(a.confidence, b.confidence, mask_BHW),
        reliable=_mix_optional(a.reliable, b.reliable, mask_BHW),
        metrics={**b.metrics, **a.metrics},
    )


def _mix_optional(a_BHW: Tensor | None, b_BHW: Tensor | None, mask_BHW: Tensor) -> Tensor | None:
    if a_BHW is None and b_BHW is None:
        return None
    return torch.where(mask_BHW, 1.0 if a_BHW is None else a_BHW, 1.0 if b_BHW is None else b_BHW)


def mix_images(a_BCHW: Tensor, b_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Images that are `a` where the mask is True and `b` elsewhere. Shape: [B, C, H, W]."""
    return torch.where(mask_BHW[:, None], a_BCHW, b_BCHW)


def classes_present(labels_BHW: Tensor) -> Tensor:
    """Which labels each image has, 255 among them. Shape: bool [B, 256]."""
    flat_BP = labels_BHW.flatten(1).long()
    present_BN = torch.zeros(len(flat_BP), 256, dtype=torch.bool, device=flat_BP.device)
    return present_BN.scatter_(1, flat_BP, True)


def class_mix_mask(labels_BHW: Tensor, generators: Sequence[torch.Generator], classes_N: Tensor | None = None,
                   most: int = 256) -> Tensor:
    """ClassMix: True on half (rounded up) of the classes of each image, 255 counted as one; one generator per image.

    With `classes_N`, bool [256], it is half of these classes, whether the image has them or not: DACS draws from the
    classes of a whole batch, anew for each image.

    How many classes there are is known on the device alone, so the draw for each number of them, up to `most`, is made
    and the device picks the right one: the host does not wait for it. Shape: bool [B, H, W].
    """
    flat_BP = labels_BHW.flatten(1).long()
    present_BN = classes_present(labels_BHW) if classes_N is None else classes_N.expand(len(flat_BP), -1)
    place_BN = present_BN.cumsum(1).sub_(1).clamp_(0, most - 1)  # of a class among those present
    draws = to_device(torch.stack([_half_draws(generator, most) for generator in generators]), flat_BP.device)
    count_B = present_BN.sum(1).clamp_max_(most)
    draw = draws.gather(1, count_B[:, None, None].expand(-1, 1, most)).squeeze(1)
    return (draw.gather(1, place_BN) & present_BN).gather(1, flat_BP).view(labels_BHW.shape)


def _half_draws(generator: torch.Generator, most: int) -> Tensor:
    """Row n: half of n things, rounded up, drawn with the generator as it was given. Shape: bool [most + 1, most]."""
    state, draws = generator.get_state(), torch.zeros(most + 1, most, dtype=torch.bool)
    for number in range(1, most + 1):
        generator.set_state(state)
        order = torch.randperm(number, generator=generator)
        draws[number, order[: (number + 1) // 2]] = True
    return draws


def cutmix_box(shape: tuple[int, int], generator: torch.Generator, p: float = 0.5,
               area: tuple[float, float] = (0.02, 0.4), aspect: tuple[float, float] = (0.3, 1 / 0.3)) -> Tensor:
    """CutMix as UniMatch draws it: with probability p a box of random area share and height/width ratio, redrawn until
    it lies inside the image. Shape: bool [H, W], True inside the box."""
    height, width = shape
    mask_HW = torch.zeros(height, width, dtype=torch.bool)
    if torch.rand((), generator=generator).item() >= p:
        return mask_HW
    share = _uniform(*area, generator)
    while True:
        ratio = _uniform(*aspect, generator)
        tall, wide = int(math.sqrt(share * height * width * ratio)), int(math.sqrt(share * height * width / ratio))
        top = int(torch.randint(height, (), generator=generator))
        left = int(torch.randint(width, (), generator=generator))
        if top + tall <= height and left + wide <= width:
            mask_HW[top : top + tall, left : left + wide] = True
            return mask_HW


def patch_mask(shape: tuple[int, int], block: int = 64, keep: float = 0.3, *, generator: torch.Generator) -> Tensor:
    """MIC's grid: each block of `block` pixels a side is kept with probability `keep`. Shape: bool [H, W]."""
    rows, columns = math.ceil(shape[0] / block), math.ceil(shape[1] / block)
    grid = torch.rand(rows, columns, generator=generator) < keep
    return grid.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]


def color_jitter(image_B3HW: Tensor, brightness: float, contrast: float, saturation: float, hue: float, *,
                 generator: torch.Generator) -> Tensor:
    """Colour jitter of images in [0, 1], one draw for the whole batch, as DACS and DAFormer have it from kornia.

    Factors are uniform in 1 +- strength (hue: +- strength of a full turn), and the order of the four is random.
    Brightness adds factor - 1, contrast multiplies by its factor (no mean involved), saturation multiplies the S of
    HSV; each result is clipped to [0, 1].
    """
    factors = [_uniform(1 - s, 1 + s, generator) for s in (brightness, contrast, saturation)]
    factors.append(_uniform(-hue, hue, generator))
    for which in torch.randperm(4, generator=generator).tolist():
        if which == 0:
            image_B3HW = (image_B3HW + (factors[0] - 1)).clamp(0, 1)
        elif which == 1:
            image_B3HW = (image_B3HW * factors[1]).clamp(0, 1)
        elif which == 2:
            image_B3HW = _scale_saturation(image_B3HW, factors[2])
        elif hue > 0:
            image_B3HW = TF.adjust_hue(image_B3HW, factors[3])
    return image_B3HW


def _scale_saturation(image_B3HW: Tensor, factor: float) -> Tensor:
    """S of HSV times a factor, at most 1: each channel's distance to the largest one is linear in S."""
    value_B1HW = image_B3HW.amax(1, keepdim=True)
    below_B3HW = value_B1HW - image_B3HW
    saturation_B1HW = below_B3HW.amax(1, keepdim=True) / value_B1HW.clamp_min(1e-8)
    limit_B1HW = (1 / saturation_B1HW.clamp_min(1e-8)).clamp_max(factor)
    return (value_B1HW - below_B3HW * limit_B1HW).clamp(0, 1)


def blur_size(side: int) -> int:
    """Pixels a side of DAFormer's blur kernel: a tenth of the image, made odd."""
    tenth = math.ceil(0.1 * side)
    return math.floor(tenth - 0.5 + tenth % 2)


def gaussian_blur(image_BCHW: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with DAFormer's kernel sizes, reflecting borders, one axis after the other. Shape: as given."""
    channels = image_BCHW.shape[1]
    for axis in (2, 3):
        radius = min(blur_size(image_BCHW.shape[axis]) // 2, math.ceil(BLUR_SIGMAS * sigma))
        if radius == 0:
            continue
        offset = torch.arange(-radius, radius + 1, dtype=image_BCHW.dtype, device=image_BCHW.device)
        kernel = (-0.5 * (offset / sigma) ** 2).exp()
        kernel = (kernel / kernel.sum()).view((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
        padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        padded = F.pad(image_BCHW, padding, mode="reflect")
        image_BCHW = F.conv2d(padded, kernel.expand(channels, -1, -1, -1), groups=channels)
    return image_BCHW


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

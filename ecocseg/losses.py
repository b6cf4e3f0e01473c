"""Losses of one pixel's outputs, with their gradients, and the walk over an image in strips of rows.

A strip is upsampled, its loss and gradient are computed in closed form, and only the gradient at the logits' own size
is kept: nothing of label size but the target is ever held, whatever the number of outputs.

Shapes: B batch, N classes, K outputs (bits), H W pixels of the target, h w cells of the logits, P pixels of a strip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

COSINE_EPS = 1e-3
"""Least |z| a cosine divides by: below it cos(z, s) = z.s / (eps sqrt(K)), so zero logits have cosine 0 and a finite
gradient towards their target."""
_CPU_STRIP, _GPU_STRIP = 1 << 14, 1 << 20  # pixels of a strip: what stays in a core's cache / fills a GPU

StripLoss = Callable[[Tensor, int, int, int, bool], tuple[Tensor, Tensor | None]]
"""f(logits [K, P], image, first row, end row, with gradient) -> terms [T] summed over the strip, the first of them the
loss, and the loss's gradient [K, P]."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_strips(height: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(first row, end row) of each strip of an image."""
    rows = max(1, (_CPU_STRIP if device.type == "cpu" else _GPU_STRIP) // width)
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


@functools.lru_cache(maxsize=64)
def _axis_weights(source: int, size: int, align_corners: bool) -> tuple[Tensor, list[int], list[int]]:
    """Linear interpolation along one axis as a matrix float64 [size, source], with each row's first and end column."""
    eye = torch.eye(source, dtype=torch.float64)[None, None]
    weights = F.interpolate(eye, (size, source), mode="bilinear", align_corners=align_corners)[0, 0]
    used = weights != 0
    first = used.int().argmax(1)
    end = source - used.flip(1).int().argmax(1)
    return weights, first.tolist(), end.tolist()


class Upsample:
    """Bilinear resizing of logits to label size, strip by strip, and its adjoint; equal to F.interpolate."""

    def __init__(self, source: tuple[int, int], size: tuple[int, int], align_corners: bool, like: Tensor) -> None:
        self.source, self.size, self.dtype = source, size, compute_dtype(like)
        self.identity = source == size
        if not self.identity:
            rows, self.first, self.end = _axis_weights(source[0], size[0], align_corners)
            columns = _axis_weights(source[1], size[1], align_corners)[0]
            self.rows_Hh = rows.to(like.device, self.dtype)
            self.columns_wW = columns.t().to(like.device, self.dtype).contiguous()

    def strip(self, logits_Khw: Tensor, first: int, end: int) -> Tensor:
        """Rows first to end of the resized logits. Shape: [K, P]."""
        if self.identity:
            return logits_Khw[:, first:end].to(self.dtype).flatten(1)
        low, high = self.first[first], self.end[end - 1]
        part_Krw = self.rows_Hh[first:end, low:high] @ logits_Khw[:, low:high].to(self.dtype)
        return (part_Krw @ self.columns_wW).flatten(1)

    def add_gradient(self, total_Khw: Tensor, grad_KP: Tensor, first: int, end: int) -> None:
        """Add a strip's gradient to that of the logits (at equal sizes: set it), in place."""
        grad_KrW = grad_KP.view(len(grad_KP), end - first, self.size[1])
        if self.identity:
            total_Khw[:, first:end] = grad_KrW
            return
        low, high = self.first[first], self.end[end - 1]
        total_Khw[:, low:high] += self.rows_Hh[first:end, low:high].t() @ (grad_KrW @ self.columns_wW.t())


class _StripwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BKhw: Tensor, upsample: Upsample, strip_loss: StripLoss, num_terms: int,
                with_gradient: bool) -> tuple[Tensor, Tensor]:
        dtype, device = upsample.dtype, logits_BKhw.device
        terms = torch.zeros(num_terms, dtype=dtype, device=device)
        make = torch.empty if upsample.identity else torch.zeros
        grad_BKhw = make(logits_BKhw.shape, dtype=dtype, device=device) if with_gradient else None
        with torch.autocast(device.type, enabled=False):
            for image, logits_Khw in enumerate(logits_BKhw):
                for first, end in row_strips(*upsample.size, device):
                    logits_KP = upsample.strip(logits_Khw, first, end)
                    strip_terms, grad_KP = strip_loss(logits_KP, image, first, end, with_gradient)
                    terms += strip_terms
                    if grad_BKhw is not None and grad_KP is not None:
                        upsample.add_gradient(grad_BKhw[image], grad_KP, first, end)
        ctx.gradient = None if grad_BKhw is None else grad_BKhw.to(logits_BKhw.dtype)
        loss, detail = terms[0].clone(), terms[1:].clone()
        ctx.mark_non_differentiable(detail)
        return loss, detail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grad_loss.to(ctx.gradient.dtype), None, None, None, None


def stripwise_loss(logits_BKhw: Tensor, size: tuple[int, int], strip_loss: StripLoss, num_terms: int,
                   align_corners: bool = False) -> tuple[Tensor, Tensor]:
    """Sum of a strip loss over a batch whose labels have `size`.

    Returns the loss (scalar, differentiable) and the other terms ([T - 1], detached).
    """
    upsample = Upsample((logits_BKhw.shape[-2], logits_BKhw.shape[-1]), size, align_corners, logits_BKhw)
    with_gradient = torch.is_grad_enabled() and logits_BKhw.requires_grad
    return _StripwiseLoss.apply(logits_BKhw, upsample, strip_loss, num_terms, with_gradient)


@dataclass(frozen=True)
class EcocWeights:
    """What the ECOC loss is made of."""

    bce: float = 1.0
    distance: float = 5.0
    contrast: float = 2.0
    temperature: float = 0.5
    negatives: Literal["codewords", "target_and_negatives"] = "codewords"


def ecoc_loss(logits_KP: Tensor, bits_KP: Tensor, labels_P: Tensor, weight_P: Tensor, signs_NK: Tensor,
              weights: EcocWeights, with_gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """Bit cross-entropy, pixel-code distance and pixel-code contrast of target bits, times a weight per pixel.

    Returns the sums [4] over pixels of loss, bce, distance and contrast, and the loss's gradient [K, P]. A term of
    weight 0 is not computed and reads 0. `labels_P` (class ids below N) is read by "target_and_negatives" alone.
    """
    sign_KP = bits_KP.to(logits_KP.dtype).mul_(2).sub_(1)
    terms = torch.zeros(4, dtype=logits_KP.dtype, device=logits_KP.device)
    agree_KP = logits_KP * sign_KP
    grad_KP: Tensor | None = None
    if weights.bce:
        terms[1], grad_KP = _bit_cross_entropy(agree_KP, sign_KP, weight_P, weights.bce, with_gradient)
    if weights.distance or weights.contrast:
        cosine_terms, cosine_grad_KP = _cosine_terms(
            logits_KP, agree_KP.sum(0), sign_KP, labels_P, weight_P, signs_NK, weights, with_gradient)
        terms[2:] = cosine_terms
        if cosine_grad_KP is not None:
            grad_KP = cosine_grad_KP if grad_KP is None else grad_KP.add_(cosine_grad_KP)
    terms[0] = weights.bce * terms[1] + weights.distance * terms[2] + weights.contrast * terms[3]
    if grad_KP is None and with_gradient:
        grad_KP = torch.zeros_like(logits_KP)
    return terms, grad_KP


def _bit_cross_entropy(agree_KP: Tensor, sign_KP: Tensor, weight_P: Tensor, factor: float,
                       with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """log(1 + exp(-a)) with a = z (2b - 1), averaged over bits; its gradient is -(2b - 1) sigmoid(-a) / K.

    log(1 + exp(-a)) = max(-a, 0) - log(|s - 1/2| + 1/2) with s = sigmoid(-a): exact to rounding for any a, and several
    times faster on CPU than logsigmoid.
    """
    num_bits = len(agree_KP)
    wrong_KP = agree_KP.neg().sigmoid_()
    sum_P = (wrong_KP - 0.5).abs_().add_(0.5).log_().sum(0).add_(agree_KP.clamp_max(0).sum(0))
    total = -(sum_P @ weight_P) / num_bits
    if not with_gradient:
        return total, None
    return total, wrong_KP.mul_(sign_KP).mul_(weight_P * (-factor / num_bits))


def _cosine_terms(logits_KP: Tensor, product_P: Tensor, sign_KP: Tensor, labels_P: Tensor, weight_P: Tensor,
                  signs_NK: Tensor, weights: EcocWeights, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sums [2] of distance and contrast; all cosines are products with sign vectors over |z| sqrt(K).

    With loss = f(cos_target, cos_1..cos_N), the gradient is
    sum_i f_i (s_i / (|z| sqrt K) - [|z| > eps] cos_i z / |z|^2).
    """
    norm_P = logits_KP.square().sum(0).sqrt_()  # several times faster than vector_norm over dim 0 on CPU
    inverse_P = 1 / norm_P.clamp_min(COSINE_EPS)
    scale_P = inverse_P / math.sqrt(len(logits_KP))
    target_P = product_P * scale_P
    terms = torch.zeros(2, dtype=logits_KP.dtype, device=logits_KP.device)
    slope_P = torch.zeros_like(target_P)  # of the loss with respect to the target's cosine
    slope_NP = None
    if weights.distance:
        terms[0] = (1 - target_P) @ weight_P
        slope_P -= weights.distance
    if weights.contrast:
        cosine_NP = (signs_NK @ logits_KP) * scale_P
        logit_NP = cosine_NP / weights.temperature
        if weights.negatives == "target_and_negatives":  # the target stands in for its class's codeword
            logit_NP.scatter_(0, labels_P[None], (target_P / weights.temperature)[None])
        sum_P = logit_NP.logsumexp(0)
        terms[1] = (sum_P - target_P / weights.temperature) @ weight_P
        slope_P -= weights.contrast / weights.temperature
        if with_gradient:
            slope_NP = logit_NP.sub_(sum_P).exp_().mul_(weights.contrast / weights.temperature)
            if weights.negatives == "target_and_negatives":
                slope_P += slope_NP.gather(0, labels_P[None])[0]
                slope_NP.scatter_(0, labels_P[None], 0.0)
    if not with_gradient:
        return terms, None
    weight_scale_P = weight_P * scale_P
    grad_KP = sign_KP * (slope_P * weight_scale_P)
    radial_P = slope_P * target_P
    if slope_NP is not None:
        radial_P = radial_P + (slope_NP * cosine_NP).sum(0)
        grad_KP.addmm_(signs_NK.t(), slope_NP.mul_(weight_scale_P))
    radial_P = radial_P * weight_P * inverse_P.square() * (norm_P > COSINE_EPS)
    return terms, grad_KP.addcmul_(logits_KP, radial_P.expand_as(logits_KP), value=-1)


def soft_dice_loss(probabilities_BMHW: Tensor, maps_BMHW: Tensor, weight_BHW: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - 2 |p t| / (|p|^2 + |t|^2) of each map over all pixels of the batch, averaged over maps, as UniMatch has it on cardiac
    slices. Shape: scalar.

    Sums are weighted. Dice does not change when all weights halve, so it is multiplied by the mean weight of the pixels that
    have any: weights of 0 and 1 are published, where that is 1; with the share of an image's confident pixels as its weight
    the loss is as much smaller as it is with losses per pixel.
    """
    weight_B1HW = weight_BHW[:, None].to(probabilities_BMHW.dtype)
    target_BMHW = maps_BMHW.to(probabilities_BMHW.dtype)
    both_M = (weight_B1HW * probabilities_BMHW * target_BMHW).sum((0, 2, 3))
    sizes_M = (weight_B1HW * (probabilities_BMHW.square() + target_BMHW)).sum((0, 2, 3))
    mean_weight = weight_B1HW.sum() / (weight_B1HW > 0).sum().clamp_min(1)
    return mean_weight * (1 - (2 * both_M + smooth) / (sizes_M + smooth)).mean()


def cross_entropy_loss(logits_NP: Tensor, labels_P: Tensor, weight_P: Tensor,
                       with_gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """Softmax cross-entropy of class ids below N, times a weight per pixel: sum over pixels [1] and its gradient."""
    log_NP = logits_NP.log_softmax(0)
    total = -(log_NP.gather(0, labels_P[None])[0] @ weight_P)
    if not with_gradient:
        return total[None], None
    grad_NP = log_NP.exp_().scatter_add_(0, labels_P[None], torch.full_like(log_NP[:1], -1.0))
    return total[None], grad_NP.mul_(weight_P)

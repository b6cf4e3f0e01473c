"""Losses of one pixel's outputs, with their gradients, and the walk over a batch in strips of rows.

A strip's loss and gradient are computed in closed form, in buffers that the next strip uses again, and only the gradient at
the logits' own size is kept: nothing of label size but the target is ever held, whatever the number of outputs.

On a CPU the passes over [K, P] are what costs. There are as few as the maths allows, each one vectorises in ATen, and the
products with codewords, which are linear in the logits, are made before upsampling (see resize.py), not after.

Shapes: B batch, N classes, K outputs (bits), C maps that are upsampled, X 64-bit words per code, H W pixels of the target,
h w cells of the logits, P pixels of a strip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecocseg import bits as bit_words
from ecocseg.resize import Scratch, Strips, Upsample, row_strips, scratch

COSINE_EPS = 1e-3
"""Least |z| a cosine divides by: below it cos(z, s) = z.s / (eps sqrt(K)), so zero logits have cosine 0 and a finite
gradient towards their target."""
_SAFE_EXPONENT = 60.0  # exp of it, N times, is far from the largest float32
_FACTORS = 96  # numbers in [1/2, 1] whose product is far from the least float32

StripLoss = Callable[[Tensor, int, int, int, Tensor | None], Tensor]
"""f(maps [C, P], image, first row, end row, where to write the loss's gradient [C, P]) -> terms [T] summed over the strip,
the first of them the loss."""


class _StripwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BKhw: Tensor, upsample: Upsample, buffers: Scratch, linear_MK: Tensor | None,
                strip_loss: StripLoss, num_terms: int, with_gradient: bool) -> tuple[Tensor, Tensor]:
        dtype, device = upsample.dtype, logits_BKhw.device
        terms = torch.zeros(num_terms, dtype=dtype, device=device)
        grad_BKhw = torch.empty(logits_BKhw.shape, dtype=dtype, device=device) if with_gradient else None
        strips = Strips(upsample, buffers)
        with torch.autocast(device.type, enabled=False):
            for image, logits_Khw in enumerate(logits_BKhw):
                maps_Chw = _with_products(logits_Khw.to(dtype), linear_MK, buffers)
                total_Chw = None
                if grad_BKhw is not None:
                    total_Chw = grad_BKhw[image] if upsample.identity else buffers(
                        "total", len(maps_Chw), maps_Chw[0].numel()).zero_().view(maps_Chw.shape)
                strips.begin(maps_Chw, total_Chw)
                for first, end in row_strips(*upsample.size, device):
                    values_CP = strips.values(first, end)
                    grad_CP = None if total_Chw is None else strips.gradient_buffer(first, end)
                    terms += strip_loss(values_CP, image, first, end, grad_CP)
                    if grad_CP is not None:
                        strips.add_gradient(grad_CP, first, end)
                strips.end()
                if grad_BKhw is not None and total_Chw is not None and not upsample.identity:
                    grad_BKhw[image] = _without_products(total_Chw, linear_MK)
        ctx.gradient = None if grad_BKhw is None else grad_BKhw.to(logits_BKhw.dtype)
        loss, detail = terms[0].clone(), terms[1:].clone()
        ctx.mark_non_differentiable(detail)
        return loss, detail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grad_loss.to(ctx.gradient.dtype), None, None, None, None, None, None


def _with_products(maps_Khw: Tensor, linear_MK: Tensor | None, buffers: Scratch) -> Tensor:
    """The maps, and behind them the rows of a matrix times them. Shape: [K + M, h, w]."""
    if linear_MK is None:
        return maps_Khw
    num_products, num_maps = linear_MK.shape
    both_CQ = buffers("maps", num_maps + num_products, maps_Khw[0].numel())
    both_CQ[:num_maps].view(maps_Khw.shape).copy_(maps_Khw)
    torch.mm(linear_MK, both_CQ[:num_maps], out=both_CQ[num_maps:])
    return both_CQ.view(-1, *maps_Khw.shape[1:])


def _without_products(grad_Chw: Tensor, linear_MK: Tensor | None) -> Tensor:
    """Gradient of the maps from that of `_with_products`. Shape: [K, h, w]."""
    if linear_MK is None:
        return grad_Chw
    num_maps = linear_MK.shape[1]
    grad_CQ = grad_Chw.flatten(1)
    return grad_CQ[:num_maps].addmm_(linear_MK.t(), grad_CQ[num_maps:]).view(num_maps, *grad_Chw.shape[1:])


def stripwise_loss(logits_BKhw: Tensor, size: tuple[int, int], strip_loss: Callable[[Scratch], StripLoss], num_terms: int,
                   align_corners: bool = False, linear_MK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of a strip loss over a batch whose labels have `size`.

    With `linear_MK` the strip loss gets, where sizes differ, C = K + M maps: the logits and this matrix times them. Products
    are linear and so is resizing; there are fewer cells than pixels, so the products are made of cells.

    Returns the loss (scalar, differentiable) and the other terms ([T - 1], detached).
    """
    upsample = Upsample((logits_BKhw.shape[-2], logits_BKhw.shape[-1]), size, align_corners, logits_BKhw)
    buffers = scratch(upsample.dtype, upsample.device)
    with_gradient = torch.is_grad_enabled() and logits_BKhw.requires_grad
    return _StripwiseLoss.apply(logits_BKhw, upsample, buffers, None if upsample.identity else linear_MK,
                                strip_loss(buffers), num_terms, with_gradient)


@dataclass(frozen=True)
class EcocWeights:
    """What the ECOC loss is made of."""

    bce: float = 1.0
    distance: float = 5.0
    contrast: float = 2.0
    temperature: float = 0.5
    negatives: Literal["codewords", "target_and_negatives"] = "codewords"


@dataclass(frozen=True)
class StripTarget:
    """What the pixels of a strip should be. Labels are class ids below N, also where the weight is 0."""

    labels_P: Tensor
    weight_P: Tensor
    words_XP: Tensor
    are_codewords: bool
    """Every pixel of a weight has its class's codeword, so that the products with codewords say it all."""


def ecoc_loss(maps_CP: Tensor, target: StripTarget, signs_NK: Tensor, weights: EcocWeights, scratch: Scratch,
              grad_CP: Tensor | None) -> Tensor:
    """Bit cross-entropy, pixel-code distance and pixel-code contrast of target bits, times a weight per pixel.

    C is K (logits z) or K + N: then products with the codewords' signs, z.S_n, lie behind them. Returns the sums [4] over
    pixels of loss, bce, distance and contrast, and writes the loss's gradient by the maps. A term of weight 0 is not
    computed and reads 0.

    With s the target's signs, d = sigmoid(z) - 1/2, w the weight, everything that has to do with s is s times one number a
    pixel: of the cross-entropy -w / 2K, of the cosines w f' / (|z| sqrt K). Where s is a codeword that number goes to the
    slope of this codeword's product, and no sign is ever unpacked.
    """
    num_classes, num_bits = signs_NK.shape
    logits_KP = maps_CP[:num_bits]
    product_NP = maps_CP[num_bits:]
    if len(maps_CP) == num_bits:
        product_NP = torch.mm(signs_NK, logits_KP, out=scratch("products", num_classes, logits_KP.shape[1]))
    terms = torch.zeros(4, dtype=logits_KP.dtype, device=logits_KP.device)
    negative_KP = None
    if target.are_codewords:
        dot_P = product_NP.gather(0, target.labels_P[None])[0]
    else:
        negative_KP = bit_words.negative_signs(target.words_XP, scratch("signs", *logits_KP.shape))
        dot_P = _column_sums(bit_words.with_signs(logits_KP, negative_KP, scratch("bits", *logits_KP.shape)))
    grad_KP = None if grad_CP is None else grad_CP[:num_bits]
    sign_slope_P = torch.zeros_like(dot_P)  # of the loss by z.s
    if weights.bce:
        terms[1] = _bit_cross_entropy(logits_KP, dot_P, target.weight_P, scratch, grad_KP)
        if grad_KP is not None:
            grad_KP *= target.weight_P * (weights.bce / num_bits)
        sign_slope_P -= target.weight_P * (weights.bce / (2 * num_bits))
    elif grad_KP is not None:
        grad_KP.zero_()
    slope_NP = scratch("slopes", *product_NP.shape) if grad_CP is None or len(grad_CP) == num_bits else grad_CP[num_bits:]
    if weights.distance or weights.contrast:
        terms[2:], radial_P = _cosine_terms(logits_KP, dot_P, product_NP, target, weights, scratch, slope_NP, sign_slope_P)
        if grad_KP is not None:
            grad_KP.addcmul_(logits_KP, radial_P.expand_as(logits_KP), value=-1)
    else:
        slope_NP.zero_()
    terms[0] = weights.bce * terms[1] + weights.distance * terms[2] + weights.contrast * terms[3]
    if grad_KP is not None:
        if negative_KP is None:
            slope_NP.scatter_add_(0, target.labels_P[None], sign_slope_P[None])
        else:
            grad_KP += bit_words.with_signs(sign_slope_P.expand_as(logits_KP), negative_KP, scratch("bits", *logits_KP.shape))
        if grad_CP is not None and len(grad_CP) == num_bits:
            grad_KP.addmm_(signs_NK.t(), slope_NP)
    return terms


def _column_sums(values_KP: Tensor) -> Tensor:
    """Sum over the first axis, by a product: faster than `sum` on CPU. Shape: [P]."""
    return (values_KP.new_ones(1, len(values_KP)) @ values_KP)[0]


def _bit_cross_entropy(logits_KP: Tensor, dot_P: Tensor, weight_P: Tensor, scratch: Scratch, grad_KP: Tensor | None) -> Tensor:
    """Cross-entropy averaged over bits, times the weight. Writes d = sigmoid(z) - 1/2 to `grad_KP`. Shape: scalar.

    log(1 + exp(-zs)) = (|z| - zs) / 2 - log(|d| + 1/2): exact to rounding for any z. Summed over bits the logarithm is one
    of a product.
    """
    num_bits = len(logits_KP)
    size_KP = scratch("bits", *logits_KP.shape)
    size_P = _column_sums(torch.abs(logits_KP, out=size_KP))
    half_KP = torch.sigmoid(logits_KP, out=size_KP if grad_KP is None else grad_KP).sub_(0.5)
    sure_KP = torch.abs(half_KP, out=size_KP).add_(0.5)
    log_P = torch.stack([part_KP.prod(0).log_() for part_KP in sure_KP.split(_FACTORS)]).sum(0)
    return ((size_P - dot_P).mul_(0.5).sub_(log_P) @ weight_P) / num_bits


def _cosine_terms(logits_KP: Tensor, dot_P: Tensor, product_NP: Tensor, target: StripTarget, weights: EcocWeights,
                  scratch: Scratch, slope_NP: Tensor, sign_slope_P: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [2] of distance and contrast, and the radial part of their gradient [P], which z is multiplied by.

    Cosines are products with sign vectors over |z| sqrt(K). With loss = f(cos_target, cos_1..cos_N), the gradient is
    sum_i f_i (s_i / (|z| sqrt K) - [|z| > eps] cos_i z / |z|^2): writes f_i w / (|z| sqrt K) to `slope_NP`, and adds that of
    the target to `sign_slope_P`.
    """
    norm_P = _column_sums(torch.mul(logits_KP, logits_KP, out=scratch("bits", *logits_KP.shape))).sqrt_()
    inverse_P = 1 / norm_P.clamp_min(COSINE_EPS)
    scale_P = inverse_P / math.sqrt(len(logits_KP))
    weight_scale_P = target.weight_P * scale_P
    target_P = dot_P * scale_P
    terms = torch.zeros(2, dtype=logits_KP.dtype, device=logits_KP.device)
    slope_P = torch.full_like(target_P, -weights.distance)  # of the loss by the target's cosine
    radial_P = torch.zeros_like(target_P)
    if weights.distance:
        terms[0] = (1 - target_P) @ target.weight_P
    if weights.contrast:
        sharpness = 1 / weights.temperature
        torch.mul(product_NP, scale_P * sharpness, out=slope_NP)
        instead = weights.negatives == "target_and_negatives"  # the target stands in for its class's codeword
        if instead:
            slope_NP.scatter_(0, target.labels_P[None], (target_P * sharpness)[None])
        sum_P, log_P = _softmax_parts(slope_NP, sharpness)
        terms[1] = (log_P - target_P * sharpness) @ target.weight_P
        slope_P -= weights.contrast * sharpness
        if instead:
            own_P = slope_NP.gather(0, target.labels_P[None])[0]
            slope_P += own_P * (weights.contrast * sharpness) / sum_P
            slope_NP.scatter_(0, target.labels_P[None], 0.0)
        slope_NP *= weight_scale_P * (weights.contrast * sharpness) / sum_P
        radial_P = _column_sums(torch.mul(product_NP, slope_NP, out=scratch("slopes x products", *slope_NP.shape)))
    else:
        slope_NP.zero_()
    slope_P *= weight_scale_P
    sign_slope_P += slope_P
    radial_P = radial_P.addcmul(slope_P, dot_P).mul_(inverse_P.square()).mul_(norm_P > COSINE_EPS)
    return terms, radial_P


def _softmax_parts(values_NP: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """In place exp(values) but for a factor per pixel; its sum, and log(sum(exp(values))), both [P]. Values are at most
    `largest`."""
    if largest <= _SAFE_EXPONENT:
        sum_P = _column_sums(values_NP.exp_())
        return sum_P, sum_P.log()
    top_P = values_NP.amax(0)
    sum_P = _column_sums(values_NP.sub_(top_P).exp_())
    return sum_P, sum_P.log().add_(top_P)


def cross_entropy_loss(logits_NP: Tensor, labels_P: Tensor, weight_P: Tensor, scratch: Scratch,
                       grad_NP: Tensor | None = None) -> Tensor:
    """Softmax cross-entropy of class ids below N, times a weight per pixel: sum over pixels [1]; writes its gradient."""
    top_P = logits_NP.amax(0)
    exp_NP = torch.sub(logits_NP, top_P, out=scratch("exp", *logits_NP.shape) if grad_NP is None else grad_NP).exp_()
    sum_P = _column_sums(exp_NP)
    total = (sum_P.log().add_(top_P) - logits_NP.gather(0, labels_P[None])[0]) @ weight_P
    if grad_NP is not None:
        grad_NP.mul_(weight_P / sum_P).scatter_add_(0, labels_P[None], weight_P.neg()[None])
    return total[None]


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

"""The kernels as torch operators, so that torch.compile and activation checkpointing go through them like any other.

The losses return their gradient beside their sums: it is made in the same pass, and backward multiplies it by a number.

Shapes: B batch, N classes, K outputs, X words, h w cells of the logits, H W pixels of the labels.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from ecocseg.kernels import count, decode, loss
from ecocseg.kernels.geometry import FLAT, TILE, axis, class_pieces, output_pieces, window

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COSINE_EPS = 1e-3  # as in losses.py
WINDOW_BYTES = 64 << 20  # of tiles' windows held at a time: losses of more images are made in several launches


class Launch:
    """What all kernels are given of the logits and the size they are resized to."""

    def __init__(self, logits_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> None:
        source = (logits_BKhw.shape[2], logits_BKhw.shape[3])
        self.identity = source == size
        if self.identity and logits_BKhw.stride(2) != source[1] * logits_BKhw.stride(3):
            logits_BKhw = logits_BKhw.contiguous()  # pixels of an image must be evenly spaced
        self.logits, (self.height, self.width) = logits_BKhw, size
        self.device, self.batch, self.outputs = logits_BKhw.device, len(logits_BKhw), logits_BKhw.shape[1]
        self.rows, self.columns = (axis(s, S, align_corners, self.device) for s, S in zip(source, size, strict=True))
        self.window = window(source, size, align_corners)
        flat_tiles = -(-self.height * self.width // FLAT)
        self.tiles = flat_tiles if self.identity else self.rows.tiles * self.columns.tiles
        self.grid = (self.tiles, self.batch)
        piece, pieces = output_pieces(self.outputs)
        self.options: dict[str, Any] = {
            "TILE": TILE, "FLAT": FLAT, "CY": self.window[0], "CX": self.window[1], "IDENTITY": self.identity,
            "K_FAST": logits_BKhw.stride(1) == 1 and self.outputs > 1, "SIZE": piece, "PIECES": pieces,
            "FAST": not INTERPRETED, "num_warps": 4, "enable_fp_fusion": True}

    def source(self, images: slice | None = None) -> tuple[Tensor, ...]:
        logits = self.logits if images is None else self.logits[images]
        return logits, self.rows.lower, self.rows.part, self.columns.lower, self.columns.part

    @property
    def sizes(self) -> tuple[int, ...]:
        return *self.logits.shape[2:], self.height, self.width, self.columns.tiles, self.outputs

    def classes(self, number: int) -> dict[str, Any]:
        """Options of a kernel that also works on classes."""
        size, pieces = class_pieces(number)
        return self.options | {"CLASS_SIZE": size, "CLASS_PIECES": pieces}

    def groups(self, with_windows: bool) -> list[slice]:
        """Images that are taken together, so that their windows stay small."""
        per_image = 4 * self.tiles * self.window[0] * self.window[1] * self.padded
        number = max(1, WINDOW_BYTES // per_image) if with_windows else self.batch
        return [slice(first, min(first + number, self.batch)) for first in range(0, self.batch, number)]

    @property
    def padded(self) -> int:
        return self.options["SIZE"] * self.options["PIECES"]

    def windows(self, images: slice, gradient_BKhw: Tensor) -> Tensor:
        """Where the tiles of these images write: the gradient itself at equal sizes."""
        if self.identity or not gradient_BKhw.numel():
            return gradient_BKhw
        shape = (images.stop - images.start, self.tiles, self.window[0] * self.window[1], self.padded)
        return gradient_BKhw.new_empty(shape, dtype=torch.float32)

    def gather(self, windows: Tensor, gradient_BKhw: Tensor) -> None:
        """Sum into the gradient what the tiles wrote."""
        if self.identity or not gradient_BKhw.numel():
            return
        height, width = self.logits.shape[2:]
        columns, size = 32, min(64, triton.next_power_of_2(self.outputs))
        grid = (height * -(-width // columns), len(windows), -(-self.outputs // size))
        _run(loss.gather_kernel, grid, self.device,
             windows, gradient_BKhw, self.rows.lower, self.columns.lower, self.rows.first, self.rows.count,
             self.columns.first, self.columns.count, height, width, self.tiles, self.columns.tiles, self.outputs,
             *gradient_BKhw.stride(), self.rows.most, self.columns.most, TILE=TILE, CY=self.window[0], CX=self.window[1],
             COLUMNS=columns, SIZE=size, PADDED=self.padded, num_warps=4, enable_fp_fusion=True)


def _run(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    if INTERPRETED:
        options = {name: value for name, value in options.items() if name not in ("num_warps", "enable_fp_fusion")}
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **options)


def _like(logits_BKhw: Tensor) -> Tensor:
    """Room for a gradient, in the logits' layout: float16 would lose small ones before they are scaled."""
    dtype = torch.float32 if logits_BKhw.dtype == torch.float16 else logits_BKhw.dtype
    return torch.empty_like(logits_BKhw, dtype=dtype)


# ---- pseudo-labels --------------------------------------------------------------------------------------------------


@custom_op("ecocseg::ecoc_pseudo_label", mutates_args=())
def ecoc_pseudo_label(logits_BKhw: Tensor, height: int, width: int, signs_NK: Tensor, zeros_N: Tensor, words_XN: Tensor,
                      threshold: float, limit: int, form: str, align_corners: bool
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Labels [B, H, W], words [B, X, H, W], confidence and reliable share [B, H, W]; corrected and differing bits [2]."""
    launch = Launch(logits_BKhw, (height, width), align_corners)
    labels, words, confidence, reliable, _ = _pseudo_outputs(logits_BKhw, height, width, len(words_XN))
    counts = torch.empty((launch.batch, launch.tiles, 2), dtype=torch.int32, device=launch.device)
    _run(decode.ecoc_pseudo_label_kernel, launch.grid, launch.device,
         *launch.source(), signs_NK, zeros_N, words_XN, labels, words, confidence, reliable, counts, *launch.sizes,
         words_XN.shape[1], *launch.logits.stride(), threshold, limit, WORDS=len(words_XN), FORM=form,
         **launch.classes(words_XN.shape[1]))
    return labels, words, confidence, reliable, counts.sum((0, 1), dtype=torch.int64)


def _pseudo_outputs(logits_BKhw: Tensor, height: int, width: int, words: int) -> tuple[Tensor, ...]:
    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return logits_BKhw.new_empty(shape, dtype=dtype)

    size = (logits_BKhw.shape[0], height, width)
    return (empty(*size, dtype=torch.int64), empty(size[0], words, height, width, dtype=torch.int64),
            empty(*size, dtype=torch.float32), empty(*size, dtype=torch.float32), empty(2, dtype=torch.int64))


@ecoc_pseudo_label.register_fake
def _(logits_BKhw: Tensor, height: int, width: int, signs_NK: Tensor, zeros_N: Tensor, words_XN: Tensor, *_: Any) -> Any:
    return _pseudo_outputs(logits_BKhw, height, width, words_XN.shape[0])


@custom_op("ecocseg::one_hot_pseudo_label", mutates_args=())
def one_hot_pseudo_label(logits_BKhw: Tensor, height: int, width: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Labels and confidence [B, H, W]."""
    launch = Launch(logits_BKhw, (height, width), align_corners)
    labels, _, confidence, *_ = _pseudo_outputs(logits_BKhw, height, width, 0)
    _run(decode.one_hot_pseudo_label_kernel, launch.grid, launch.device, *launch.source(), labels, confidence, *launch.sizes,
         *launch.logits.stride(), **launch.options)
    return labels, confidence


@one_hot_pseudo_label.register_fake
def _(logits_BKhw: Tensor, height: int, width: int, align_corners: bool) -> Any:
    labels, _, confidence, *_ = _pseudo_outputs(logits_BKhw, height, width, 0)
    return labels, confidence


# ---- evaluation -----------------------------------------------------------------------------------------------------


@custom_op("ecocseg::ecoc_count", mutates_args=())
def ecoc_count(logits_BKhw: Tensor, labels_BHW: Tensor, signs_NK: Tensor, zeros_N: Tensor, words_XN: Tensor,
               align_corners: bool) -> tuple[Tensor, Tensor]:
    """Pixels of each true and predicted class int64 [N, N]; bits by confidence int64 [15, 3], as in evaluate.py."""
    launch = Launch(logits_BKhw, (labels_BHW.shape[1], labels_BHW.shape[2]), align_corners)
    confusion, bins = _count_outputs(launch, words_XN.shape[1])
    _run(count.ecoc_count_kernel, launch.grid, launch.device,
         *launch.source(), signs_NK, zeros_N, words_XN, labels_BHW.contiguous(), confusion, bins, *launch.sizes,
         words_XN.shape[1], *launch.logits.stride(), WORDS=len(words_XN), **launch.classes(words_XN.shape[1]))
    return confusion, bins.sum((0, 1), dtype=torch.int64)


@custom_op("ecocseg::one_hot_count", mutates_args=())
def one_hot_count(logits_BKhw: Tensor, labels_BHW: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The same, with one value per pixel."""
    launch = Launch(logits_BKhw, (labels_BHW.shape[1], labels_BHW.shape[2]), align_corners)
    confusion, bins = _count_outputs(launch, launch.outputs)
    _run(count.one_hot_count_kernel, launch.grid, launch.device, *launch.source(), labels_BHW.contiguous(), confusion, bins,
         *launch.sizes, *launch.logits.stride(), **launch.options)
    return confusion, bins.sum((0, 1), dtype=torch.int64)


def _count_outputs(launch: Launch, num_classes: int) -> tuple[Tensor, Tensor]:
    return (torch.zeros((num_classes, num_classes), dtype=torch.int64, device=launch.device),
            torch.empty((launch.batch, launch.tiles, 15, 3), dtype=torch.int32, device=launch.device))


@ecoc_count.register_fake
def _(logits_BKhw: Tensor, labels_BHW: Tensor, signs_NK: Tensor, zeros_N: Tensor, words_XN: Tensor, _: bool) -> Any:
    number = words_XN.shape[1]
    return logits_BKhw.new_empty((number, number), dtype=torch.int64), logits_BKhw.new_empty((15, 3), dtype=torch.int64)


@one_hot_count.register_fake
def _(logits_BKhw: Tensor, labels_BHW: Tensor, align_corners: bool) -> Any:
    number = logits_BKhw.shape[1]
    return logits_BKhw.new_empty((number, number), dtype=torch.int64), logits_BKhw.new_empty((15, 3), dtype=torch.int64)


# ---- losses ---------------------------------------------------------------------------------------------------------


@custom_op("ecocseg::ecoc_loss", mutates_args=())
def ecoc_loss(logits_BKhw: Tensor, signs_NK: Tensor, num_classes: int, labels_BHW: Tensor, words_BXHW: Tensor,
              weight_BHW: Tensor, divisor: Tensor, bce: float, distance: float, contrast: float, temperature: float,
              stand_in: bool, align_corners: bool, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Sums over pixels of loss, bce, distance and contrast [4], and the gradient of the first (empty if not wanted)."""
    launch = Launch(logits_BKhw, (labels_BHW.shape[1], labels_BHW.shape[2]), align_corners)
    terms = torch.empty((launch.batch, launch.tiles, 4), dtype=torch.float32, device=launch.device)
    gradient_BKhw = _like(launch.logits) if with_gradient else logits_BKhw.new_empty(0)
    options = launch.classes(num_classes) | {
        "WORDS": words_BXHW.shape[1], "BCE": bce != 0, "DISTANCE": distance != 0, "CONTRAST": contrast != 0,
        "STAND_IN": stand_in, "GRADIENT": with_gradient}
    for images in launch.groups(with_gradient and not launch.identity):
        written = launch.windows(images, gradient_BKhw)
        _run(loss.ecoc_loss_kernel, (launch.tiles, images.stop - images.start), launch.device,
             *launch.source(images), signs_NK, labels_BHW[images], words_BXHW[images], weight_BHW[images], divisor, written,
             terms[images], *launch.sizes, num_classes, *launch.logits.stride(), *labels_BHW.stride(), *words_BXHW.stride(),
             *weight_BHW.stride(), *_flat_stride(written), bce, distance, contrast, temperature, launch.outputs**0.5,
             COSINE_EPS, **options)
        launch.gather(written, gradient_BKhw[images])
    return terms.sum((0, 1)), _as(gradient_BKhw, logits_BKhw)


@custom_op("ecocseg::cross_entropy", mutates_args=())
def cross_entropy(logits_BKhw: Tensor, labels_BHW: Tensor, weight_BHW: Tensor, divisor: Tensor, align_corners: bool,
                  with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Sum over pixels of the softmax cross-entropy [1], and its gradient (empty if not wanted)."""
    launch = Launch(logits_BKhw, (labels_BHW.shape[1], labels_BHW.shape[2]), align_corners)
    terms = torch.empty((launch.batch, launch.tiles, 1), dtype=torch.float32, device=launch.device)
    gradient_BKhw = _like(launch.logits) if with_gradient else logits_BKhw.new_empty(0)
    for images in launch.groups(with_gradient and not launch.identity):
        written = launch.windows(images, gradient_BKhw)
        _run(loss.cross_entropy_kernel, (launch.tiles, images.stop - images.start), launch.device,
             *launch.source(images), labels_BHW[images], weight_BHW[images], divisor, written, terms[images], *launch.sizes,
             *launch.logits.stride(), *labels_BHW.stride(), *weight_BHW.stride(), *_flat_stride(written),
             GRADIENT=with_gradient, **launch.options)
        launch.gather(written, gradient_BKhw[images])
    return terms.sum((0, 1)), _as(gradient_BKhw, logits_BKhw)


def _as(gradient_BKhw: Tensor, logits_BKhw: Tensor) -> Tensor:
    """The gradient in the layout that was promised; another only where the logits had to be copied."""
    if not gradient_BKhw.numel() or gradient_BKhw.stride() == (promised := _like(logits_BKhw)).stride():
        return gradient_BKhw
    return promised.copy_(gradient_BKhw)


def _flat_stride(written: Tensor) -> tuple[int, int, int]:
    """From image to image, output to output and pixel to pixel of a gradient at equal sizes; windows have a layout of their
    own."""
    return (written.stride(0), written.stride(1), written.stride(3)) if written.dim() == 4 else (0, 0, 0)


@ecoc_loss.register_fake
def _(logits_BKhw: Tensor, *arguments: Any) -> Any:
    return logits_BKhw.new_empty(4, dtype=torch.float32), _fake_gradient(logits_BKhw, arguments[-1])


@cross_entropy.register_fake
def _(logits_BKhw: Tensor, *arguments: Any) -> Any:
    return logits_BKhw.new_empty(1, dtype=torch.float32), _fake_gradient(logits_BKhw, arguments[-1])


def _fake_gradient(logits_BKhw: Tensor, wanted: bool) -> Tensor:
    return _like(logits_BKhw) if wanted else logits_BKhw.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.number, ctx.dtype = len(inputs), inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_terms: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """The first of the terms is the loss; the others are for reading only."""
    gradient_BKhw, = ctx.saved_tensors
    if grad_terms is None or not gradient_BKhw.numel():
        return (None,) * ctx.number
    scaled_BKhw = (gradient_BKhw * grad_terms[0].to(gradient_BKhw.dtype)).to(ctx.dtype)
    return scaled_BKhw, *(None,) * (ctx.number - 1)


ecoc_loss.register_autograd(_backward, setup_context=_save)
cross_entropy.register_autograd(_backward, setup_context=_save)

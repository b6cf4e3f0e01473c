"""Pseudo-labels by torch, over a batch in strips of rows: the fallback and the reference of kernels/ and cpu/.

Shapes: B batch, N classes, K outputs (bits), X 64-bit words per code, H W pixels, h w cells of the logits, P pixels of a
strip of rows, U pixels of strips that are not sure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ecocseg import bits as bit_words
from ecocseg.resize import Strips, Upsample, row_strips, scratch
from ecocseg.target import Target


@dataclass(frozen=True)
class Tables:
    """The codebook on a device."""

    signs_NK: Tensor
    zeros_N1: Tensor
    """Number of zero bits of each codeword."""
    words_XN: Tensor


def one_hot_pseudo_label(logits_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> Target:
    """`OneHotCoding.pseudo_label`: the likeliest class of the upsampled logits, and its softmax probability."""
    target, upsample = _empty(logits_BKhw, size, align_corners)
    assert target.confidence is not None
    buffers = scratch(upsample.dtype, upsample.device)
    for image, first, end, logits_KP in strips(logits_BKhw, upsample):
        best_P, label_P = bit_words.first_argmax(logits_KP)
        exp_KP = torch.sub(logits_KP, best_P, out=buffers("exp", *logits_KP.shape)).exp_()
        target.labels[image, first:end].view(-1).copy_(label_P)
        target.confidence[image, first:end].view(-1).copy_(exp_KP.sum(0).reciprocal_())
    return target


def ecoc_pseudo_label(logits_BKhw: Tensor, size: tuple[int, int], tables: Tables, *, reliability: float, limit: int,
                      label_form: str, align_corners: bool) -> Target:
    """`EcocCoding.pseudo_label`: the nearest codeword's class, bits mined among at most `limit` candidates, mean confidence."""
    mining, num_bits = _Mining(tables, reliability, limit, label_form), logits_BKhw.shape[1]
    target, upsample = _empty(logits_BKhw, size, align_corners)
    device = logits_BKhw.device
    shape = (len(logits_BKhw), bit_words.num_words(num_bits), *upsample.size)
    target.bits = torch.empty(shape, dtype=torch.int64, device=device)
    target.reliable = torch.empty_like(target.weight)
    counts_2 = torch.zeros(2, dtype=torch.int64, device=device)
    doubts: list[_Doubt] = []
    for image, first, end, logits_KP in strips(logits_BKhw, upsample):
        doubts.append(mining.guess(logits_KP, _Strip(target, image, slice(first, end))))
        if end == upsample.size[0] or sum(len(doubt.pixel_U) for doubt in doubts) >= logits_KP.shape[1]:
            counts_2 += mining.settle(doubts)
            doubts = []
    corrected, differing = counts_2 / (target.labels.numel() * num_bits)
    target.metrics = {"reliable_bits": target.reliable.mean(), "corrected_bits": corrected, "differing_bits": differing}
    return target


@dataclass(frozen=True)
class _Mining:
    """How bits are told from codewords and from guesses, `EcocCoding`'s options."""

    tables: Tables
    reliability: float
    limit: int
    label_form: str

    def guess(self, logits_KP: Tensor, strip: _Strip) -> _Doubt:
        """Pseudo-labels of a strip as if its pixels were sure. Returns those that are not.

        Where the nearest codeword is nearer than 1/2, each bit is nearer than that: every sign agrees with it, and the
        confidence is 1 - distance / K. Of such a pixel, if it is settled, there is no more to find out.
        """
        tables, num_bits, buffers = self.tables, len(logits_KP), scratch(logits_KP.dtype, logits_KP.device)
        p_KP = torch.sigmoid(logits_KP, out=buffers("probabilities", *logits_KP.shape))
        scores_NP = buffers("scores", len(tables.signs_NK), p_KP.shape[1])
        torch.addmm(tables.zeros_N1, tables.signs_NK, p_KP, out=scores_NP)
        best_P, labels_P = bit_words.first_argmax(scores_NP)
        distance_P = num_bits - best_P
        confidence_P = 1 - distance_P / num_bits
        easy_P = distance_P < 0.5
        if self.label_form == "hybrid":
            easy_P &= confidence_P > self.reliability
        strip.fill(labels=labels_P, confidence=confidence_P, bits=tables.words_XN.index_select(1, labels_P),
                   reliable=torch.full_like(best_P, self.label_form != "bit"))
        pixel_U = easy_P.logical_not_().nonzero().squeeze(1)
        return _Doubt(strip, pixel_U, p_KP.index_select(1, pixel_U), scores_NP.index_select(1, pixel_U), labels_P[pixel_U])

    def settle(self, doubts: list[_Doubt]) -> Tensor:
        """Confidence and bits of pixels that are not sure, those of several strips together: mining is many small steps.
        Returns the numbers of bits [2] that were corrected, and that differed from the codeword's (the paper's Fig. 4a)."""
        labels_U = torch.cat([doubt.labels_U for doubt in doubts])
        half_KU = torch.cat([doubt.p_KU for doubt in doubts], 1).sub_(0.5)
        scores_NU = torch.cat([doubt.scores_NU for doubt in doubts], 1)
        num_bits = len(half_KU)
        bitwise_XU = bit_words.pack(torch.ge(half_KU, 0, out=torch.empty_like(half_KU)))
        q_KU = half_KU.abs_().add_(0.5)  # max(p, 1 - p)
        confidence_U = q_KU.sum(0) / num_bits
        mask_XU = self._reliable_words(q_KU, scores_NU, labels_U, confidence_U)
        differ_XU = self.tables.words_XN.index_select(1, labels_U) ^ bitwise_XU
        changed_XU = differ_XU & mask_XU
        reliable_U = bit_words.popcount(mask_XU).sum(0).to(q_KU.dtype) / num_bits
        words_XU = bitwise_XU ^ changed_XU
        done = 0
        for doubt in doubts:
            part = slice(done, done + len(doubt.pixel_U))
            doubt.strip.correct(doubt.pixel_U, confidence=confidence_U[part], reliable=reliable_U[part], bits=words_XU[:, part])
            done = part.stop
        return torch.stack([bit_words.popcount(ones_XU).sum() for ones_XU in (changed_XU, differ_XU)])

    def _reliable_words(self, q_KP: Tensor, scores_NP: Tensor, labels_P: Tensor, confidence_P: Tensor) -> Tensor:
        """Bits taken from the codeword, packed. Overwrites `q_KP`. Shape: [X, P]."""
        if self.label_form == "hybrid":
            settled_P = confidence_P > self.reliability
            return bit_words.reliable_words(q_KP.sub_(self.reliability), scores_NP, labels_P, settled_P,
                                            self.tables.words_XN, self.limit)
        ones_X1 = bit_words.all_ones(len(q_KP), q_KP.device)
        return (ones_X1 if self.label_form == "code" else torch.zeros_like(ones_X1)).expand(-1, q_KP.shape[1])


@dataclass(frozen=True)
class _Strip:
    """Rows of one image of a pseudo-label, to be filled in."""

    target: Target
    image: int
    rows: slice

    def flat(self, name: str) -> Tensor:
        """A field's pixels in a row, in place: [P], of bits [X, P]."""
        return getattr(self.target, name)[self.image, ..., self.rows, :].flatten(-2)

    def fill(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.flat(name).copy_(value)

    def correct(self, pixel_U: Tensor, **values: Tensor) -> None:
        for name, value in values.items():
            self.flat(name)[..., pixel_U] = value


@dataclass(frozen=True)
class _Doubt:
    """Pixels of a strip that are not sure: their places, probabilities, scores and classes."""

    strip: _Strip
    pixel_U: Tensor
    p_KU: Tensor
    scores_NU: Tensor
    labels_U: Tensor


def strips(logits_BKhw: Tensor, upsample: Upsample) -> Iterator[tuple[int, int, int, Tensor]]:
    """Image, first row, end row, and these rows of the upsampled logits [K, P], strip by strip."""
    strips = Strips(upsample, scratch(upsample.dtype, upsample.device))
    for image, logits_Khw in enumerate(logits_BKhw):
        strips.begin(logits_Khw)
        for first, end in row_strips(*upsample.size, upsample.device):
            with torch.autocast(upsample.device.type, enabled=False):
                yield image, first, end, strips.values(first, end)


def _empty(logits_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> tuple[Target, Upsample]:
    """A pseudo-label target to be filled in, and the resizing to its size."""
    upsample = Upsample((logits_BKhw.shape[-2], logits_BKhw.shape[-1]), size, align_corners, logits_BKhw)
    shape, device = (len(logits_BKhw), *size), logits_BKhw.device
    target = Target(labels=torch.empty(shape, dtype=torch.int64, device=device),
                    weight=torch.ones(shape, dtype=upsample.dtype, device=device),
                    confidence=torch.empty(shape, dtype=upsample.dtype, device=device),
                    is_true=torch.zeros(shape, dtype=torch.bool, device=device))
    return target, upsample

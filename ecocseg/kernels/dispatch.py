"""What codings and evaluation call: the operators, with a coding's options and a Target's fields.

Shapes: B batch, N classes, K outputs, X words, h w cells of the logits, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecocseg import bits as bit_words
from ecocseg.kernels import geometry
from ecocseg.target import Target

if TYPE_CHECKING:
    from ecocseg.losses import EcocWeights


@dataclass(frozen=True)
class Tables:
    """A codebook as kernels read it."""

    signs_NK: Tensor
    """+1 and -1, padded with 0 to whole pieces of classes and bits."""
    zeros_N: Tensor
    """Number of zero bits of each codeword."""
    words_XN: Tensor


def tables(codes_NK: Tensor, device: torch.device) -> Tables:
    num_classes, num_bits = codes_NK.shape
    (rows, row_pieces), (columns, column_pieces) = geometry.class_pieces(num_classes), geometry.output_pieces(num_bits)
    signs_NK = torch.zeros(rows * row_pieces, columns * column_pieces)
    signs_NK[:num_classes, :num_bits] = codes_NK.float() * 2 - 1
    return Tables(signs_NK.to(device), (~codes_NK).sum(1).float().to(device), bit_words.pack(codes_NK.t()).to(device))


@torch.no_grad()
def ecoc_pseudo_label(logits_BKhw: Tensor, size: tuple[int, int], tables: Tables, *, reliability: float,
                      max_candidates: int | None, label_form: str, align_corners: bool) -> Target:
    from ecocseg.kernels import operators

    num_classes, num_bits = tables.words_XN.shape[1], logits_BKhw.shape[1]
    limit = num_classes if max_candidates is None else min(max_candidates, num_classes)
    labels, words, confidence, reliable, counts_2 = operators.ecoc_pseudo_label(
        logits_BKhw, *size, tables.signs_NK, tables.zeros_N, tables.words_XN, reliability, limit, label_form, align_corners)
    corrected, differing = counts_2 / (labels.numel() * num_bits)
    metrics = {"reliable_bits": reliable.mean(), "corrected_bits": corrected, "differing_bits": differing}
    return Target(labels=labels, weight=torch.ones_like(confidence), is_true=torch.zeros_like(labels, dtype=torch.bool),
                  bits=words, confidence=confidence, reliable=reliable, metrics=metrics)


@torch.no_grad()
def one_hot_pseudo_label(logits_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> Target:
    from ecocseg.kernels import operators

    labels, confidence = operators.one_hot_pseudo_label(logits_BKhw, *size, align_corners)
    return Target(labels=labels, weight=torch.ones_like(confidence), is_true=torch.zeros_like(labels, dtype=torch.bool),
                  confidence=confidence)


def ecoc_loss(logits_BKhw: Tensor, target: Target, divisor: float | Tensor, tables: Tables, weights: EcocWeights,
              align_corners: bool) -> dict[str, Tensor]:
    from ecocseg.kernels import operators

    assert target.bits is not None
    terms_4, _ = operators.ecoc_loss(
        logits_BKhw, tables.signs_NK, tables.words_XN.shape[1], target.labels, target.bits, target.weight,
        _on_device(divisor, logits_BKhw), weights.bce, weights.distance, weights.contrast, weights.temperature,
        weights.negatives == "target_and_negatives", align_corners, _wanted(logits_BKhw))
    bce, distance, contrast = terms_4[1:].detach().unbind()
    return {"loss": terms_4[0], "bce": bce, "distance": distance, "contrast": contrast}


def cross_entropy(logits_BKhw: Tensor, target: Target, divisor: float | Tensor, align_corners: bool) -> dict[str, Tensor]:
    from ecocseg.kernels import operators

    terms_1, _ = operators.cross_entropy(logits_BKhw, target.labels, target.weight, _on_device(divisor, logits_BKhw),
                                         align_corners, _wanted(logits_BKhw))
    return {"loss": terms_1[0]}


@torch.no_grad()
def counts(logits_BKhw: Tensor, labels_BHW: Tensor, tables: Tables | None, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Confusion [N, N] and calibration [15, 3], as in evaluate.py; `tables` is None for one-hot."""
    from ecocseg.kernels import operators

    if tables is None:
        return operators.one_hot_count(logits_BKhw, labels_BHW, align_corners)
    return operators.ecoc_count(logits_BKhw, labels_BHW, tables.signs_NK, tables.zeros_N, tables.words_XN, align_corners)


def _wanted(logits_BKhw: Tensor) -> bool:
    return torch.is_grad_enabled() and logits_BKhw.requires_grad


def _on_device(divisor: float | Tensor, logits_BKhw: Tensor) -> Tensor:
    """A divisor as the one number that a kernel reads."""
    if isinstance(divisor, Tensor):
        return divisor.detach().to(logits_BKhw.device, torch.float32).reshape(1)
    return torch.full((1,), float(divisor), device=logits_BKhw.device)

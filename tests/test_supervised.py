"""Labelled images by hard pixels and by Dice, and a labelled pool as ST++ learns it, against literal readings in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import reference
import torch
from reference import PixelStudent
from torch import Tensor

from ecocseg.codebook import max_min
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.config import MethodConfig
from ecocseg.data.pipeline import Batch
from ecocseg.evaluate import Normalize
from ecocseg.methods import METHODS, StepInput

N, K, SIDE = 5, 11, 8  # more bits than a plane of 8 holds
CODINGS = ("one_hot", "ecoc")
IDENTITY = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def make_batch(seed: int, pseudo: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, N, (3, SIDE, SIDE), generator=generator)
    labels[0, :2] = labels[2, :, 2:] = 255
    valid = torch.ones(3, SIDE, SIDE, dtype=torch.bool)
    valid[1, -3:] = False
    changes = torch.randint(0, 256, (3, 2, SIDE, SIDE), generator=generator).to(torch.uint8)
    changes[:, 1] &= 0b111  # bits 8, 9 and 10
    return Batch(torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8), labels, valid,
                 torch.arange(20, 23), ["a", "b", "c"], changes=changes if pseudo else None,
                 weight=torch.tensor([0.25, 1.0, 0.625]) if pseudo else None)


def run(kind: str, pool: bool = False, **options: Any) -> tuple[list[list[int]] | None, PixelStudent, StepInput, list[float]]:
    """Codewords, student, step and the losses of its parts."""
    book = max_min(N, K, 0)
    coding: Any = OneHotCoding(N) if kind == "one_hot" else EcocCoding(book)
    student = PixelStudent(coding.num_outputs)
    settings = {"kind": "supervised", "pseudo_labels": pool, "jitter_probability": 0.0, "blur_probability": 0.0, **options}
    method = METHODS["supervised"](MethodConfig.model_validate(settings), coding, IDENTITY)
    given = StepInput(3, 5, make_batch(1), make_batch(2, kind == "ecoc") if pool else None, student, None, nullcontext)
    if pool and kind == "one_hot":
        given.unlabeled = Batch(**{**vars(given.unlabeled), "weight": make_batch(2, True).weight})
    losses = [part().item() for part in method.parts(given)]
    return (book.matrix.tolist() if kind == "ecoc" else None), student, given, losses


def literal(codes: Any, logits: Tensor, labels: Tensor, bits: Tensor, weight: Tensor, average: str, dice: bool) -> float:
    number = labels.numel() if average == "all" else int((labels != 255).sum())
    mean = reference.sum_of_losses(logits, labels, bits, weight, codes) / number
    return (mean + reference.dice(logits, labels, bits, weight, codes)) / 2 if dice else mean


@pytest.mark.parametrize("kind", CODINGS)
@pytest.mark.parametrize(("average", "dice"), [("all", False), ("valid", True)])
def test_a_labeled_step_equals_a_literal_one(kind: str, average: str, dice: bool) -> None:
    codes, student, given, (loss,) = run(kind, average=average, dice=dice)
    labels = given.labeled.labels
    want = literal(codes, student.logits(student.seen[0]), labels, reference.true_bits(labels, codes),
                   torch.ones(labels.shape), average, dice)
    assert torch.equal(student.seen[0], given.labeled.image.float() / 255)
    assert loss == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("kind", CODINGS)
@pytest.mark.parametrize(("threshold", "least", "dice"), [(0.5, 5, True), (0.05, 20, False), (0.9, 200, False)])
def test_a_step_of_hard_pixels_equals_a_literal_one(kind: str, threshold: float, least: int, dice: bool) -> None:
    """Mean over images of the mean over each one's hard pixels; there may be fewer than `least` with a label."""
    codes, student, given, (loss,) = run(kind, ohem_threshold=threshold, ohem_min_pixels=least, dice=dice)
    labels, logits = given.labeled.labels, student.logits(student.seen[0])
    bits, weight = reference.true_bits(labels, codes), reference.hard_weight(logits, labels, codes, threshold, least)
    weight = weight.float()  # as weights are kept
    kept, known = (weight > 0).sum((1, 2)), (labels != 255).sum((1, 2))
    assert (kept < known).any() or least == 200  # else it would test nothing
    want = reference.sum_of_losses(logits, labels, bits, weight, codes) / len(labels)
    if dice:
        want = (want + reference.dice(logits, labels, bits, weight, codes)) / 2
    assert loss == pytest.approx(want, rel=1e-8)
    assert weight.sum().item() == pytest.approx(3)


@pytest.mark.parametrize("kind", CODINGS)
@pytest.mark.parametrize(("average", "dice", "cutout"), [("all", False, 1.0), ("valid", True, 1.0), ("valid", False, 0.0)])
def test_a_step_of_stored_labels_equals_a_literal_one(kind: str, average: str, dice: bool, cutout: float) -> None:
    """Beside true labels, half of each; the pool's by the bits that were stored, each image's weight, none in boxes of noise
    and on padding."""
    codes, student, given, losses = run(kind, True, average=average, dice=dice, cutout_probability=cutout, mixed_weight=0.8)
    true, pool, (first, view) = given.labeled.labels, given.unlabeled, student.seen
    want = literal(codes, student.logits(first), true, reference.true_bits(true, codes), torch.ones(true.shape), average, dice)
    assert losses[0] == pytest.approx(want / 2, rel=1e-8)

    box = (view != pool.image.float() / 255).any(1)
    for mask in box:
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None]) and mask.float().mean() <= 0.4
    assert box.any() == (cutout > 0) and view.min() >= 0 and view.max() <= 1
    bits = reference.true_bits(pool.labels, codes)
    for k in range(K if codes else 0):
        bits[:, k] ^= (pool.changes[:, k // 8] >> (k % 8) & 1).bool()
    labels = pool.labels.masked_fill(box | ~pool.valid, 255)
    weight = pool.weight.double()[:, None, None].expand(labels.shape)
    want = literal(codes, student.logits(view), labels, bits, weight, average, dice)
    assert losses[1] == pytest.approx(0.8 * want / 2, rel=1e-8)

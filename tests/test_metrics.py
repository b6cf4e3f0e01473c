"""Counts and the figures made of them: against loops over pixels, and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ecocseg import codebook, metrics
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.errors import InputError
from ecocseg.metrics import EvalResult, calibration_counts, confusion

N, K = 5, 12


def ecoc() -> EcocCoding:
    return EcocCoding(codebook.max_min(N, K, seed=0))


def test_confusion_equals_loops_over_pixels():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, N, (2, 7, 5), generator=generator)
    labels[0, :2] = 255
    pred = torch.randint(0, N, (2, 7, 5), generator=generator)
    expected = torch.zeros(N, N, dtype=torch.int64)
    for t, p in zip(labels.flatten().tolist(), pred.flatten().tolist(), strict=True):
        if t != 255:
            expected[t, p] += 1
    result = confusion(pred, labels.to(torch.uint8), N)
    assert result.dtype == torch.int64
    assert torch.equal(result, expected)
    assert confusion(pred, torch.full_like(labels, 255), N).sum() == 0


@pytest.mark.parametrize("wrong", [N, 200])
def test_confusion_names_an_unknown_label(wrong):
    labels = torch.tensor([[[0, wrong, 255]]])
    with pytest.raises(InputError, match=f"id {wrong}.*{N} classes"):
        confusion(torch.zeros(1, 1, 3, dtype=torch.int64), labels, N)


def test_iou_by_hand_with_absent_classes_and_scored_classes():
    # class 0: 6 right, 2 taken for 1; class 1: 1 right, 1 taken for 0; class 2: only predicted; class 3: nowhere
    matrix = torch.tensor([[6, 2, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = EvalResult(matrix, torch.zeros(15, 3, dtype=torch.int64))
    iou = result.iou.tolist()
    assert iou[:3] == pytest.approx([6 / 9, 1 / 6, 0.0])
    assert math.isnan(iou[3])
    assert result.miou == pytest.approx((6 / 9 + 1 / 6 + 0) / 3)
    assert result.accuracy == pytest.approx(7 / 12)
    assert EvalResult(matrix, result.calibration, (0, 3)).miou == pytest.approx(6 / 9)
    assert math.isnan(EvalResult(torch.zeros(4, 4, dtype=torch.int64), result.calibration).miou)


def slow_ece(confidence: list[float], right: list[bool]) -> float:
    total = 0.0
    for b in range(15):
        inside = [i for i, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15]
        if inside:
            hit = sum(right[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(hit - sum(confidence[i] for i in inside) / len(inside))
    return total


def test_bit_calibration_error_by_hand(monkeypatch):
    coding = ecoc()
    matrix = coding.codebook.matrix
    z = torch.randn(2, K, 6, 5, generator=torch.Generator().manual_seed(1)) * 2
    labels = torch.randint(0, N, (2, 6, 5), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = 255
    confidence, right = [], []
    for b in range(2):
        for h in range(6):
            for w in range(5):
                if labels[b, h, w] == 255:
                    continue
                for k in range(K):
                    p = 1 / (1 + math.exp(-float(z[b, k, h, w])))
                    confidence.append(max(p, 1 - p))
                    right.append((float(z[b, k, h, w]) >= 0) == bool(matrix[int(labels[b, h, w]), k]))
    counts = calibration_counts(coding.probabilities(z), labels, coding)
    assert counts.dtype == torch.int64
    assert int(counts[:, 0].sum()) == len(confidence)
    result = EvalResult(torch.zeros(N, N, dtype=torch.int64), counts)
    assert result.ece == pytest.approx(slow_ece(confidence, right), abs=1e-5)
    monkeypatch.setattr(metrics, "_CALIBRATION_CHUNK", 100)  # bits in several chunks
    assert torch.equal(calibration_counts(coding.probabilities(z), labels, coding), counts)


def test_class_calibration_error_by_hand():
    # two pixels at confidence 0.8 (one right), one at 0.55 (wrong), one ignored
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.45, 0.55], [0.0, 1.0]]).T.reshape(1, 2, 1, 4)
    labels = torch.tensor([[[0, 1, 0, 255]]])
    counts = calibration_counts(p, labels, OneHotCoding(2))
    result = EvalResult(torch.zeros(2, 2, dtype=torch.int64), counts)
    assert result.ece == pytest.approx(2 / 3 * abs(0.5 - 0.8) + 1 / 3 * 0.55, abs=1e-6)


def test_certain_and_right_is_calibrated_certain_and_wrong_is_not():
    coding = ecoc()
    labels = torch.arange(N).view(1, 1, N)
    right = coding.encode(labels).dense_bits(K).float()
    empty = torch.zeros(N, N, dtype=torch.int64)
    assert EvalResult(empty, calibration_counts(right, labels, coding)).ece == 0.0
    assert EvalResult(empty, calibration_counts(1 - right, labels, coding)).ece == 1.0

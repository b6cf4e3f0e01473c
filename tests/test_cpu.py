"""The compiled functions for CPUs against torch in float64, which test_coding.py checks against loops over pixels."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecocseg import cpu
from ecocseg.codebook import Codebook, max_min, random
from ecocseg.coding import Coding, EcocCoding, OneHotCoding
from ecocseg.data import mixing
from ecocseg.target import Target

pytestmark = pytest.mark.skipif(cpu.compiler() is None, reason="no C++ compiler: torch computes, as the other tests check")

# classes, bits (None: one-hot), cells, pixels, corners aligned
SHAPES = [(19, 40, (16, 24), (64, 96), False), (19, 40, (17, 25), (65, 97), True), (4, 9, (33, 70), (33, 70), False),
          (2, 1, (3, 2), (21, 8), False), (81, 100, (7, 10), (40, 50), False), (11, 70, (2, 2), (5, 9), True),
          (19, None, (16, 24), (64, 96), False), (150, None, (17, 25), (65, 97), True), (2, None, (9, 9), (9, 9), False)]
OPTIONS: list[dict[str, Any]] = [
    {}, {"contrast_negatives": "target_and_negatives", "temperature": 0.1, "reliability": 0.7},
    {"contrast_weight": 0.0, "label_form": "bit"}, {"temperature": 0.01, "label_form": "code"},
    {"distance_weight": 0.0, "bce_weight": 0.0, "max_candidates": 2, "reliability": 0.6}]


@functools.cache
def book(num_classes: int, num_bits: int) -> Codebook:
    return max_min(num_classes, num_bits) if num_classes < 80 else random(num_classes, num_bits, 0)


def made(num_classes: int, num_bits: int | None, **options: Any) -> Coding:
    if num_bits is None:
        return OneHotCoding(num_classes, **{k: v for k, v in options.items() if k in ("kernels", "align_corners")})
    return EcocCoding(book(num_classes, num_bits), **options)


def cells(coding: Coding, source: tuple[int, int], strength: float = 3.0) -> Tensor:
    """Logits of all degrees of certainty. Shape: float32 [2, K, h, w]."""
    g = torch.Generator().manual_seed(0)
    codes_NK = torch.eye(coding.num_outputs) if isinstance(coding, OneHotCoding) else coding._codes_NK.float()
    labels = torch.randint(0, coding.num_classes, (2, *source), generator=g)
    sure = torch.rand(2, 1, *source, generator=g) * strength
    noise = torch.randn(2, coding.num_outputs, *source, generator=g)
    return ((codes_NK[labels] * 2 - 1).movedim(-1, 1) * sure + noise).contiguous()


def target_of(coding: Coding, logits: Tensor, size: tuple[int, int]) -> Target:
    """True labels, ignored pixels and pseudo-labels, mixed, with any weights."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, coding.num_classes, (2, *size), generator=g)
    labels[0, :2] = 255
    target = mixing.mix(coding.encode(labels), coding.pseudo_label(logits, size), torch.rand(2, *size, generator=g) > 0.5)
    target.weight = torch.rand(2, *size, generator=g)
    return target


def loss_and_gradient(coding: Coding, logits: Tensor, target: Target, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    x = logits.clone().requires_grad_()
    terms = coding.loss(x, target, **options)
    terms["loss"].backward()
    assert x.grad is not None
    return {name: term.detach() for name, term in terms.items()}, x.grad


def test_it_compiles() -> None:
    assert cpu.library() is not None


CASES = [(*shape, options) for shape in SHAPES for options in (OPTIONS if shape[1] is not None else OPTIONS[:1])]


@pytest.mark.parametrize(("num_classes", "num_bits", "source", "size", "align_corners", "options"), CASES)
def test_equal_to_torch_in_float64(num_classes: int, num_bits: int | None, source: tuple[int, int], size: tuple[int, int],
                                   align_corners: bool, options: dict[str, Any]) -> None:
    fast = made(num_classes, num_bits, align_corners=align_corners, **options)
    slow = made(num_classes, num_bits, align_corners=align_corners, kernels="torch", **options)
    logits = cells(fast, source)
    assert fast.uses_compiled(logits, size) and not slow.uses_compiled(logits, size)
    ours, theirs = fast.pseudo_label(logits, size), slow.pseudo_label(logits.double(), size)
    same = ours.labels == theirs.labels
    if ours.bits is not None and theirs.bits is not None and ours.reliable is not None and theirs.reliable is not None:
        same &= (ours.bits == theirs.bits).all(1) & ((ours.reliable - theirs.reliable).abs() < 1e-6)
    assert same.float().mean() > 0.998  # but for pixels that a rounding decides
    torch.testing.assert_close(ours.confidence, theirs.confidence.float(), rtol=0, atol=2e-6)
    for name, value in theirs.metrics.items():
        torch.testing.assert_close(ours.metrics[name].float(), value.float(), rtol=1e-3, atol=1e-3)

    target = target_of(fast, logits, size)
    terms, gradient = loss_and_gradient(fast, logits, target, average="valid")
    expected, right = loss_and_gradient(slow, logits.double(), target, average="valid")
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value, rtol=1e-5, atol=1e-7, msg=name)
    rounding = 3e-6 if num_bits == 1 else 0.0  # the cosine of one number is 1 or -1: its gradient is what rounding leaves
    torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=2e-6 * float(right.abs().max()) + rounding)
    with torch.no_grad():
        torch.testing.assert_close(fast.loss(logits, target, average="valid")["loss"], terms["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("num_classes", "num_bits", "source", "size", "align_corners"), SHAPES)
def test_counts_are_those_of_torch_in_float64(num_classes: int, num_bits: int | None, source: tuple[int, int],
                                              size: tuple[int, int], align_corners: bool) -> None:
    fast, slow = made(num_classes, num_bits), made(num_classes, num_bits, kernels="torch")
    logits = cells(fast, source)
    labels = target_of(fast, logits, size).labels
    found, bins = fast.counts(logits, labels, align_corners)
    expected, right_bins = slow.counts(logits.double(), labels, align_corners)
    assert found.dtype == bins.dtype == torch.int64 and found.sum() == expected.sum() == (labels != 255).sum()
    values = int(expected.sum()) * (num_bits or 1)
    assert bins[:, 0].sum() == values and (found - expected).abs().sum() <= 2 + 0.004 * int(expected.sum())
    assert (bins - right_bins)[:, :2].abs().sum() <= 4 + 0.002 * values  # rounding moves a value to the next bin
    assert abs(bins[:, 2].sum() - right_bins[:, 2].sum()) <= 4 + 0.002 * values


@pytest.mark.parametrize("strength", [1.0, 2.0, 4.0, 8.0])
def test_a_class_that_its_bits_alone_prove_nearest_is_the_nearest(strength: float) -> None:
    """Runs of 8 pixels of a class, then 8 of another with ever more of the bits in which they differ as the first has them:
    up to some number the other is nearer, and that the first was right before proves nothing."""
    fast, slow = made(19, 40, label_form="code"), made(19, 40, label_form="code", kernels="torch")
    assert isinstance(fast, EcocCoding)
    codes_NK, g = torch.tensor(fast.codebook.matrix, dtype=torch.bool), torch.Generator().manual_seed(3)
    rows = []
    for changed in range(21):
        first, other = codes_NK[torch.randperm(19, generator=g)[:2]]
        mixed = other.clone()
        mixed[torch.nonzero(first != other)[:changed, 0]] ^= True
        rows.append(torch.stack([first] * 8 + [mixed] * 8))
    signs_HWK = torch.stack(rows) * 2.0 - 1
    sure = strength * (0.75 + 0.5 * torch.rand(signs_HWK.shape, generator=g))
    logits = (signs_HWK * sure).movedim(-1, 0)[None].contiguous()
    size = (logits.shape[-2], logits.shape[-1])
    assert fast.uses_compiled(logits, size)
    ours, theirs = fast.pseudo_label(logits, size), slow.pseudo_label(logits.double(), size)
    assert torch.equal(ours.labels, theirs.labels) and len(theirs.labels.unique()) > 10
    found, expected = (coding.counts(x, theirs.labels, False)[0] for coding, x in ((fast, logits), (slow, logits.double())))
    assert torch.equal(found, expected)


def test_counting_makes_no_full_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    coding = made(19, 40)
    logits = cells(coding, (8, 8))
    monkeypatch.setattr("ecocseg.coding.bilinear", None)
    matrix, bins = coding.counts(logits, torch.zeros(2, 32, 32, dtype=torch.int64), False)
    assert matrix.sum() == 2 * 32 * 32 and bins[:, 0].sum() == 2 * 32 * 32 * 40


@pytest.mark.parametrize("strength", [0.0, 100.0])
@pytest.mark.parametrize("num_bits", [40, None])
def test_logits_of_zero_and_of_hundreds(num_bits: int | None, strength: float) -> None:
    fast, slow = made(19, num_bits), made(19, num_bits, kernels="torch")
    logits = cells(fast, (8, 8)) * strength
    target = target_of(fast, logits, (32, 32))
    terms, gradient = loss_and_gradient(fast, logits, target)
    expected, right = loss_and_gradient(slow, logits.double(), target)
    torch.testing.assert_close(terms["loss"].double(), expected["loss"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_nothing_but_ignored_pixels() -> None:
    for coding in (made(19, 40), made(19, None)):
        logits = cells(coding, (8, 8))
        terms, gradient = loss_and_gradient(coding, logits, coding.encode(torch.full((2, 32, 32), 255)), average="valid")
        assert terms["loss"] == 0 and not gradient.any()


def test_a_logit_that_is_not_a_number_is_not_hidden() -> None:
    for coding in (made(19, 40), made(19, None)):
        logits = cells(coding, (8, 8))
        target = target_of(coding, logits, (32, 32))
        logits[1, 0, 4, 4] = torch.nan
        terms, gradient = loss_and_gradient(coding, logits, target)
        assert terms["loss"].isnan() and gradient.isnan().any()
        coding.pseudo_label(logits, (32, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(dtype: torch.dtype) -> None:
    coding = made(19, 40)
    logits = cells(coding, (8, 8)).to(dtype)
    target = target_of(coding, logits, (32, 32))
    terms, gradient = loss_and_gradient(coding, logits, target)
    expected, right = loss_and_gradient(coding, logits.float(), target)
    assert gradient.dtype == dtype
    torch.testing.assert_close(terms["loss"], expected["loss"], rtol=0, atol=0)
    torch.testing.assert_close(gradient, right.to(dtype), rtol=0, atol=0)


def test_the_same_bits_for_any_number_of_threads() -> None:
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            coding = made(19, 40)
            logits = cells(coding, (50, 16))
            pseudo = coding.pseudo_label(logits, (200, 64))
            terms, gradient = loss_and_gradient(coding, logits, target_of(coding, logits, (200, 64)))
            found.append((pseudo.bits, pseudo.confidence, terms["loss"], gradient))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_is_left_to_torch() -> None:
    coding, logits = made(19, 40), cells(made(19, 40), (8, 8))
    assert coding.uses_compiled(logits, (32, 32))
    assert not coding.uses_compiled(logits, (32, 33)) and not coding.uses_compiled(logits, (32, 4))
    assert coding.uses_compiled(logits, (33, 32)), "rows may lie over cells in any way"
    assert not coding.uses_compiled(logits.double(), (32, 32)) and not coding.uses_compiled(logits.to("meta"), (32, 32))
    assert not made(19, 40, kernels="torch").uses_compiled(logits, (32, 32))


def test_it_is_compiled_once_and_without_a_compiler_torch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECOCSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)
    assert cpu.library() is not None
    (built,) = (tmp_path / "cache").iterdir()
    made_at = built.stat().st_mtime_ns
    assert cpu.library() is not None and built.stat().st_mtime_ns == made_at
    monkeypatch.setattr(cpu, "FLAGS", ("--no-such-flag",))
    assert cpu.library() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu.library() is None
    coding, logits = made(19, 40), cells(made(19, 40), (8, 8))
    assert not coding.uses_compiled(logits, (32, 32)) and coding.pseudo_label(logits, (32, 32)).bits is not None

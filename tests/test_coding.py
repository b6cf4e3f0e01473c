"""Codings against loops over pixels, gradients against finite differences, and the cases that break such code."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ecocseg import bits, resize
from ecocseg.codebook import Codebook, max_min
from ecocseg.coding import EcocCoding, OneHotCoding, Target
from ecocseg.data import mixing

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def random_codebook(num_classes: int, num_bits: int, seed: int = 0) -> Codebook:
    """Any valid codebook, close rows included."""
    rng = np.random.default_rng(seed)
    while True:
        matrix = rng.integers(0, 2, (num_classes, num_bits), dtype=np.uint8)
        constant = matrix.min(0) == matrix.max(0)
        matrix[rng.integers(num_classes), constant] ^= 1
        if len(np.unique(matrix, axis=0)) == num_classes:
            return Codebook(matrix)


def random_logits(codes: np.ndarray, shape: tuple[int, int, int], seed: int, spread: float = 2.0) -> Tensor:
    """Noisy codewords of all degrees of certainty, float64 [B, K, H, W]."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(codes), shape, generator=g)
    signs = torch.tensor(codes)[labels].double().movedim(-1, 1) * 2 - 1
    strength = torch.rand(shape, generator=g, dtype=torch.float64)[:, None] * 6
    return signs * strength + spread * torch.randn(signs.shape, generator=g, dtype=torch.float64)


def random_labels(num_classes: int, shape: tuple[int, int, int], seed: int, ignored: float = 0.2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, shape, generator=g)
    return labels.masked_fill(torch.rand(shape, generator=g) < ignored, 255)


def check_scores_and_pseudo_labels(coding: EcocCoding, logits: Tensor) -> Target:
    codes = coding.codebook.matrix.tolist()
    torch.testing.assert_close(coding.scores(logits), reference.scores(logits, codes), **TIGHT)
    target = coding.pseudo_label(logits)
    dense = target.dense_bits(coding.num_outputs)
    shares, changed = [], 0
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in target.labels.shape)).tolist():
        z = logits[b, :, y, x].tolist()
        label, hybrid, confidence, mask = reference.pseudo_label_pixel(
            z, codes, coding.reliability, coding.max_candidates)
        assert target.labels[b, y, x] == label
        assert dense[b, :, y, x].int().tolist() == hybrid
        assert abs(target.confidence[b, y, x] - confidence) < 1e-9
        assert abs(target.reliable[b, y, x] - sum(mask) / len(mask)) < 1e-9
        shares.append(sum(mask) / len(mask))
        changed += sum(h != int(v >= 0) for h, v in zip(hybrid, z, strict=True))
    assert abs(target.metrics["reliable_bits"] - np.mean(shares)) < 1e-9
    assert abs(target.metrics["corrected_bits"] - changed / logits.numel()) < 1e-6
    assert not target.is_true.any() and (target.weight == 1).all()
    return target


def check_loss(coding: EcocCoding, logits: Tensor, target: Target) -> None:
    w = coding.loss_weights
    expected = reference.loss(logits, target.labels, target.dense_bits(coding.num_outputs), target.weight,
                              coding.codebook.matrix.tolist(), weights=(w.bce, w.distance, w.contrast),
                              temperature=w.temperature, negatives=w.negatives)
    valid = int((target.labels != 255).sum())
    for options, divisor in (({}, target.labels.numel()), ({"average": "valid"}, max(valid, 1)),
                             ({"normalizer": torch.tensor(7.0)}, 7.0), ({"normalizer": 3.0}, 3.0)):
        terms = coding.loss(logits, target, **options)
        for name, value in expected.items():
            active = name == "loss" or getattr(w, name)
            assert abs(terms[name].item() - (value / divisor if active else 0)) < 1e-9 * max(1, abs(value)), name


def gradcheck(coding, logits: Tensor, target: Target, fast: bool = False) -> None:
    """Each partial derivative by differences; `fast`: two random combinations of them."""
    x = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: coding.loss(z, target, average="valid")["loss"], (x,), atol=1e-7, fast_mode=fast)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_shapes_equal_the_reference(data):
    num_classes = data.draw(st.integers(2, 9))
    num_bits = data.draw(st.integers(int(np.ceil(np.log2(num_classes))), 20))
    shape = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)))
    seed = data.draw(st.integers(0, 10**6))
    book = random_codebook(num_classes, num_bits, seed)
    coding = EcocCoding(book, reliability=data.draw(st.sampled_from([0.5, 0.8, 0.95, 1.0])),
                        max_candidates=data.draw(st.sampled_from([None, 1, 2, 8])),
                        temperature=data.draw(st.sampled_from([0.1, 0.5])),
                        contrast_negatives=data.draw(st.sampled_from(["codewords", "target_and_negatives"])))
    logits = random_logits(book.matrix, shape, seed)
    pseudo = check_scores_and_pseudo_labels(coding, logits)
    pseudo.weight = torch.rand(shape, dtype=torch.float64)
    pseudo.labels[torch.rand(shape) < 0.2] = 255
    check_loss(coding, logits, pseudo)
    check_loss(coding, logits, coding.encode(random_labels(num_classes, shape, seed)))


@pytest.mark.parametrize(("num_classes", "num_bits"), [(2, 3), (19, 40), (5, 64), (7, 65), (4, 130)])
def test_many_bits_and_two_classes(num_classes, num_bits):
    coding = EcocCoding(random_codebook(num_classes, num_bits), reliability=0.9)
    logits = random_logits(coding.codebook.matrix, (1, 6, 7), seed=1)
    target = check_scores_and_pseudo_labels(coding, logits)
    assert 0 < (target.reliable == 1).double().mean() < 1, "some pixels must be settled at once and some mined"
    check_loss(coding, logits, target)


def test_mining_reaches_every_outcome():
    """One class, several classes with a part of the bits, and none: all three must occur where it is compared."""
    coding = EcocCoding(random_codebook(12, 16), reliability=0.9)
    logits = random_logits(coding.codebook.matrix, (2, 12, 12), seed=2)
    reliable = check_scores_and_pseudo_labels(coding, logits).reliable
    assert (reliable == 1).any() and (reliable == 0).any() and ((reliable > 0) & (reliable < 1)).any()


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_limit_on_candidates(limit):
    book = random_codebook(12, 16)
    logits = random_logits(book.matrix, (2, 10, 10), seed=3)
    limited = check_scores_and_pseudo_labels(EcocCoding(book, reliability=0.9, max_candidates=limit), logits)
    free = EcocCoding(book, reliability=0.9).pseudo_label(logits)
    assert (limited.reliable <= free.reliable).all() and (limited.reliable < free.reliable).any()


def test_tied_distances_take_the_lowest_class():
    """Zero logits tie all classes; equal logits tie some. The order among equals is by class id everywhere."""
    coding = EcocCoding(max_min(8, 8), reliability=0.6)
    logits = torch.zeros(1, 8, 4, 5, dtype=torch.float64)
    logits[:, ::2, 1:] = 2.0
    logits[:, ::4, 2:] = -2.0
    target = check_scores_and_pseudo_labels(coding, logits)
    assert (target.labels[0, 0] == 0).all()
    assert target.dense_bits(8)[0, :, 0].all(), "nothing is reliable at p = 0.5, and z = 0 is bit 1"


def test_half_is_code_wise_and_one_is_bit_wise():
    book = random_codebook(9, 12)
    logits = random_logits(book.matrix, (2, 8, 8), seed=4)
    for reliability, form in ((0.5, "code"), (1.0, "bit")):
        hybrid = EcocCoding(book, reliability=reliability).pseudo_label(logits)
        plain = EcocCoding(book, label_form=form).pseudo_label(logits)
        assert torch.equal(hybrid.bits, plain.bits) and torch.equal(hybrid.reliable, plain.reliable)
    coding = EcocCoding(book, label_form="code")
    target = coding.pseudo_label(logits)
    assert torch.equal(target.bits, coding.encode(target.labels).bits)
    bit_wise = EcocCoding(book, label_form="bit").pseudo_label(logits)
    assert torch.equal(bit_wise.dense_bits(12), logits >= 0)


@pytest.mark.parametrize("size", [-50.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(size, dtype):
    coding = EcocCoding(random_codebook(5, 10))
    logits = torch.full((1, 10, 3, 4), size, dtype=dtype)
    logits[:, ::3] *= -1
    logits[..., 0] = 0  # |z| = 0
    target = check_scores_and_pseudo_labels(coding, logits.double())
    labels = coding.encode(random_labels(5, (1, 3, 4), seed=5))
    for each in (target, labels):
        check_loss(coding, logits.double(), each)
        x = logits.clone().requires_grad_()
        terms = coding.loss(x, each)
        terms["loss"].backward()
        assert all(torch.isfinite(v) for v in terms.values()) and torch.isfinite(x.grad).all()
        assert x.grad.abs().max() < 1e3


def test_all_pixels_ignored():
    for coding in (EcocCoding(max_min(4, 7)), OneHotCoding(4)):
        x = torch.randn(2, coding.num_outputs, 3, 3, dtype=torch.float64, requires_grad=True)
        target = coding.encode(torch.full((2, 3, 3), 255))
        for average in ("all", "valid"):
            loss = coding.loss(x, target, average=average)["loss"]
            loss.backward()
            assert loss.item() == 0 and not x.grad.any()
            x.grad = None


@pytest.mark.parametrize("negatives", ["codewords", "target_and_negatives"])
@pytest.mark.parametrize("weights", [(1, 5, 2), (1, 0, 0), (0, 3, 0), (0, 0, 1), (0, 0, 0)])
def test_gradients_and_switched_off_terms(negatives, weights):
    coding = EcocCoding(random_codebook(5, 7), bce_weight=weights[0], distance_weight=weights[1],
                        contrast_weight=weights[2], contrast_negatives=negatives, reliability=0.8)
    logits = random_logits(coding.codebook.matrix, (2, 3, 2), seed=6)
    target = coding.pseudo_label(logits)
    target.weight = torch.rand(2, 3, 2, dtype=torch.float64)
    target.labels[0, 0, 0] = 255
    check_loss(coding, logits, target)
    gradcheck(coding, logits, target)
    tiny = logits.clone()
    tiny[1, :, 0, 0] *= 1e-5  # below the least norm of a cosine
    gradcheck(coding, tiny, target)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("source", "size"), [((3, 4), (12, 15)), ((5, 6), (3, 4)), ((4, 4), (4, 9)), ((1, 1), (3, 2))])
def test_upsampling_inside_equals_outside(align_corners, source, size, monkeypatch):
    monkeypatch.setattr(resize, "_CPU_STRIP", 2 * size[1])  # several strips
    book = random_codebook(5, 7)
    logits = random_logits(book.matrix, (2, *source), seed=7)
    full = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    for coding in (EcocCoding(book, align_corners=align_corners, reliability=0.8),
                   OneHotCoding(7, align_corners=align_corners)):
        inside, outside = coding.pseudo_label(logits, size), coding.pseudo_label(full)
        assert torch.equal(inside.labels, outside.labels)
        torch.testing.assert_close(inside.confidence, outside.confidence, **TIGHT)
        if inside.bits is not None:
            assert torch.equal(inside.bits, outside.bits)
        target = coding.encode(random_labels(5, (2, *size), seed=8))
        torch.testing.assert_close(coding.loss(logits, target), coding.loss(full, target), **TIGHT)
        gradcheck(coding, logits, target, fast=True)


def test_one_hot_equals_the_reference():
    coding = OneHotCoding(6)
    logits = 4 * torch.randn(2, 6, 5, 4, dtype=torch.float64)
    logits[0, 0, 0, 0] = 50
    target = coding.encode(random_labels(6, (2, 5, 4), seed=9))
    target.weight = torch.rand(2, 5, 4, dtype=torch.float64)
    expected = reference.cross_entropy(logits, target.labels, target.weight)
    assert abs(coding.loss(logits, target)["loss"].item() - expected / 40) < 1e-9
    gradcheck(coding, logits, target)
    pseudo = coding.pseudo_label(logits)
    confidence, labels = logits.softmax(1).max(1)
    assert torch.equal(pseudo.labels, labels) and pseudo.bits is None and pseudo.metrics == {}
    torch.testing.assert_close(pseudo.confidence, confidence, **TIGHT)
    assert torch.equal(coding.scores(logits).argmax(1), labels)


def test_encode_writes_codewords_and_leaves_ignored_pixels_empty():
    coding = EcocCoding(max_min(19, 40))
    labels = random_labels(19, (2, 6, 5), seed=10)
    target = coding.encode(labels)
    codes = torch.as_tensor(coding.codebook.matrix.copy()).bool()
    expected = torch.where((labels != 255)[..., None], codes[labels.clamp_max(18)], False).movedim(-1, 1)
    assert torch.equal(target.dense_bits(40), expected)
    assert target.bits.dtype == torch.int64 and target.is_true.all() and target.confidence is None
    assert torch.equal(coding.encode(labels.to(torch.uint8)).labels, labels)


@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_packing_is_lossless(num_bits, pixels, seed):
    dense = torch.rand(num_bits, pixels, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = bits.pack(dense)
    assert words.shape == (-(-num_bits // 64), pixels)
    assert torch.equal(bits.unpack(words, num_bits), dense)
    assert torch.equal(bits.popcount(words).sum(0), dense.sum(0))


def test_low_precision_logits_and_autocast_compute_in_float32():
    coding = EcocCoding(max_min(19, 40))
    logits = random_logits(coding.codebook.matrix, (1, 8, 8), seed=11).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = coding.encode(random_labels(19, (1, 8, 8), seed=12))
        x = logits.clone().requires_grad_()
        loss = coding.loss(x, target)["loss"]
        pseudo, scores = coding.pseudo_label(logits), coding.scores(logits)
    loss.backward()
    exact = coding.loss(logits.double(), target)["loss"]
    assert loss.dtype == torch.float32 and abs(loss - exact) < 1e-4 and x.grad.dtype == torch.bfloat16
    assert torch.equal(pseudo.bits, coding.pseudo_label(logits.double()).bits)
    torch.testing.assert_close(scores.double(), coding.scores(logits.double()), rtol=1e-5, atol=1e-5)


def test_layout_of_logits_does_not_matter():
    coding = EcocCoding(max_min(19, 40))
    logits = random_logits(coding.codebook.matrix, (2, 8, 8), seed=13)
    other = logits.to(memory_format=torch.channels_last).detach().requires_grad_()
    target = coding.encode(random_labels(19, (2, 8, 8), seed=14))
    loss = coding.loss(other, target)["loss"]
    loss.backward()
    same = logits.clone().requires_grad_()
    coding.loss(same, target)["loss"].backward()
    torch.testing.assert_close(other.grad, same.grad, **TIGHT)
    assert torch.equal(coding.pseudo_label(other.detach()).bits, coding.pseudo_label(logits).bits)


def test_codings_travel_between_processes():
    coding = EcocCoding(max_min(5, 8))
    logits = random_logits(coding.codebook.matrix, (1, 2, 2), seed=15)
    first = coding.scores(logits)
    again = pickle.loads(pickle.dumps(coding))
    assert torch.equal(again.scores(logits), first) and again.describe() == coding.describe()


def test_the_benchmark_compares_with_a_5d_formulation_of_the_same_maths():
    sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
    benchmark = importlib.import_module("benchmark_coding")
    coding = EcocCoding(random_codebook(12, 16), reliability=0.9, max_candidates=8)
    codes = torch.tensor(coding.codebook.matrix)
    logits = random_logits(coding.codebook.matrix, (2, 9, 9), seed=16).requires_grad_()
    target = coding.pseudo_label(logits)
    torch.testing.assert_close(benchmark.scores_5d(logits, codes), coding.scores(logits), **TIGHT)
    labels, dense, confidence = benchmark.pseudo_label_5d(logits, codes, 0.9)
    assert torch.equal(labels, target.labels) and torch.equal(dense, target.dense_bits(16))
    torch.testing.assert_close(confidence, target.confidence, **TIGHT)
    loss = benchmark.loss_5d(logits, dense, codes, target.weight)
    torch.testing.assert_close(loss, coding.loss(logits, target)["loss"], **TIGHT)
    slow, = torch.autograd.grad(loss, logits)
    fast, = torch.autograd.grad(coding.loss(logits, target)["loss"], logits)
    torch.testing.assert_close(fast, slow, **TIGHT)


MEMORY = """
import resource, sys, torch
from ecocseg.codebook import max_min
from ecocseg.coding import EcocCoding
torch.set_num_threads(1)
coding = EcocCoding(max_min(19, 40))
def once(side):
    logits = torch.randn(2, 40, side, side, requires_grad=True)
    target = coding.pseudo_label(logits)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    coding.loss(logits, target)["loss"].backward()
    coding.pseudo_label(logits)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
once(32)
print(once(256) * 1024)
"""


def test_memory_stays_at_a_few_times_the_logits():
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    logits_bytes = 2 * 40 * 256 * 256 * 4
    assert int(out) < 4 * logits_bytes, "a [B, N, K, H, W] tensor alone would be 19 times the logits"


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave, by element size."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("sure", [1.0, 9.0])
def test_nothing_of_label_size_is_k_fold_from_mining_to_the_loss(sure):
    """Pseudo-label, ClassMix, a CutMix box, loss and gradient, from logits of stride 4, sure or all to be mined."""
    coding = EcocCoding(max_min(19, 40), reliability=0.8)
    size, batch = 256, 2
    labels = random_labels(19, (batch, 8, 8), seed=17).repeat_interleave(32, 1).repeat_interleave(32, 2)
    codes = torch.tensor(coding.codebook.matrix)
    logits = sure * (codes[labels[:, ::4, ::4].clamp_max(18)].float() * 2 - 1).movedim(-1, 1) + torch.randn(2, 40, 64, 64)
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    with LargestTensor() as largest:
        pseudo = coding.pseudo_label(logits, (size, size))
        mixed = mixing.mix(coding.encode(labels), pseudo, mixing.class_mix_mask(labels, generators))
        box = mixing.cutmix_box((size, size), generators[0], p=1.0).expand(batch, -1, -1)
        target = mixing.mix(mixed, pseudo, box)
        x = logits.requires_grad_()
        coding.loss(x, target)["loss"].backward()
    settled = (pseudo.reliable == 1).float().mean()  # by the nearest codeword alone
    assert x.grad.any() and (settled > 0.9 if sure > 1 else settled < 0.01)
    assert largest.elements < 40 * size * size * batch / 4

"""Triton kernels against torch in float64 and against loops over pixels.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported: one test here runs the
others in a process of its own. What the interpreter lets pass and the compiler does not is caught by compiling for an H100,
which needs no GPU. With one, `pytest -m gpu tests/test_kernels.py` runs the same tests on it.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import tiny_config
from test_coding import random_codebook, random_labels, random_logits
from torch.utils.checkpoint import checkpoint

from ecocseg import kernels
from ecocseg.codebook import Codebook, max_min
from ecocseg.coding import Coding, EcocCoding, OneHotCoding, Target
from ecocseg.errors import InputError
from ecocseg.evaluate import EvalSpec, Normalize, evaluate
from ecocseg.kernels.costs import PEAKS, costs, peak_of
from ecocseg.metrics import calibration_counts, confusion
from ecocseg.resources import plan_resources

INTERPRETED = kernels.interpreted()
DEVICES = [pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")),
           pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])]
on_devices = pytest.mark.parametrize("device", DEVICES)
without_interpreter = pytest.mark.skipif(INTERPRETED or not kernels.HAVE_TRITON, reason="needs Triton's compiler")
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-5}  # error of a gradient; float16 is made in float32


if INTERPRETED:
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call_without_patching_again(self, *arguments, **options):
        """Triton's interpreter replaces all its functions anew at every call of a helper: half of its time for nothing."""
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call_without_patching_again


@without_interpreter
def test_all_of_these_through_the_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__], capture_output=True,
                         text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 30, run.stdout[-2000:]


def pair(make, **options):
    """The same coding by kernels and by torch."""
    return make(kernels="triton", **options), make(kernels="torch", **options)


def ecoc(book: Codebook):
    return lambda **options: EcocCoding(book, **options)


def one_hot(number: int):
    return lambda **options: OneHotCoding(number, **options)


def compare_pseudo_labels(fast: Coding, slow: Coding, logits: torch.Tensor, size: tuple[int, int]) -> Target:
    assert fast.uses_kernels(logits, size, fast.align_corners)
    found, wanted = fast.pseudo_label(logits, size), slow.pseudo_label(logits.double(), size)
    assert torch.equal(found.labels, wanted.labels)
    torch.testing.assert_close(found.confidence.double(), wanted.confidence, **CLOSE)
    assert found.weight.dtype == torch.float32 and (found.weight == 1).all() and not found.is_true.any()
    if wanted.bits is None:
        assert found.bits is None and found.reliable is None
        return found
    assert torch.equal(found.bits, wanted.bits)
    torch.testing.assert_close(found.reliable.double(), wanted.reliable, **CLOSE)
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[name].double(), value.double(), **CLOSE)
    return found


def compare_losses(fast: Coding, slow: Coding, logits: torch.Tensor, target: Target, **options) -> None:
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, wanted = fast.loss(x, target, **options), slow.loss(y, target, **options)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.detach(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    (3 * found["loss"]).backward()
    (3 * wanted["loss"]).backward()
    assert x.grad.dtype == logits.dtype and x.grad.shape == logits.shape
    error = (x.grad.double() - y.grad).abs().max() / y.grad.abs().max().clamp_min(1e-12)
    assert error < max(DTYPES[logits.dtype], 1e-3 if logits.dtype == torch.float16 else 0), float(error)


def weighted(target: Target, seed: int = 0) -> Target:
    g = torch.Generator().manual_seed(seed)
    target.weight = torch.rand(target.labels.shape, generator=g).to(target.weight.device)
    target.labels[(torch.rand(target.labels.shape, generator=g) < 0.2).to(target.labels.device)] = 255
    return target


CASES = [  # classes, bits, cells, pixels, options
    (19, 40, (4, 5), (16, 13), {}),
    (19, 40, (7, 9), (7, 9), {"label_form": "code"}),
    (5, 9, (3, 4), (10, 11), {"align_corners": True, "contrast_negatives": "target_and_negatives", "label_form": "bit"}),
    (2, 1, (3, 3), (5, 6), {}),
    (9, 64, (2, 2), (8, 9), {"max_candidates": 2, "distance_weight": 0.0}),
    (7, 65, (3, 3), (8, 8), {"contrast_weight": 0.0, "temperature": 0.1}),
    (40, 128, (2, 2), (8, 8), {"bce_weight": 0.0, "max_candidates": 1, "align_corners": True}),
    (256, 24, (2, 3), (8, 9), {"contrast_negatives": "target_and_negatives", "temperature": 0.01}),
    (5, 9, (1, 1), (4, 6), {"bce_weight": 0.0, "distance_weight": 0.0}),
    (5, 9, (9, 10), (6, 8), {"bce_weight": 0.0, "distance_weight": 0.0, "contrast_weight": 0.0}),
]


@on_devices
@pytest.mark.parametrize(("num_classes", "num_bits", "cells", "size", "options"), CASES)
def test_ecoc_equals_torch_in_float64(num_classes, num_bits, cells, size, options, device):
    book = random_codebook(num_classes, num_bits, seed=1)
    fast, slow = pair(ecoc(book), reliability=0.8, **options)
    logits = random_logits(book.matrix, (2 if num_classes == 5 else 1, *cells), seed=2).float().to(device)
    compare_losses(fast, slow, logits, weighted(compare_pseudo_labels(fast, slow, logits, size)))
    labels = random_labels(num_classes, (len(logits), *size), seed=3).to(device)
    if num_classes in (5, 19):  # the rest differs in nothing that labels of another kind would show
        compare_losses(fast, slow, logits, slow.encode(labels), average="valid")
    check_counts(fast, slow, logits, labels, options.get("align_corners", False))


@on_devices
@pytest.mark.parametrize(("number", "cells", "size", "align_corners"), [
    (19, (4, 5), (16, 13), False), (21, (5, 6), (11, 12), True), (2, (3, 3), (8, 7), False), (256, (2, 2), (6, 8), False),
    (150, (7, 8), (7, 8), False)])
def test_one_hot_equals_torch_in_float64(number, cells, size, align_corners, device):
    fast, slow = pair(one_hot(number), align_corners=align_corners)
    logits = (4 * torch.randn(1, number, *cells, generator=torch.Generator().manual_seed(4))).to(device)
    compare_losses(fast, slow, logits, weighted(compare_pseudo_labels(fast, slow, logits, size)))
    labels = random_labels(number, (1, *size), seed=5).to(device)
    compare_losses(fast, slow, logits, slow.encode(labels), normalizer=torch.tensor(7.0))
    check_counts(fast, slow, logits, labels, align_corners)


def check_counts(fast: Coding, slow: Coding, logits: torch.Tensor, labels: torch.Tensor, align_corners: bool) -> None:
    full = F.interpolate(logits.double(), labels.shape[1:], mode="bilinear", align_corners=align_corners)
    probabilities = slow.probabilities(full)
    found = fast.counts(logits, labels, align_corners)
    assert torch.equal(found[0], confusion(slow.scores(full).argmax(1), labels, fast.num_classes))
    wanted = calibration_counts(probabilities, labels, slow)
    assert torch.equal(found[1][:, :2].sum(0), wanted[:, :2].sum(0))
    apart = (found[1] - wanted).abs()
    assert apart[:, 0].max() <= 2, "a confidence on the edge of two bins may fall either way"
    assert (found[1][:, 2].sum() - wanted[:, 2].sum()).abs() <= 2 + wanted[:, 0].sum() / 1000


@on_devices
@pytest.mark.parametrize("negatives", ["codewords", "target_and_negatives"])
def test_ecoc_equals_loops_over_pixels(negatives, device):
    book, size = random_codebook(12, 16), (9, 10)
    coding = EcocCoding(book, reliability=0.9, contrast_negatives=negatives, kernels="triton")
    logits = random_logits(book.matrix, (1, 4, 4), seed=6)
    full, codes = F.interpolate(logits, size, mode="bilinear"), book.matrix.tolist()
    found = coding.pseudo_label(logits.float().to(device), size).to("cpu")
    dense, shares = found.dense_bits(16), []
    for y in range(size[0]):
        for x in range(size[1]):
            label, bits, confidence, mask = reference.pseudo_label_pixel(full[0, :, y, x].tolist(), codes, 0.9, None)
            assert found.labels[0, y, x] == label and dense[0, :, y, x].int().tolist() == bits
            assert abs(found.confidence[0, y, x] - confidence) < 1e-6
            shares.append(sum(mask) / 16)
    assert torch.allclose(found.reliable.view(-1), torch.tensor(shares))
    assert 0 in shares and 1 in shares and any(0 < share < 1 for share in shares), "every outcome of mining must occur"
    weighted(found)
    wanted = reference.loss(full, found.labels, found.dense_bits(16), found.weight, codes, negatives=negatives)
    terms = coding.loss(logits.float().to(device), found.to(device), normalizer=1.0)
    for name, value in wanted.items():
        assert abs(terms[name].item() - value) < 1e-5 * max(1, abs(value)), name


@on_devices
def test_tied_distances_take_the_lowest_class(device):
    """Zero logits tie all classes, and bits that are certain tie some; these sums are exact in any order."""
    fast, slow = pair(ecoc(max_min(8, 8)), reliability=0.6)
    logits = torch.zeros(1, 8, 4, 5)
    logits[:, ::2, 1:] = 200.0
    logits[:, ::4, 2:] = -200.0
    logits[:, 1::2, 3:] = 0.5
    found = compare_pseudo_labels(fast, slow, logits.to(device), (4, 5))
    assert (found.labels[0, 0] == 0).all() and found.dense_bits(8)[0, :, 0].all()
    hot, plain = pair(one_hot(40))
    assert not compare_pseudo_labels(hot, plain, torch.zeros(1, 40, 2, 2, device=device), (8, 8)).labels.any()


@on_devices
@pytest.mark.parametrize("make", [ecoc(random_codebook(5, 10)), one_hot(10)])
def test_extreme_logits_and_pixels_without_label(make, device):
    fast, slow = pair(make)
    logits = torch.full((1, 10, 3, 4), 50.0, device=device)
    logits[:, ::3] *= -1
    logits[..., 0] = 0  # |z| = 0
    target = slow.encode(random_labels(5, (1, 9, 8), seed=7).to(device))
    compare_pseudo_labels(fast, slow, logits, (9, 8))
    compare_losses(fast, slow, logits, target)
    compare_losses(fast, slow, -logits[..., 1:], target)
    nothing = slow.encode(torch.full((1, 9, 8), 255, device=device))
    for average in ("all", "valid"):
        x = logits.clone().requires_grad_()
        loss = fast.loss(x, nothing, average=average)["loss"]
        loss.backward()
        assert loss.item() == 0 and not x.grad.any()


@on_devices
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "channels_last"), (torch.bfloat16, "part"),
                                               (torch.float16, "channels_last"), (torch.float32, "part")])
@pytest.mark.parametrize(("make", "outputs"), [(ecoc(max_min(19, 20)), 20), (one_hot(19), 19)])
def test_low_precision_and_any_layout(make, outputs, dtype, layout, device):
    fast, slow = pair(make)
    g = torch.Generator().manual_seed(8)
    labels = random_labels(19, (1, 12, 20), seed=9).to(device)
    target = slow.encode(labels)
    target.weight = torch.rand(1, 1, 1, generator=g).to(device).expand(1, 12, 20)
    target = target.cropped(slice(0, 8), slice(2, 18))
    whole = (5 * torch.randn(1, outputs, 4, 6, generator=g)).to(device, dtype)
    logits = whole[:, :, 1:3, 1:5] if layout == "part" else whole.contiguous(memory_format=torch.channels_last)
    large = torch.empty_like(whole).new_empty(1, outputs, 9, 18).copy_(F.interpolate(whole, (9, 18)))
    same = large[:, :, :8, 1:17] if layout == "part" else large[:, :, :8, :16].contiguous(memory_format=torch.channels_last)
    for cells in (logits, same) if dtype == torch.float32 else (logits,):
        with torch.autocast(device, dtype=torch.bfloat16):
            compare_pseudo_labels(fast, slow, cells, (8, 16))
            compare_losses(fast, slow, cells, target)


@on_devices
def test_the_same_bits_every_time(device):
    book = random_codebook(19, 40)
    coding = EcocCoding(book, kernels="triton")
    logits = random_logits(book.matrix, (1, 3, 4), seed=10).float().to(device)
    target = coding.encode(random_labels(19, (1, 11, 13), seed=11).to(device))

    def once():
        x = logits.clone().requires_grad_()
        loss = coding.loss(x, target)["loss"]
        loss.backward()
        return loss.detach(), x.grad

    first = once()
    with torch.no_grad():
        assert torch.equal(coding.loss(logits, target)["loss"], first[0]), "with or without the gradient"
    for _ in range(1 if device == "cpu" else 20):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def operator_inputs(device: str):
    from ecocseg.kernels import dispatch, operators

    coding = EcocCoding(random_codebook(3, 5))
    tables = dispatch.tables(coding._codes_NK, torch.device(device))
    logits, labels = torch.randn(1, 5, 3, 3, device=device), random_labels(3, (1, 6, 5), seed=12).to(device)
    hot = torch.randn(1, 3, 3, 3, device=device)
    target, one = coding.encode(labels), torch.ones(1, device=device)
    inside = (tables.signs_NK, tables.zeros_N, tables.words_XN)
    loss = (tables.signs_NK, 3, target.labels, target.bits, target.weight, one, 1.0, 5.0, 2.0, 0.5, False, False)
    return {
        "ecoc_pseudo_label": (operators.ecoc_pseudo_label, (logits, 6, 5, *inside, 0.8, 3, "hybrid", False)),
        "one_hot_pseudo_label": (operators.one_hot_pseudo_label, (hot, 6, 5, False)),
        "ecoc_count": (operators.ecoc_count, (logits, labels, *inside, False)),
        "one_hot_count": (operators.one_hot_count, (hot, labels, False)),
        "ecoc_loss": (operators.ecoc_loss, (logits.clone().requires_grad_(), *loss, True)),
        "cross_entropy": (operators.cross_entropy, (hot.clone().requires_grad_(), labels, target.weight, one, False, True)),
    }


@on_devices
@pytest.mark.parametrize("name", ["ecoc_pseudo_label", "one_hot_pseudo_label", "ecoc_count", "one_hot_count", "ecoc_loss",
                                  "cross_entropy"])
def test_operators_keep_torch_s_rules(name, device):
    operator, arguments = operator_inputs(device)[name]
    torch.library.opcheck(operator, arguments)


@on_devices
@pytest.mark.parametrize(("make", "outputs"), [(ecoc(random_codebook(3, 5)), 5), (one_hot(3), 3)])
def test_compiled_and_checkpointed_steps_are_the_plain_step(make, outputs, device):
    coding = make(kernels="triton")
    features = torch.randn(1, 4, 3, 3, device=device)
    weight = torch.randn(outputs, 4, 1, 1, device=device, requires_grad=True)
    target = coding.encode(random_labels(3, (1, 6, 5), seed=13).to(device))

    def step(features):
        return coding.loss(F.conv2d(features, weight), target)["loss"]

    plain, = torch.autograd.grad(step(features), weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    torch.testing.assert_close(torch.autograd.grad(compiled(features), weight)[0], plain)
    again = checkpoint(step, features, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, weight)[0], plain)


@on_devices
@pytest.mark.parametrize(("make", "outputs"), [(ecoc(max_min(4, 7)), 7), (one_hot(4), 4)])
def test_training_with_and_without_kernels_agrees(make, outputs, device):
    torch.manual_seed(0)
    start = torch.nn.Conv2d(6, outputs, 1).to(device)
    images = torch.randn(2, 6, 2, 2, device=device)
    labels = F.interpolate(images[:, :4], (8, 8), mode="bilinear").argmax(1)
    curves = []
    for coding in pair(make, **({"reliability": 0.6} if outputs == 7 else {})):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        curve = []
        for step in range(5):
            target = coding.encode(labels) if step != 2 else coding.pseudo_label(model(images), (8, 8))
            loss = coding.loss(model(images), target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0][4] < curves[0][0]


@on_devices
def test_evaluation_with_and_without_kernels_agrees(device):
    torch.manual_seed(1)
    model = torch.nn.Conv2d(3, 7, 5, stride=4, padding=2).to(device)
    samples = [(torch.randint(0, 256, (3, 10, 12), dtype=torch.uint8), random_labels(4, (10, 12), seed=15), None)]
    for spec in (EvalSpec(), EvalSpec(flip=True)):
        results = [evaluate({"m": model}, coding, samples, spec, normalize=Normalize(), device=device)["m"]
                   for coding in pair(ecoc(max_min(4, 7)))]
        assert torch.equal(results[0].confusion, results[1].confusion) and results[0].confusion.sum() > 50
        assert results[0].ece == pytest.approx(results[1].ece, abs=1e-3)
    wrong = [(samples[0][0], torch.full((10, 12), 9), None)]
    with pytest.raises(InputError, match="holds id 9"):
        evaluate({"m": model}, EcocCoding(max_min(4, 7), kernels="triton"), wrong, EvalSpec(), normalize=Normalize(),
                 device=device)


# ---- without a GPU and without the interpreter ------------------------------------------------------------------------


@without_interpreter
def test_a_choice_that_cannot_be_is_refused_and_others_fall_back():
    logits, book = torch.randn(1, 7, 2, 2), max_min(4, 7)
    for choice in ("auto", "torch"):
        assert not EcocCoding(book, kernels=choice).uses_kernels(logits, (8, 8), False)
    with pytest.raises(InputError, match="coding.kernels=triton needs a CUDA device, and this runs on cpu"):
        EcocCoding(book, kernels="triton").pseudo_label(logits)
    kernels.check("triton", "cuda")
    kernels.check("auto", "cpu")


@without_interpreter
def test_a_run_without_a_gpu_is_refused_before_it_starts(tmp_path):
    config = tiny_config(tmp_path, tmp_path)
    wanted = config.model_copy(update={"coding": config.coding.model_copy(update={"kernels": "triton"})})
    assert plan_resources(config, 4, 0) and plan_resources(wanted, 4, 1)
    with pytest.raises(InputError, match="coding.kernels=triton"):
        plan_resources(wanted, 4, 0)


@without_interpreter
def test_costs_are_what_is_moved_and_computed():
    found = costs("cross_entropy", 2, 19, 40, 8, 8, 32, 32)
    assert found.bytes == 2 * (2 * 19 * 8 * 8 * 4) + 2 * 32 * 32 * (8 + 4), "logits, their gradient, labels and weights"
    assert found.special == 2 * 32 * 32 * 21 and found.matrix_fma == 0
    labels = costs("ecoc_pseudo_label", 1, 19, 70, 8, 8, 8, 8, element=2)
    assert labels.bytes == 70 * 64 * 2 + 64 * (8 + 2 * 8 + 4 + 4) and labels.matrix_fma == 64 * 19 * 70
    assert labels.special == 64 * 140
    name, seconds = labels.bound(PEAKS["H100"])
    assert name == "bytes" and seconds == pytest.approx(labels.bytes / 3.35e12)
    assert labels.seconds(PEAKS["H200"])["special"] == pytest.approx(64 * 140 / 3.7e12)
    assert peak_of("NVIDIA H100 80GB HBM3") is PEAKS["H100"] and peak_of("NVIDIA A10G") is None


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
def test_what_no_kernel_takes_is_left_to_torch():
    coding = EcocCoding(random_codebook(4, 7), kernels="triton")
    logits = torch.randn(1, 7, 4, 4)
    assert coding.uses_kernels(logits, (16, 16), False) and not coding.uses_kernels(logits.double(), (16, 16), False)
    assert not coding.uses_kernels(torch.randn(1, 7, 40, 40), (10, 10), False), "a window of too many cells"
    assert not coding.uses_kernels(logits[:0], (16, 16), False)
    many = EcocCoding(random_codebook(4, 130), kernels="triton")
    wide = torch.randn(1, 130, 2, 2)
    assert not many.uses_kernels(wide, (4, 4), False)
    many.loss(wide, many.pseudo_label(wide, (4, 4)))


SIGNATURE = {"labels": "*i64", "words": "*i64", "codes": "*i64", "confusion": "*i64", "signs": "*fp32",
             "lower_y": "*i32", "lower_x": "*i32", "first_y": "*i32", "first_x": "*i32", "count_y": "*i32", "count_x": "*i32",
             "counts": "*i32", "bins": "*i32",
             **dict.fromkeys(["part_y", "part_x", "zeros", "confidence", "reliable", "weight", "divisor", "terms", "windows"],
                             "*fp32"),
             **dict.fromkeys(["threshold", "bce", "distance", "contrast", "temperature", "root_k", "eps"], "fp32")}


def spilled(kernel, dtype: str, **constants) -> int:
    """Compile a kernel for an H100, down to machine code; bytes of a thread's registers that went to memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"stride_x": 1, "label_x": 1, "word_x": 1, "weight_x": 1, "grad_x": 1} | constants
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = SIGNATURE | {"logits": f"*{dtype}", "gradient": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in kernel.arg_names}, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
    cubin = Path(compiled.metadata_group[f"{kernel.__name__}.cubin"])
    assert "wgmma" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"] or "gather" in kernel.__name__
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_case(name: str, num_classes: int, num_bits: int, dtype: str, identity: bool) -> int:
    from ecocseg.kernels import count, decode, loss
    from ecocseg.kernels.geometry import FLAT, TILE, class_pieces, output_pieces

    outputs = num_classes if "one_hot" in name or "cross" in name else num_bits
    size, pieces = output_pieces(outputs)
    class_size, number = class_pieces(num_classes)
    kernel = next(getattr(module, name) for module in (decode, loss, count) if hasattr(module, name))
    return spilled(kernel, dtype, TILE=TILE, FLAT=FLAT, CY=4, CX=4, IDENTITY=identity, K_FAST=dtype == "bf16", SIZE=size,
                   PIECES=pieces, CLASS_SIZE=class_size, CLASS_PIECES=number, WORDS=-(-num_bits // 64), FAST=True,
                   FORM="hybrid", BCE=True, DISTANCE=True, CONTRAST=True, STAND_IN=identity, GRADIENT=True, COLUMNS=32,
                   PADDED=48)


@without_interpreter
@pytest.mark.parametrize("name", ["ecoc_pseudo_label_kernel", "ecoc_loss_kernel", "cross_entropy_kernel", "gather_kernel"])
def test_kernels_compile_for_an_h100_without_spilling_registers(name):
    assert compile_case(name, 19, 40, "fp32", False) == 0


@pytest.mark.slow
@without_interpreter
@pytest.mark.parametrize(("num_classes", "num_bits", "dtype", "identity"), [
    (19, 40, "bf16", False), (19, 40, "fp32", True), (81, 60, "bf16", False), (150, 72, "fp16", False),
    (256, 128, "fp32", False)])
@pytest.mark.parametrize("name", ["ecoc_pseudo_label_kernel", "ecoc_loss_kernel", "ecoc_count_kernel",
                                  "one_hot_pseudo_label_kernel", "cross_entropy_kernel", "one_hot_count_kernel"])
def test_every_kernel_compiles_for_an_h100(name, num_classes, num_bits, dtype, identity):
    assert compile_case(name, num_classes, num_bits, dtype, identity) < 4096

"""FixMatch, UniMatch and UniMatch V2 against literal, slow readings of the papers, in float64 and pixel by pixel."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import tiny_plain
from torch import Tensor, nn

from ecocseg.codebook import max_min
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.config import MethodConfig, load, validate
from ecocseg.data.pipeline import Batch
from ecocseg.data.sources.demo import encode_png
from ecocseg.data.strong import StrongView
from ecocseg.data.transforms import WeakTransform
from ecocseg.errors import InputError
from ecocseg.evaluate import Normalize
from ecocseg.methods import METHODS, StepInput
from ecocseg.methods.base import random_generator
from ecocseg.methods.fixmatch import evaluating
from ecocseg.methods.supervised import hard_pixel_weight
from ecocseg.models.encoders import Encoder
from ecocseg.models.heads import Head
from ecocseg.models.segmenter import Segmenter
from ecocseg.target import reordered
from ecocseg.teacher import Teacher

N, H, W, SEED, STEP = 4, 10, 12, 5, 3
KINDS = ("fixmatch", "unimatch", "unimatch_v2")
CODINGS = ("one_hot", "ecoc")
THRESHOLD = {"one_hot": 0.46, "ecoc": 0.8}  # about half of the pixels are confident
IDENTITY = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
PLAIN = {"jitter_probability": 0.0, "blur_probability": 0.0, "average": "valid", "cutmix_probability": 1.0}


class TinyEncoder(Encoder):
    """Two maps, with a batch norm: a pass in training mode differs from one in eval mode."""

    def __init__(self, fine: int, coarse: int) -> None:
        layers = [nn.Conv2d(3, fine, 1), nn.BatchNorm2d(fine), nn.Conv2d(fine, coarse, 3, 2, 1)]
        super().__init__(nn.ModuleList(layers), (fine, coarse), (1, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.net[1](self.net[0](x.to(self.net[0].weight.dtype))).relu()
        return [fine, self.net[2](fine).tanh()]


class TinyHead(Head):
    def __init__(self, fine: int, coarse: int, outputs: int) -> None:
        super().__init__()
        self.fine, self.coarse, self.gain = nn.Conv2d(fine, outputs, 1), nn.Conv2d(coarse, outputs, 1), 9.0

    def forward(self, maps: Any) -> Tensor:
        return self.gain * (self.coarse(maps[1]) + F.avg_pool2d(self.fine(maps[0]), 2))


def tiny_model(outputs: int, fine: int = 6, coarse: int = 8) -> Segmenter:
    torch.manual_seed(1)
    model = Segmenter(TinyEncoder(fine, coarse), TinyHead(fine, coarse, outputs), outputs).double()
    model.encoder.net[1].running_mean.uniform_(-0.3, 0.3)
    return model


class Recorder:
    """Stands in for the engine: what the student was shown, and the factors of its features."""

    def __init__(self, model: Segmenter) -> None:
        self.model, self.seen = model, []

    def __call__(self, image: Tensor, feature_factors: Any = None) -> Tensor:
        assert self.model.training
        self.seen.append((image.detach().clone(), feature_factors))
        return self.model(image, feature_factors=feature_factors)


def coding_of(kind: str) -> Any:
    if kind == "one_hot":
        return OneHotCoding(N, align_corners=True)
    return EcocCoding(max_min(N, 7, 0), reliability=0.8, align_corners=True)


def make_batch(seed: int, labeled: bool = False, first: int = 8, count: int = 4) -> Batch:
    """Pictures of places first, first + 1, ... of a stream; a picture depends on its place alone."""
    images, labels, valid = [], [], torch.ones(count, H, W, dtype=torch.bool)
    for place in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        images.append(torch.randint(0, 256, (3, H, W), generator=generator, dtype=torch.uint8))
        labels.append(torch.randint(0, N, (H, W), generator=generator))
        if place % 2:
            valid[place - first, :, -3:] = False
            labels[-1][:2] = 255
    return Batch(image=torch.stack(images), labels=torch.stack(labels) if labeled else None, valid=valid,
                 positions=torch.arange(first, first + count), image_ids=[str(p) for p in range(first, first + count)])


def step_input(model: Segmenter, first: int = 8, count: int = 4, total: int = 4) -> StepInput:
    teacher = Teacher(copy.deepcopy(model), 0.9, whole=True)
    teacher.module.double()
    with torch.no_grad():
        teacher.module.decoder.coarse.weight.mul_(0.8)  # a teacher that is not the student
    labeled, unlabeled, partner = (make_batch(n, n == 1, first, count) for n in (1, 2, 3))
    return StepInput(STEP, SEED, labeled, unlabeled, Recorder(model), teacher, nullcontext, partner=partner, model=model,
                     unlabeled_total=total)


def build(kind: str, coding: str, **options: Any) -> Any:
    settings = {**PLAIN, "kind": kind, "confidence_threshold": THRESHOLD[coding], **options}
    return METHODS[kind](MethodConfig(**settings), coding_of(coding), IDENTITY)


def upsampled(logits: Tensor) -> Tensor:
    return F.interpolate(logits, (H, W), mode="bilinear", align_corners=True)


def guesses(coding: Any, logits: Tensor, valid: Tensor, threshold: float, weighting: str) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, dense bits and weights of each pixel, literally. Padding: label 255, weight 0."""
    B = len(logits)
    labels, weight = torch.empty(B, H, W, dtype=torch.long), torch.zeros(B, H, W, dtype=torch.float64)
    bits = torch.zeros(B, coding.num_outputs, H, W, dtype=torch.bool)
    confident = torch.zeros(B, H, W, dtype=torch.bool)
    for b, y, x in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(W)).tolist():
        z = logits[b, :, y, x]
        if isinstance(coding, OneHotCoding):
            p = z.softmax(0)
            labels[b, y, x], confidence = p.argmax(), p.max()
        else:
            codes = coding.codebook.matrix.tolist()
            labels[b, y, x], hybrid, confidence, _ = reference.pseudo_label_pixel(z.tolist(), codes, coding.reliability, None)
            bits[b, :, y, x] = torch.tensor(hybrid, dtype=torch.bool)
        confident[b, y, x] = bool(confidence >= threshold) and bool(valid[b, y, x])
        if not valid[b, y, x]:
            labels[b, y, x] = 255
    assert 0.1 < confident.float().mean() < 0.95  # else the weights would test nothing
    for b in range(B):
        share = confident[b].sum().double() / valid[b].sum()
        weight[b] = confident[b].double() if weighting == "pixel" else share * valid[b]
    return labels, bits, weight


def pixel_loss(coding: Any, logits: Tensor, labels: Tensor, bits: Tensor, weight: Tensor) -> float:
    if isinstance(coding, OneHotCoding):
        return reference.cross_entropy(logits.detach(), labels, weight)
    return reference.loss(logits.detach(), labels, bits, weight, coding.codebook.matrix.tolist())["loss"]


def labeled_loss(coding: Any, logits: Tensor, labels: Tensor) -> float:
    bits = torch.zeros(len(labels), coding.num_outputs, H, W, dtype=torch.bool)
    if not isinstance(coding, OneHotCoding):
        for n, code in enumerate(coding.codebook.matrix.tolist()):
            bits = torch.where((labels == n)[:, None], torch.tensor(code, dtype=torch.bool)[None, :, None, None], bits)
    return pixel_loss(coding, logits, labels, bits, torch.ones(labels.shape)) / int((labels != 255).sum())


def box_of(view: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Where a view shows the partner; elsewhere it shows the image itself; the box is a rectangle. Shape: bool [B, H, W]."""
    pasted, kept = ((view == image.float() / 255).all(1) for image in (other, own))
    assert (pasted ^ kept).all()
    for mask in pasted:
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None]) and mask.float().mean() <= 0.4
    assert pasted.any((1, 2)).sum() >= len(pasted) / 2  # on so few pixels, the smallest boxes have none
    return pasted


def expected_step(kind: str, method: Any, given: StepInput, model: Segmenter, weighting: str) -> float:
    """The loss of a step, from the model as it was before and the views the student was shown."""
    coding, seen = method.coding, given.student.seen
    own, labeled = given.unlabeled, given.labeled
    threshold, order = method.config.confidence_threshold, [1, 0, 3, 2]
    train, size = copy.deepcopy(model).train(), len(labeled.image)
    labels_in, factors = seen[0]
    if kind == "unimatch_v2":
        assert factors is None and torch.equal(labels_in, labeled.image.float() / 255)
        clean = upsampled(train(labels_in))
        pseudo = guesses(coding, upsampled(given.teacher.module(own.image.float() / 255)), own.valid, threshold, weighting)
        other, other_valid, other_pseudo = own.image[order], own.valid[order], tuple(part[order] for part in pseudo)
    else:
        assert torch.equal(labels_in, torch.cat([labeled.image, own.image]).float() / 255)
        other, other_valid = given.partner.image, given.partner.valid
        eval_logits = copy.deepcopy(model).eval()(other.float() / 255)
        other_pseudo = guesses(coding, upsampled(eval_logits), other_valid, threshold, weighting)
        maps = train.encode(labels_in)
        clean = upsampled(train.decode(maps, (H, W)))
        pseudo = guesses(coding, clean[size:], own.valid, threshold, weighting)
    total = labeled_loss(coding, clean[:size], labeled.labels)
    if kind == "unimatch":
        dropped = upsampled(train.decode([m * f[len(m):, :, None, None] for m, f in zip(maps, factors, strict=True)], (H, W)))
        total += 0.5 * pixel_loss(coding, dropped[size:], *pseudo) / int(own.valid.sum())
    strong, factors = seen[1]
    after = train.encode(strong)
    if kind == "unimatch_v2":
        after = [m * f[:, :, None, None] for m, f in zip(after, factors, strict=True)]
    views = upsampled(train.decode(after, (H, W))).chunk(len(strong) // len(own.image))
    for view, logits in zip(strong.chunk(len(views)), views, strict=True):
        box = box_of(view, own.image, other)
        mixed = [torch.where(box if a.ndim == 3 else box[:, None], b, a) for a, b in zip(pseudo, other_pseudo, strict=True)]
        valid = torch.where(box, other_valid, own.valid)
        share = {"fixmatch": 1, "unimatch": 0.25, "unimatch_v2": 0.5}[kind]
        total += share * pixel_loss(coding, logits, *mixed) / int(valid.sum())
    return total / 2


@pytest.mark.parametrize("weighting", ["pixel", "image"])
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_a_literal_one(kind: str, coding: str, weighting: str) -> None:
    method = build(kind, coding, weighting=weighting)
    model = tiny_model(method.coding.num_outputs)
    before, given = copy.deepcopy(model), step_input(model)
    loss = sum(part().item() for part in method.parts(given))
    assert len(given.student.seen) == 2
    assert loss == pytest.approx(expected_step(kind, method, given, before, weighting), rel=1e-8)
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_by_coding_is_image_with_ecoc_and_pixel_with_one_hot(kind: str) -> None:
    for coding, weighting in (("ecoc", "image"), ("one_hot", "pixel")):
        losses = []
        for chosen in ("by_coding", weighting, {"image": "pixel", "pixel": "image"}[weighting]):
            method = build(kind, coding, weighting=chosen)
            losses.append(sum(part().item() for part in method.parts(step_input(tiny_model(method.coding.num_outputs)))))
        assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", KINDS)
def test_views_factors_and_counts_are_those_of_any_number_of_workers(kind: str) -> None:
    """One batch of 8 and four of 2 (workers or micro-batches) show the same strong views of the same images."""
    options = {"jitter": 0.5, "jitter_hue": 0.25, "grey_probability": 0.3, "jitter_probability": 0.8, "blur_probability": 0.5,
               "cutmix_probability": 0.6}

    def shown(first: int, count: int) -> tuple[Tensor, list[Tensor], Tensor]:
        method = build(kind, "ecoc", **options)
        given = step_input(tiny_model(7), first, count, total=8)
        for part in method.parts(given):
            part()
        strong, factors = given.student.seen[1]
        if kind == "unimatch":
            factors = given.student.seen[0][1]
        shape = (-1, count) if kind != "unimatch" else (-1, 2, count)  # clean and dropped views, labelled and unlabelled
        return (strong.view(-1, count, 3, H, W), [f.view(*shape, f.shape[1]) for f in factors or []],
                method.unlabeled_pixels(given))

    whole, parts = shown(16, 8), [shown(first, 2) for first in (16, 18, 20, 22)]
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts], 1))
    for level, factors in enumerate(whole[1]):
        assert torch.equal(factors, torch.cat([part[1][level] for part in parts], -2))
    assert torch.equal(whole[2], torch.stack([part[2] for part in parts]).sum(0))
    again = shown(24, 8)
    assert not torch.equal(whole[0], again[0])


def test_the_divisors_of_a_step_are_used() -> None:
    """Losses are sums over pixels divided by the counts of the whole batch, not of this worker's."""
    method = build("fixmatch", "ecoc")
    plain, other = (step_input(tiny_model(7)) for _ in range(2))
    counts = method.unlabeled_pixels(plain)
    other.unlabeled_divisors, other.divisor = counts * 2.0, (plain.labeled.labels != 255).sum() * 4.0
    one, two = ([part().item() for part in method.parts(given)] for given in (plain, other))
    assert two == pytest.approx([one[0] / 4, one[1] / 2])


def test_channels_dropped_by_unimatch_v2_complement_one_another() -> None:
    method = build("unimatch_v2", "ecoc")
    given = step_input(tiny_model(7), 40, 10, total=10)
    factors = method.complementary_channels(given)
    assert [f.shape for f in factors] == [(20, 6), (20, 8)]
    assert torch.equal(factors[0], factors[1][:, :6])  # one mask for all maps
    first, second = factors[1].chunk(2)
    assert torch.equal(first + second, torch.full((10, 8), 2.0))
    whole = (first == 1).all(1)
    assert whole.sum() == 5 and set(first[~whole].unique().tolist()) == {0.0, 2.0}
    one = build("unimatch_v2", "ecoc", whole_pairs=0.0).complementary_channels(given)[1].chunk(2)[0]
    assert not (one == 1).any() and 0.2 < (one == 0).float().mean() < 0.8


def test_channels_dropped_by_unimatch_are_each_maps_and_images_own() -> None:
    method = build("unimatch", "ecoc")
    given = step_input(tiny_model(7), 0, 50, total=50)
    factors = method.dropped_channels(given)
    for number, width in enumerate((6, 8)):
        clean, dropped = factors[number].chunk(2)
        assert clean.shape == (100, width) and (clean == 1).all()
        assert set(dropped.unique().tolist()) == {0.0, 2.0} and 0.4 < (dropped == 0).float().mean() < 0.6
        assert len(dropped.unique(dim=0)) > 30
    assert not torch.equal(factors[0], factors[1][:, :6])
    third = build("unimatch", "ecoc", feature_dropout=0.25).dropped_channels(given)[1][100:]
    assert third.unique().tolist() == pytest.approx([0, 4 / 3]) and 0.2 < (third == 0).float().mean() < 0.3


def test_targets_are_reordered_field_by_field() -> None:
    coding = coding_of("ecoc")
    target = coding.pseudo_label(torch.randn(4, 7, H, W))
    target.weight = torch.rand(4, H, W)
    order = torch.tensor([1, 0, 3, 2])
    other = reordered(target, order)
    for name in ("labels", "weight", "is_true", "bits", "confidence", "reliable"):
        assert torch.equal(getattr(other, name), getattr(target, name)[order]), name


def test_a_strong_view_is_its_generators_alone() -> None:
    image = make_batch(7, count=3).image
    view = StrongView()

    def made(images: Tensor, *numbers: int) -> Tensor:
        return view(images, [random_generator(0, n) for n in numbers])

    assert torch.equal(made(image, 4, 5, 6)[1:2], made(image[1:2], 5))
    assert not torch.equal(made(image[:1], 4), made(image[:1], 5))
    many = torch.cat([made(image[:1], n) for n in range(60)])
    assert many.min() >= 0 and many.max() <= 1
    grey = ((many[:, 0] - many[:, 1]).abs().amax((1, 2)) < 1e-6).float().mean()
    kept = (many == image[:1].float() / 255).flatten(1).all(1).float().mean()
    assert 0.08 < grey < 0.35 and 0.01 < kept < 0.2  # 0.2; 0.2 * 0.8 * 0.5
    none = StrongView(jitter_probability=0, grey_probability=0, blur_probability=0)
    assert torch.equal(none(image, [random_generator(n) for n in range(3)]), image.float() / 255)
    dates = view(torch.cat([image, image], 1), [random_generator(n) for n in range(3)])
    assert dates.shape == (3, 6, H, W) and not torch.equal(dates[:, :3], dates[:, 3:])


def test_hard_pixels_are_chosen_image_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    certainty = torch.rand(3, H, W, generator=generator, dtype=torch.float64)
    certainty[1] = certainty[1] / 10 + 0.9  # easy: only the least hard ones are taken
    labels = torch.randint(0, N, (3, H, W), generator=generator)
    labels[2, :, :6] = 255
    weight = hard_pixel_weight(certainty, labels, 0.7, 30)
    for b in range(3):
        known = [(float(certainty[b, y, x]), y, x) for y in range(H) for x in range(W) if labels[b, y, x] != 255]
        hard = [p for p in known if p[0] <= 0.7]
        if len(hard) < 30:
            hard = sorted(known)[:30]
        want = torch.zeros(H, W)
        for _, y, x in hard:
            want[y, x] = 1 / len(hard)
        torch.testing.assert_close(weight[b], want)
    assert (weight[1] > 0).sum() == 30 and weight.sum().item() == pytest.approx(3)


@pytest.mark.parametrize("kind", CODINGS)
def test_certainty_is_the_probability_of_the_target(kind: str) -> None:
    coding = coding_of(kind)
    logits = torch.randn(2, coding.num_outputs, H, W, dtype=torch.float64)
    labels = torch.randint(0, N, (2, H, W))
    certainty = coding.certainty(logits, coding.encode(labels))
    for b, y, x in ((0, 0, 0), (1, 4, 7), (0, 9, 11)):
        z, label = logits[b, :, y, x], int(labels[b, y, x])
        if kind == "one_hot":
            want = z.softmax(0)[label].item()
        else:
            code = coding.codebook.matrix[label].tolist()
            want = sum(reference.sigmoid(v if bit else -v) for v, bit in zip(z.tolist(), code, strict=True)) / len(code)
        assert certainty[b, y, x].item() == pytest.approx(want)


def test_eval_mode_is_left_again() -> None:
    model = tiny_model(4)
    model.encoder.net[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and not model.encoder.net[1].training


def test_whole_teacher_averages_buffers_and_copies_first() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    teacher = Teacher(student, 0.8, whole=True)
    want: dict[str, Tensor] = {}
    for t in range(12):
        with torch.no_grad():
            for value in [*student.parameters(), student[1].running_mean, student[1].running_var]:
                value.add_(torch.rand_like(value))
        student[1].num_batches_tracked += 1
        teacher.update(student)
        alpha = min(1 - 1 / (t + 1), 0.8)
        for name, value in student.state_dict().items():
            want[name] = alpha * want[name] + (1 - alpha) * value if t and value.is_floating_point() else value.clone()
        for name, value in teacher.module.state_dict().items():
            torch.testing.assert_close(value, want[name])
    assert not any(module.training for module in teacher.module.modules())


@pytest.mark.parametrize(("changes", "message"), [
    ({"method__kind": "unimatch", "method__feature_distance": 0.1}, "method.feature_distance: method.kind=unimatch has no"),
    ({"method__kind": "fixmatch", "method__ignore_top": 3}, "method.ignore_top: method.kind=fixmatch has no such"),
    ({"method__weighting": "by_coding"}, "with method.kind=self_training use image, batch or pixel"),
    ({"method__dice": True}, "method.dice: method.kind=self_training has no such loss"),
    ({"method__ohem_threshold": 0.7, "model__head": "hrda"}, "method.ohem_threshold: does not go with model.head=hrda"),
])
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(InputError, match=message):
        validate(tiny_plain(tmp_path, tmp_path, **changes))


def test_labelled_images_alone_can_be_trained_by_the_same_recipe() -> None:
    for name in ("unimatch_acdc_1", "unimatch_cityscapes_1_16"):
        assert load(name, overrides=["method.kind=supervised"]).streams == ("labeled",)


def test_unimatch_v2_needs_pairs(tmp_path: Any) -> None:
    from ecocseg.batching import micro_batches

    config = validate(tiny_plain(tmp_path, tmp_path, method__kind="unimatch_v2"))
    assert micro_batches(config, 2) == 1 and micro_batches(config.updated(train={"micro_batch": 2}), 1) == 2
    with pytest.raises(InputError, match="unimatch_v2 pastes pairs of images, and 4 worker"):
        micro_batches(config, 4)
    with pytest.raises(InputError, match="into pairs of unlabelled images; raise it"):
        micro_batches(config.updated(train={"micro_batch": 1}), 1)


# --- cardiac slices and pairs of dates

@pytest.mark.parametrize("weighting", ["pixel", "image"])
@pytest.mark.parametrize("kind", CODINGS)
def test_soft_dice_is_that_of_each_map_over_the_weighted_pixels(kind: str, weighting: str) -> None:
    method = build("unimatch", kind, dice=True, weighting=weighting)
    coding = method.coding
    logits = 3 * torch.randn(2, coding.num_outputs, H, W, dtype=torch.float64)
    target = coding.pseudo_label(logits + torch.randn_like(logits))
    target.weight = (torch.rand(2, H, W, dtype=torch.float64) < 0.6).double()
    if weighting == "image":
        target.weight = torch.tensor([0.3, 0.9], dtype=torch.float64)[:, None, None].expand(2, H, W).clone()
    target.labels[0, :3] = 255
    weight = target.weight * (target.labels != 255)
    maps = []
    if kind == "one_hot":
        maps = [(logits.softmax(1)[:, n], (target.labels == n).double()) for n in range(N)]
    else:
        for k in range(coding.num_outputs):
            p, b = logits[:, k].sigmoid(), target.dense_bits(coding.num_outputs)[:, k].double()
            maps += [(p, b), (1 - p, 1 - b)]
    dice = [1 - (2 * (weight * p * t).sum() + 1e-5) / ((weight * p * p).sum() + (weight * t * t).sum() + 1e-5) for p, t in maps]
    want = torch.stack(dice).mean() * weight.sum() / (weight > 0).sum()
    assert method.dice_loss(logits, target).item() == pytest.approx(want.item(), rel=1e-8)


def test_dice_replaces_the_loss_of_views_and_halves_that_of_labels() -> None:
    plain, dice = build("fixmatch", "one_hot"), build("fixmatch", "one_hot", dice=True)
    given = [step_input(tiny_model(N)) for _ in range(2)]
    for method, one in zip((plain, dice), given, strict=True):
        for part in method.parts(one):
            part()
    logits = given[0].student.model(given[0].student.seen[0][0])[:4]
    target = plain.coding.encode(given[0].labeled.labels)
    mean = (given[0].metrics["loss/labeled"] + plain.dice_loss(logits, target)) / 2
    assert given[1].metrics["loss/labeled"].item() == pytest.approx(mean.item())
    assert 0 < given[1].metrics["loss/strong1"] < 1


def pngs(*arrays: Any) -> list[bytes]:
    return [encode_png(array) for array in arrays]


def test_two_dates_are_cropped_and_flipped_alike() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 200, (20, 30, 3), dtype=np.uint8)
    image, later, mask = pngs(first, first + 50, first[..., 0] // 100)
    for seed in range(6):
        transform = WeakTransform(crop=(24, 16), scale=(0.8, 1.2), max_class_share=1, dates=2)
        sample = transform(image, mask, np.random.default_rng(seed), image_b_bytes=later)
        inside = sample.valid
        assert sample.image.shape == (6, 24, 16)
        before, after = (part[:, inside].astype(int) for part in np.split(sample.image, 2))
        assert np.abs(after - before - 50).max() <= 1
    with pytest.raises(InputError, match="there is no second date; pack pairs"):
        transform(image, mask, np.random.default_rng(0))
    with pytest.raises(InputError, match="the dates are 30x20 and 15x10"):
        transform(image, mask, np.random.default_rng(0), image_b_bytes=encode_png(first[::2, ::2]))


def test_slices_are_turned_with_their_masks() -> None:
    grey = np.zeros((40, 30), np.uint8)
    grey[5:15, 4:12] = 2
    image, mask = pngs(np.repeat(grey[..., None] * 100, 3, 2), grey)
    transform = WeakTransform(crop=(32, 32), resize=(32, 32), flip=0, max_class_share=1, turn=True)
    plain = WeakTransform(crop=(32, 32), resize=(32, 32), flip=0, max_class_share=1)(image, mask, np.random.default_rng(0))
    kinds = set()
    for seed in range(60):
        sample = transform(image, mask, np.random.default_rng(seed))
        assert ((sample.image[0] > 100) == (sample.labels == 2)).mean() > 0.95
        turns = [np.rot90(plain.labels, k) for k in range(4)]
        flips = [turned[:, ::-1] for turned in turns]
        kinds.add("as it was" if (sample.labels == plain.labels).all() else "quarter" if any(
            (sample.labels != turned).mean() < 0.01 for turned in (*turns, *flips)) else "rotated")
    assert kinds == {"as it was", "quarter", "rotated"}


@pytest.mark.parametrize("kind", ["fixmatch", "unimatch", "unimatch_v2"])
def test_shares_of_classes_and_of_confident_pixels_are_logged(kind: str) -> None:
    """Of the weak view's labels, padding left out."""
    method, given = build(kind, "ecoc"), step_input(tiny_model(7))
    given.pictures = {}
    for part in method.parts(given):
        part()
    target, valid = given.pictures["pseudo"], given.unlabeled.valid
    known = target.labels[:, ::4, ::4][valid[:, ::4, ::4]]
    for n in range(N):
        assert given.metrics[f"pseudo_share/{n}"].item() == pytest.approx((known == n).double().mean().item())
    confident = (target.confidence >= THRESHOLD["ecoc"])[valid].double().mean().item()
    assert given.metrics["pseudo/confident_share"].item() == pytest.approx(confident) and 0 < confident < 1
    assert {"pseudo/corrected_bits", "pseudo/differing_bits", "pseudo/weight", "pseudo/confidence"} <= set(given.metrics)

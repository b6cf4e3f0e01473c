"""MIC against a literal, slow reading of the paper in float64: every image shown, every pixel's target and weight."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from ecocseg.codebook import max_min
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.config import MethodConfig, load, validate
from ecocseg.data import mixing
from ecocseg.data.pipeline import Batch
from ecocseg.errors import InputError
from ecocseg.evaluate import Normalize
from ecocseg.methods import METHODS, StepInput
from ecocseg.methods.base import random_generator
from ecocseg.methods.mic import MASK_COLOUR
from ecocseg.models.hrda import Box, TwoScaleLogits
from ecocseg.target import reordered
from ecocseg.teacher import Teacher

N, K, SIDE, BLOCK, STEP, SEED = 5, 8, 16, 4, 4, 7
THRESHOLD = {"one_hot": 0.9, "ecoc": 0.8}  # about half of the pixels are confident
NORMALIZE = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
PLAIN = {"jitter_probability": 0.0, "blur_probability": 0.0, "mask_block": BLOCK, "mask_ratio": 0.5}
CODINGS = ("one_hot", "ecoc")


def coding_of(kind: str) -> Any:
    return OneHotCoding(N) if kind == "one_hot" else EcocCoding(max_min(N, K, 0), reliability=0.85)


def make_batch(seed: int, labeled: bool, count: int = 2, side: int = SIDE) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, N, (count, side, side), generator=generator)
    labels[0, :2] = 255
    valid = torch.ones(count, side, side, dtype=torch.bool)
    valid[1:, :, -3:] = False
    return Batch(torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8),
                 labels if labeled else None, valid, torch.arange(10, 10 + count), [str(i) for i in range(count)])


class Student(nn.Module):
    """A pixel by itself, in float64; it keeps what it was shown. With a box it answers as HRDA does in training."""

    def __init__(self, outputs: int, box: Box | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.whole, self.detail = nn.Conv2d(3, outputs, 1).double(), nn.Conv2d(3, outputs, 1).double()
        self.box, self.seen = box, []

    def forward(self, image: Tensor) -> Any:
        self.seen.append(image.detach().clone())
        image = image.double()
        if self.box is None or not self.training:
            return self.whole(image) * 3
        rows, columns = self.box.slices()
        return TwoScaleLogits(self.whole(image) * 3, self.detail(image[..., rows, columns]) * 2, self.box, 0.1)


def build(kind: str, box: Box | None = None, **options: Any) -> tuple[Any, StepInput]:
    """The method, and a step of two source and two target images."""
    coding = coding_of(kind)
    student = Student(coding.num_outputs, box)
    teacher = Teacher(student, 0.9)
    teacher.module.double()
    with torch.no_grad():
        teacher.module.whole.weight.mul_(1.5)
    method = METHODS["mic"](MethodConfig.model_validate({"kind": "mic", **PLAIN, "confidence_threshold": THRESHOLD[kind],
                                                         **options}), coding, NORMALIZE)
    return method, StepInput(STEP, SEED, make_batch(1, True), make_batch(2, False), student.train(), teacher, nullcontext)


def guess(coding: Any, z: list[float]) -> tuple[int, list[int], float]:
    """Class, bits and confidence of one pixel's pseudo-label."""
    if isinstance(coding, EcocCoding):
        return reference.pseudo_label_pixel(z, coding.codebook.matrix.tolist(), coding.reliability, None)[:3]
    total = sum(math.exp(v) for v in z)
    return z.index(max(z)), [], max(math.exp(v) / total for v in z)


def pseudo_labels(coding: Any, given: StepInput) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B, H, W], bits [B, K, H, W] and weights [B, H, W]: the share of an image's confident pixels, none on padding."""
    logits = given.teacher.module.whole(NORMALIZE(given.unlabeled.image).double()) * 3
    count = len(logits)
    labels, bits = torch.zeros(count, SIDE, SIDE, dtype=torch.int64), torch.zeros(count, K, SIDE, SIDE)
    weight = torch.zeros(count, SIDE, SIDE, dtype=torch.float64)
    for b in range(count):
        confident = 0
        for y in range(SIDE):
            for x in range(SIDE):
                labels[b, y, x], code, confidence = guess(coding, logits[b, :, y, x].tolist())
                bits[b, :len(code), y, x] = torch.tensor(code)
                confident += confidence >= THRESHOLD["ecoc" if code else "one_hot"]
        assert 0.1 < confident / SIDE**2 < 0.9  # else the weights would test nothing
        weight[b] = confident / SIDE**2 * given.unlabeled.valid[b]
    return labels, bits, weight


def true_labels(coding: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bits = torch.zeros(len(labels), K, SIDE, SIDE)
    if isinstance(coding, EcocCoding):
        codes = torch.tensor(coding.codebook.matrix, dtype=torch.float32)
        bits = codes[labels.clamp_max(N - 1)].permute(0, 3, 1, 2)
    return labels, bits, torch.ones(labels.shape, dtype=torch.float64)


def mean_loss(coding: Any, logits: Tensor, labels: Tensor, bits: Tensor, weight: Tensor) -> float:
    """Over all pixels, ignored ones and those of no weight too."""
    if isinstance(coding, EcocCoding):
        return reference.loss(logits, labels, bits, weight, coding.codebook.matrix.tolist())["loss"] / labels.numel()
    return reference.cross_entropy(logits, labels, weight) / labels.numel()


def image_loss(coding: Any, student: Student, image: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> float:
    with torch.no_grad():
        if student.box is None:
            return mean_loss(coding, student.whole(image.double()) * 3, *target)
        rows, columns = student.box.slices()
        part = [field[..., rows, columns] for field in target]
        detail = student.detail(image[..., rows, columns].double()) * 2
        return (0.9 * mean_loss(coding, student.whole(image.double()) * 3, *target) + 0.1 * mean_loss(coding, detail, *part))


def joined(mask: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(mask[:, None] if x.dim() == 4 else mask, x, y) for x, y in zip(a, b, strict=True))


def pasted_on(mixed: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Where a mixed image shows the source. Shape: bool [B, H, W]."""
    pasted, kept = (mixed == source).all(1), (mixed == target).all(1)
    assert (pasted ^ kept).all() and pasted.any() and kept.any()
    return pasted


def blocks_left(masked: Tensor, image: Tensor) -> Tensor:
    """Which blocks of each image are as they were; the others are 0 throughout. Shape: bool [B, rows, columns]."""
    left, blank = (masked == image).all(1), (masked == 0).all(1)
    assert (left ^ blank).all()
    grid = left.view(len(left), SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK)
    assert (grid == grid[:, :, :1, :, :1]).all()
    return grid[:, :, 0, :, 0]


@pytest.mark.parametrize("kind", CODINGS)
@pytest.mark.parametrize(("masked_images", "box"), [("target", None), ("source_and_target", None),
                                                    ("target", Box(4, 8, 12, 16)), ("source_and_target", Box(0, 2, 8, 10))])
def test_a_step_equals_a_literal_one(kind: str, masked_images: str, box: Box | None) -> None:
    method, given = build(kind, box, masked_images=masked_images, masked_weight=0.7, mixed_weight=0.9)
    student, coding = given.student, method.coding
    got = [part() for part in method.parts(given)]
    assert len(got) == len(student.seen) == 3 and len(given.teacher.module.seen) == 1  # labelled once for both
    source, target = NORMALIZE(given.labeled.image), NORMALIZE(given.unlabeled.image)
    true, pseudo = true_labels(coding, given.labeled.labels), pseudo_labels(coding, given)

    assert torch.equal(student.seen[0], source)
    labeled = image_loss(coding, student, source, true)
    pasted = pasted_on(student.seen[1], source, target)
    mixed = image_loss(coding, student, student.seen[1], joined(pasted, true, pseudo))
    is_source = torch.tensor([masked_images == "source_and_target", False])  # places 10 and 11
    shown = torch.where(is_source[:, None, None, None], source, target)
    left = blocks_left(student.seen[2], shown)
    assert 0 < left[0].sum() < left[0].numel() and not torch.equal(left[0], left[1])
    masked = image_loss(coding, student, student.seen[2], joined(is_source[:, None, None].expand(2, SIDE, SIDE), true, pseudo))

    for mine, want in zip(got, (labeled, 0.9 * mixed, 0.7 * masked), strict=True):
        assert mine.dtype == torch.float64 and mine.item() == pytest.approx(want, abs=1e-8)
    sum(got).backward()
    assert student.whole.weight.grad.abs().sum() > 0


def test_colour_is_drawn_apart_from_that_of_the_mixed_image() -> None:
    sure = {"jitter_probability": 1.0, "blur_probability": 1.0}
    method, given = build("ecoc", **sure)
    for part in method.parts(given):
        part()
    unit = given.unlabeled.image.float() / 255
    own = NORMALIZE(method.colour(unit, given, MASK_COLOUR))
    keep = method.kept_blocks(given)
    assert torch.equal(given.student.seen[2], own * keep[:, None])
    pasted_free = given.student.seen[1] == NORMALIZE(method.colour(unit, given, MASK_COLOUR))
    assert pasted_free.float().mean() < 0.1
    plain, again = build("ecoc", **sure, masked_colour=False)
    plain.masked_loss(again, plain.pseudo_label(again))
    assert torch.equal(again.student.seen[-1], NORMALIZE(again.unlabeled.image) * keep[:, None])


@pytest.mark.parametrize(("ratio", "block", "side"), [(0.7, 64, 1024), (0.25, 16, 512), (0.0, 64, 128)])
def test_blocks_are_blanked_at_the_stated_ratio(ratio: float, block: int, side: int) -> None:
    method, given = build("ecoc", mask_ratio=ratio, mask_block=block)
    blanked = []
    for step in range(12):
        later = replace(given, step=step, unlabeled=make_batch(2, False, side=side))
        grid = ~method.kept_blocks(later).view(2, side // block, block, side // block, block)
        assert (grid == grid[:, :, :1, :, :1]).all()
        blanked.append(grid[:, :, 0, :, 0].float())
        neighbours = grid[:, :, 0, 1::2, 0] == grid[:, :, 0, ::2, 0]
        assert ratio == 0 or neighbours.float().mean() < 0.8  # blocks are no larger
    share, count = torch.stack(blanked).mean().item(), 12 * 2 * (side // block) ** 2
    assert abs(share - ratio) <= 4 * math.sqrt(ratio * (1 - ratio) / count)
    assert ratio == 0 or len({tuple(b.flatten().tolist()) for pair in blanked for b in pair}) == 24


def cut(given: StepInput, rows: slice) -> StepInput:
    """The part of a step that a worker or micro-batch gets."""
    def part(batch: Batch) -> Batch:
        labels = None if batch.labels is None else batch.labels[rows]
        return replace(batch, image=batch.image[rows], labels=labels, valid=batch.valid[rows],
                       positions=batch.positions[rows], image_ids=batch.image_ids[rows])
    return replace(given, labeled=part(given.labeled), unlabeled=part(given.unlabeled), metrics={})


@pytest.mark.parametrize("kind", CODINGS)
@pytest.mark.parametrize("masked_images", ["target", "source_and_target"])
@pytest.mark.parametrize("colour", [0.0, 1.0])
def test_any_number_of_workers_makes_the_same_step(kind: str, masked_images: str, colour: float) -> None:
    method, given = build(kind, masked_images=masked_images, jitter_probability=colour, blur_probability=colour)
    given.labeled, given.unlabeled = make_batch(1, True, 4), make_batch(2, False, 4)
    given.labeled.labels[1:] %= 2  # one image alone has the other classes
    given.mix_classes = method.classes_present(given)
    student = given.student
    want = [part().item() for part in method.parts(given)]
    whole, student.seen[:] = list(student.seen), []
    torch.manual_seed(99)  # torch's own state does not matter
    parts = [cut(given, slice(first, first + 1)) for first in range(4)]
    got = [[part().item() for part in method.parts(one)] for one in reversed(parts)]
    for number in range(3):
        images = torch.cat(student.seen[number::3][::-1])
        torch.testing.assert_close(images, whole[number])
        assert sum(losses[number] for losses in got) / 4 == pytest.approx(want[number], abs=1e-6)


def test_masks_change_with_step_seed_and_place_alone() -> None:
    method, given = build("ecoc", mask_block=2)
    first = method.kept_blocks(given)
    assert torch.equal(first, method.kept_blocks(given)) and not torch.equal(first[0], first[1])
    moved = replace(given.unlabeled, positions=given.unlabeled.positions + 1)
    assert torch.equal(method.kept_blocks(replace(given, unlabeled=moved))[0], first[1])
    for other in (replace(given, step=STEP + 1), replace(given, seed=SEED + 1)):
        assert not torch.equal(method.kept_blocks(other), first)


@pytest.mark.parametrize("kind", CODINGS)
def test_pseudo_labels_matter(kind: str) -> None:
    method, given = build(kind)
    pseudo = method.pseudo_label(given)
    loss = method.masked_loss(given, pseudo)
    assert method.masked_loss(given, pseudo) == loss
    assert method.masked_loss(given, reordered(pseudo, torch.tensor([1, 0]))) != loss
    nothing = replace(pseudo, weight=torch.zeros_like(pseudo.weight))
    assert method.masked_loss(given, nothing) == 0


def test_recipes_ask_for_the_published_options() -> None:
    for name, images in (("mic_gta2cityscapes", "target"), ("mic_synthia2cityscapes", "target"),
                         ("mic_cityscapes2acdc", "source_and_target"), ("mic_cityscapes2darkzurich", "source_and_target")):
        config = load(name)
        method, data = config.method, config.data
        on_cityscapes = images == "target"
        assert (method.mask_ratio, method.mask_block, method.masked_weight, method.ema_decay) == (0.7, 64, 1.0, 0.999)
        assert (method.masked_images, method.masked_colour) == (images, on_cityscapes)
        assert data.unlabeled_margins == ((30, 240, 30, 30) if on_cityscapes else (0, 0, 0, 0))
        assert (method.ignore_top, method.ignore_bottom, method.feature_distance) == (0, 0, 0.005)
        assert data.crop == config.eval.crop == (1024, 1024) and config.eval.stride == config.model.detail_crop == (512, 512)
        assert config.eval.mode == "slide" and config.eval.resize == data.resize_unlabeled
        assert config.eval.scored_classes is None or len(config.eval.scored_classes) == 16
        assert (config.published is None) == (not on_cityscapes)


def test_margins_must_leave_something() -> None:
    with pytest.raises(InputError, match="unlabeled_margins"):
        validate({"data": {"labeled": "a", "unlabeled": "b", "resize_unlabeled": [100, 100],
                           "unlabeled_margins": [50, 50, 0, 0]}})
    with pytest.raises(InputError, match="unlabeled_margins"):
        validate({"data": {"labeled": "a", "unlabeled": "b", "unlabeled_margins": [0, 0, -1, 0]}})


def test_block_grids_reach_over_odd_sizes() -> None:
    mask = mixing.patch_mask((70, 33), 32, 0.5, generator=random_generator(1))
    assert mask.shape == (70, 33)

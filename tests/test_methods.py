"""The methods against literal, slow readings of the papers: what the student is shown, with which targets and weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import reference
import torch
from reference import PixelStudent
from torch import Tensor, nn

from ecocseg.codebook import max_min
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.config import MethodConfig
from ecocseg.data.pipeline import Batch
from ecocseg.evaluate import Normalize
from ecocseg.methods import METHODS, StepInput
from ecocseg.methods.self_training import feature_distance
from ecocseg.teacher import Teacher

N, H, W = 5, 8, 8  # of 2 x 64 pixels a share is exact in float32 too
THRESHOLD = {"one_hot": 0.7, "ecoc": 0.85}  # about half of the pixels are confident
IDENTITY = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
PLAIN = {"jitter_probability": 0.0, "blur_probability": 0.0}


def coding_of(kind: str) -> Any:
    return OneHotCoding(N) if kind == "one_hot" else EcocCoding(max_min(N, 8, 0), reliability=0.8)


def make_batch(seed: int, labeled: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, N, (2, H, W), generator=generator)
    labels[0, :2] = 255
    labels[1] %= 2  # two classes of six that the batch has
    valid = torch.ones(2, H, W, dtype=torch.bool)
    valid[1, :, -3:] = False
    return Batch(image=torch.randint(0, 256, (2, 3, H, W), generator=generator, dtype=torch.uint8),
                 labels=labels if labeled else None, valid=valid, positions=torch.tensor([10, 11]), image_ids=["a", "b"])


def run(kind: str, **options: Any) -> tuple[PixelStudent, Any, StepInput, list[Tensor]]:
    coding = coding_of(kind)
    student = PixelStudent(coding.num_outputs)
    teacher = Teacher(student, 0.9)
    teacher.module.double()
    method = METHODS["self_training"](MethodConfig(**{**PLAIN, **options}), coding, IDENTITY)
    given = StepInput(4, 0, make_batch(1, True), make_batch(2, False), student, teacher, nullcontext)
    losses = [part() for part in method.parts(given)]
    return student, coding, given, losses


def coded_parts(coding: Any) -> tuple[list[list[int]] | None, float]:
    """What the literal readings need of a coding: its codewords and T."""
    return (coding.codebook.matrix.tolist(), coding.reliability) if isinstance(coding, EcocCoding) else (None, 0.0)


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
@pytest.mark.parametrize(("weighting", "mix_classes"), [("image", "batch"), ("batch", "batch"), ("pixel", "image")])
def test_a_mixed_loss_equals_a_literal_one(kind: str, weighting: str, mix_classes: str) -> None:
    """Ignored rows, padding, the three weights, both ways to draw classes."""
    options = {"weighting": weighting, "confidence_threshold": THRESHOLD[kind], "ignore_top": 2, "ignore_bottom": 3,
               "mix_classes": mix_classes, "mixed_weight": 0.7}
    student, coding, given, losses = run(kind, **options)
    source, target, (codes, reliability) = given.labeled, given.unlabeled, coded_parts(coding)
    guessed = given.teacher.module(target.image.float() / 255)
    labels, bits = source.labels.clone(), reference.true_bits(source.labels, codes)
    confident, weight = torch.zeros(2, H, W, dtype=torch.bool), torch.ones(2, H, W, dtype=torch.float64)
    pasted = torch.empty(2, H, W, dtype=torch.bool)
    mixed_image = student.seen[1]
    for b in range(2):
        pasted[b] = (mixed_image[b] == source.image[b].float() / 255).all(0)
        kept = (mixed_image[b] == target.image[b].float() / 255).all(0)
        assert (pasted[b] ^ kept).all()
        classes = set(source.labels[b].unique().tolist())
        from_source = {c for c in classes if pasted[b][source.labels[b] == c].all()}
        if mix_classes == "image" or b == 0:  # the first has all classes of the batch
            assert len(from_source) == (len(classes) + 1) // 2  # half, rounded up, and whole classes only
        assert pasted[b].sum() == sum(int((source.labels[b] == c).sum()) for c in from_source)
        for y in range(H):
            for x in range(W):
                label, code, confidence = reference.guess(guessed[b, :, y, x].tolist(), codes, reliability)
                confident[b, y, x] = confidence >= THRESHOLD[kind]
                if not pasted[b, y, x]:
                    labels[b, y, x] = label if target.valid[b, y, x] else 255
                    bits[b, :, y, x] = torch.tensor(code, dtype=torch.bool)
    assert 0.05 < confident.float().mean() < 0.95  # else the weights would test nothing
    for b in range(2):
        share = {"image": confident[b].double().mean(), "batch": confident.double().mean(), "pixel": None}[weighting]
        guess_weight = confident[b].double() if share is None else torch.full((H, W), float(share), dtype=torch.float64)
        guess_weight[:2] = guess_weight[-3:] = 0
        weight[b][~pasted[b]] = guess_weight[~pasted[b]]
    want = 0.7 * reference.sum_of_losses(student.logits(mixed_image), labels, bits, weight, codes) / (2 * H * W)
    assert losses[1].item() == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
@pytest.mark.parametrize("average", ["all", "valid"])
def test_a_labeled_loss_equals_a_literal_one(kind: str, average: str) -> None:
    student, coding, given, losses = run(kind, average=average)
    labels, (codes, _) = given.labeled.labels, coded_parts(coding)
    total = reference.sum_of_losses(student.logits(given.labeled.image.float() / 255), labels,
                                    reference.true_bits(labels, codes), torch.ones(labels.shape), codes)
    number = labels.numel() if average == "all" else int((labels != 255).sum())
    assert losses[0].item() == pytest.approx(total / number, rel=1e-8)


def test_draws_depend_on_step_and_seed_alone() -> None:
    images = [run("ecoc")[0].seen[1] for _ in range(2)]
    assert torch.equal(*images)
    coding = coding_of("ecoc")
    student = PixelStudent(coding.num_outputs)
    method = METHODS["self_training"](MethodConfig(), coding, IDENTITY)
    seen = []
    for step, seed in ((4, 0), (5, 0), (4, 1)):
        given = StepInput(step, seed, make_batch(1, True), make_batch(2, False), student, Teacher(student, 0.9), nullcontext)
        given.teacher.module.double()
        student.seen.clear()
        for part in method.parts(given):
            part()
        seen.append(student.seen[1].clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_feature_distance_looks_at_thing_cells_alone() -> None:
    torch.manual_seed(0)
    feature, pretrained = torch.randn(2, 6, 2, 3), torch.randn(2, 6, 2, 3)
    labels = torch.full((2, 8, 12), 1)
    labels[0, :4, :4] = 3  # a whole cell
    labels[1, 4:, 8:] = 4
    labels[1, 4, 8] = 0  # 15 of 16 pixels
    labels[0, 4:, 4:8] = 4
    labels[0, 4:6, 4:8] = 1  # half a cell: too little
    want = ((feature[0, :, 0, 0] - pretrained[0, :, 0, 0]).norm() + (feature[1, :, 1, 2] - pretrained[1, :, 1, 2]).norm()) / 2
    torch.testing.assert_close(feature_distance(feature, pretrained, labels, (3, 4), 0.75), want)
    assert feature_distance(feature, pretrained, torch.ones_like(labels), (3, 4), 0.75) == 0


def test_teacher_is_the_average_of_its_students() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    teacher = Teacher(student, 0.9)
    want = [p.detach().clone() for p in student.parameters()]
    for t in range(1, 30):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        teacher.update(student)
        alpha = min(1 - 1 / (t + 1), 0.9)
        want = [alpha * w + (1 - alpha) * p.detach() for w, p in zip(want, student.parameters(), strict=True)]
        for mine, expected in zip(teacher.module.parameters(), want, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    assert teacher.module[1].training and not teacher.module[2].training
    assert not any(p.requires_grad for p in teacher.module.parameters())


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
def test_with_feature_distance_labels_are_learned_and_shown_as_without(kind: str) -> None:
    coding = coding_of(kind)

    class Student(PixelStudent):
        def forward(self, image: Tensor, return_features: bool = False) -> Any:
            logits = super().forward(image)
            return (logits, image[:, :, ::4, ::4]) if return_features else logits

    found = {}
    for weight in (0.0, 0.5):
        config = MethodConfig(**PLAIN, feature_distance=weight, feature_distance_classes=(1, 2), feature_distance_share=0.1)
        given = StepInput(4, 0, make_batch(1, True), make_batch(2, False), Student(coding.num_outputs), None, nullcontext,
                          pictures={})
        method = METHODS["self_training"](config, coding, IDENTITY, lambda image: image[:, :, ::4, ::4] + 1)
        found[weight] = method.parts(given)[0](), given
    (plain, without), (more, having) = found[0.0], found[0.5]
    assert "labeled_logits" in having.pictures and having.pictures.keys() == without.pictures.keys()
    assert without.metrics.keys() == having.metrics.keys() - {"loss/feature_distance"}
    torch.testing.assert_close(more, plain + 0.5 * having.metrics["loss/feature_distance"])
    assert having.metrics["loss/feature_distance"] > 0

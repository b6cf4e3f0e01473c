"""A toy on which labels of unlabelled images help: coloured cells, labelled ones in one light, the others in any.

Colours are made brighter or darker by a factor for the whole picture. Whoever learns the labelled pictures alone knows
colours in one light; with right labels of the others a network learns to go by hue.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecocseg import bits
from ecocseg.codebook import max_min
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.config import MethodConfig
from ecocseg.data.pipeline import Batch
from ecocseg.evaluate import Normalize
from ecocseg.methods import METHODS, StepInput
from ecocseg.methods.fixmatch import evaluating
from ecocseg.models.encoders import Encoder
from ecocseg.models.heads import Head
from ecocseg.models.segmenter import Segmenter
from ecocseg.target import Target
from ecocseg.teacher import Teacher

COLOURS = torch.tensor([(75, 75, 75), (140, 60, 60), (60, 140, 60), (60, 60, 140)])
N, H, W, CELL = len(COLOURS), 16, 16, 4
ONE_LIGHT, ANY_LIGHT, DARK = (0.95, 1.05), (0.4, 1.6), (0.4, 0.95)
LR = 0.01
FIRST, STEPS = 20, 80  # steps of labelled images alone, and all steps
ADAPTATION = ("self_training", "mic")
OPTIONS: dict[str, Any] = {"average": "valid", "confidence_threshold": 0, "weighting": "pixel", "blur_probability": 0.0}
CONSISTENT = {"jitter": 0.5, "jitter_hue": 0.0, "cutmix_probability": 0.5, "jitter_probability": 0.8}


class ToyEncoder(Encoder):
    """Two maps, the first of single pixels."""

    def __init__(self, fine: int = 24, coarse: int = 24) -> None:
        layers = [nn.Conv2d(3, fine, 1), nn.BatchNorm2d(fine), nn.Conv2d(fine, coarse, 3, 2, 1)]
        super().__init__(nn.ModuleList(layers), (fine, coarse), (1, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.net[1](self.net[0](x)).relu()
        return [fine, self.net[2](fine).relu()]


class ToyHead(Head):
    def __init__(self, outputs: int, fine: int = 24, coarse: int = 24) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(fine, outputs, 1), nn.Conv2d(coarse, outputs, 1)

    def forward(self, maps: Any) -> Tensor:
        return self.coarse(maps[1]) + F.avg_pool2d(self.fine(maps[0]), 2)


def pictures(first: int, light: tuple[float, float], count: int = 4) -> Batch:
    """Pictures of places first, first + 1, ...: 4 x 4 cells, each in a random class's colour."""
    images, labels = [], []
    for place in range(first, first + count):
        generator = torch.Generator().manual_seed(place)
        label = torch.randint(0, N, (H // CELL, W // CELL), generator=generator)
        label = label.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
        factor = light[0] + (light[1] - light[0]) * torch.rand((), generator=generator)
        image = COLOURS[label] * factor + 6 * torch.randn(H, W, 3, generator=generator)
        images.append(image.clamp(0, 255).to(torch.uint8).permute(2, 0, 1))
        labels.append(label)
    return Batch(torch.stack(images), torch.stack(labels), torch.ones(count, H, W, dtype=torch.bool),
                 torch.arange(first, first + count), [""] * count)


def toy_coding(kind: str) -> Any:
    """As the demo's: from scratch, the paper's constants are too soft."""
    if kind == "one_hot":
        return OneHotCoding(N)
    return EcocCoding(max_min(N, 7, 0), reliability=0.7, bce_weight=8, distance_weight=0, contrast_weight=0.5, temperature=0.1)


class Shuffled:
    """A coding whose pseudo-labels are given to other pixels than they were made for."""

    def __init__(self, coding: Any) -> None:
        self.coding = coding

    def __getattr__(self, name: str) -> Any:
        return getattr(self.coding, name)

    def pseudo_label(self, logits: Tensor, size: Any = None) -> Target:
        target: Target = self.coding.pseudo_label(logits, size)
        order = torch.randperm(H * W, generator=torch.Generator().manual_seed(int(1e4 * logits.abs().mean())))
        for name in ("labels", "bits"):
            value = getattr(target, name)
            if value is not None:
                setattr(target, name, value.flatten(-2)[..., order].view_as(value))
        return target


def stored(batch: Batch, model: nn.Module, method: Any) -> Batch:
    """The batch as jobs/pseudo_label.py would store it: the classes and bits that a model gives it."""
    with torch.no_grad(), evaluating(model):
        target = method.coding.pseudo_label(model(method.normalize(batch.image)), size=(H, W))
    changes = None
    if target.bits is not None:
        changes = bits.to_planes(target.bits ^ method.coding.encode(target.labels).bits, method.coding.num_outputs)
    return replace(batch, labels=target.labels, changes=changes, weight=torch.ones(len(batch.image)))


def toy_miou(kind: str, coding: Any, unlabeled: bool = True, seed: int = 0) -> float:
    """mIoU of the student on pictures in the unlabelled ones' light."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {**OPTIONS, "kind": kind, "mixed_weight": 1 if kind in ADAPTATION else 2}
    if kind in ADAPTATION:
        settings |= {"jitter_probability": 0.0, "mask_block": 4, "mask_ratio": 0.3}
    else:
        settings |= CONSISTENT
    if kind == "stpp":
        settings |= {"kind": "supervised", "pseudo_labels": True, "cutout_probability": 0.3}
    method = METHODS[settings["kind"]](MethodConfig.model_validate(settings), coding, Normalize((0.35,) * 3, (0.2,) * 3))
    light = DARK if kind in ADAPTATION else ANY_LIGHT
    model = toy_model(coding)
    if kind == "stpp" and unlabeled:
        model = chain(method, light, seed)
    else:
        train(model, method, light, unlabeled, seed)
    test = pictures(9000, light, 24)
    with torch.no_grad(), evaluating(model):
        logits = model(method.normalize(test.image))
        guess = coding.scores(F.interpolate(logits, (H, W), mode="bilinear", align_corners=False)).argmax(1)
    iou = [((guess == n) & (test.labels == n)).sum() / ((guess == n) | (test.labels == n)).sum() for n in range(N)]
    return float(torch.stack(iou).mean())


def toy_model(coding: Any) -> Segmenter:
    return Segmenter(ToyEncoder(), ToyHead(coding.num_outputs), coding.num_outputs)


def chain(method: Any, light: tuple[float, float], seed: int) -> Segmenter:
    """ST++: a network of the labelled pictures labels 40; one learns the half on which the first changed least, labels the
    others, and a third learns all. Learning rates fall to 0, or the last steps of three networks in a row add up to chance."""
    first, second, third = (toy_model(method.coding) for _ in range(3))
    places = [pictures(1000 + n, light, 1) for n in range(40)]
    train(first, method, light, False, seed, 50, decay=True)
    before = [stored(one, first, method).labels for one in places]
    train(first, method, light, False, seed + 1, 30, decay=True)
    labeled = [stored(one, first, method) for one in places]
    stable = [float((one.labels == was).float().mean()) for one, was in zip(labeled, before, strict=True)]
    order = sorted(range(40), key=lambda n: -stable[n])
    train(second, method, light, True, seed, pool=batches([labeled[n] for n in order[:20]]), decay=True)
    rest = [stored(places[n], second, method) for n in order[20:]]
    train(third, method, light, True, seed, pool=batches([*rest, *(labeled[n] for n in order[:20])]), decay=True)
    return third


def batches(pictures: list[Batch]) -> list[Batch]:
    """Batches of 4, each with pictures from all over the list."""
    number = len(pictures) // 4
    return [joined(pictures[n::number]) for n in range(number)]


def joined(parts: list[Batch]) -> Batch:
    names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
    tensors = {name: torch.cat([getattr(one, name) for one in parts]) for name in names}
    return replace(parts[0], **tensors, image_ids=[""] * len(parts))


def train(model: Segmenter, method: Any, light: tuple[float, float], unlabeled: bool, seed: int,
          steps: int = STEPS, pool: list[Batch] | None = None, decay: bool = False) -> None:
    teacher = Teacher(model, 0.9, type(method).whole_teacher)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
        if step > 0:
            teacher.update(model)
        own, partner = (replace(pictures(1000 * n + 4 * (step % 10), light), labels=None) for n in (1, 2))
        given = StepInput(step, seed, pictures(4 * (step % 2), ONE_LIGHT), pool[step % len(pool)] if pool else own, model,
                          teacher, nullcontext, partner=partner, model=model, unlabeled_total=4)
        alone = not unlabeled or (pool is None and step < FIRST)
        for part in [lambda given=given: method.labeled_loss(given)] if alone else method.parts(given):
            part().backward()
        optimizer.step()
        optimizer.zero_grad()

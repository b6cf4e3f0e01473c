"""What a method is given at each step, and what it gives back: parts, each a loss the engine runs backward at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecocseg.config import MethodConfig
from ecocseg.data.pipeline import Batch
from ecocseg.data.strong import StrongView
from ecocseg.evaluate import Normalize
from ecocseg.models.hrda import TwoScaleLogits, two_scale_loss
from ecocseg.profile import CODING, within
from ecocseg.target import Target
from ecocseg.teacher import Teacher

Part = Callable[[], Tensor]


@dataclass
class StepInput:
    """One micro-batch of one step on one worker. Metrics are 0-dim tensors and stay on the device."""

    step: int
    seed: int
    labeled: Batch
    unlabeled: Batch | None
    student: Callable[..., Any]
    """The engine: called like the model."""
    teacher: Teacher | None
    teacher_autocast: Callable[[], Any]
    divisor: Tensor | None = None
    """What the labelled loss is divided by when only valid pixels count, the same on every worker."""
    partner: Batch | None = None
    """Other unlabelled images, one for each, for methods that read the stream of them."""
    model: Any = None
    """The student's bare module, for its sizes and for passes without gradient."""
    unlabeled_divisors: Tensor | None = None
    """What losses on unlabelled images are divided by, one for each count of `Method.unlabeled_pixels`."""
    unlabeled_total: int = 0
    """Unlabelled images of the whole global batch."""
    mix_classes: Tensor | None = None
    """Classes of the labelled images of the whole global batch, bool [256], where `Method.classes_present` asks for them."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    pictures: dict[str, Any] | None = None
    """A dict to put tensors for the picture panels into, on steps that draw them."""


class Method:
    """A method: whether it has a teacher, and the parts of its step."""

    needs_teacher = False
    whole_teacher = False
    """The teacher averages buffers too (see `Teacher`)."""

    def __init__(self, config: MethodConfig, coding: Any, normalize: Normalize,
                 pretrained_encoder: Callable[[Tensor], Tensor] | None = None) -> None:
        self.config, self.coding, self.normalize, self.pretrained_encoder = config, coding, normalize, pretrained_encoder

    def parts(self, given: StepInput) -> list[Part]:
        """The losses of this step, in order. Each builds its own graph when called."""
        raise NotImplementedError

    @classmethod
    def images_in_graph(cls, labeled: int, unlabeled: int) -> int:
        """Images in the largest graph of a step whose micro-batch has so many; for the estimate of its memory."""
        return max(labeled, unlabeled)

    @classmethod
    def fewest_images(cls, labeled: int, unlabeled: int) -> int:
        """Images in the smallest pass of such a micro-batch that batch norm takes statistics of; 0 unlabelled: none."""
        return min(labeled, unlabeled) if unlabeled else labeled

    @classmethod
    def images_per_step(cls, labeled: int, unlabeled: int) -> tuple[int, int]:
        """Images a step passes through the model with a gradient, and without one (teacher's and partners' labels); for the
        estimate of its time."""
        return labeled + unlabeled, 0

    def unlabeled_pixels(self, given: StepInput) -> Tensor | None:
        """Counts of unlabelled pixels that the method's losses are averaged over, if it wants them summed over all workers
        and micro-batches before the step. Shape: [number of counts]."""
        return None

    def classes_present(self, given: StepInput) -> Tensor | None:
        """Classes of this micro-batch's labelled images, if the method wants to know those of all workers and micro-batches
        before the step. Shape: bool [256]."""
        return None

    def loss(self, output: Tensor | TwoScaleLogits, target: Target, *, average: str = "all",
             normalizer: Tensor | None = None) -> dict[str, Tensor]:
        """The coding's loss terms of what the student gave, be it logits [B, K, h, w] or those of two scales."""
        with within(CODING):
            if isinstance(output, TwoScaleLogits):
                return two_scale_loss(self.coding, output, target, average=average, normalizer=normalizer)
            return self.coding.loss(output, target, average=average, normalizer=normalizer)

    def label(self, logits_BKhw: Tensor, size: torch.Size) -> Target:
        """The coding's labels of these logits at an image's size."""
        with within(CODING):
            return self.coding.pseudo_label(logits_BKhw.detach(), size=size)

    def strong(self, batch: Batch, given: StepInput, stream: int, number: int) -> Tensor:
        """Jitter, grey and blur, drawn for each image and view. Shape: float [B, C, H, W] in [0, 1]."""
        c = self.config
        make = StrongView(c.jitter, c.jitter if c.jitter_hue is None else c.jitter_hue, c.jitter_probability,
                          c.grey_probability, c.blur_probability, c.blur_sigma)
        return make(batch.image, self.generators(batch, given, stream, number))

    def generators(self, batch: Batch, given: StepInput, *stream: int) -> list[torch.Generator]:
        """A generator for each image that depends on nothing but seed, step, stream and the image's place."""
        return [random_generator(given.seed, given.step, *stream, position) for position in batch.positions.tolist()]


def main_output(output: Tensor | TwoScaleLogits) -> Tensor:
    """The student's prediction of the whole image. Shape: [B, K, h, w]."""
    return output.fused if isinstance(output, TwoScaleLogits) else output


def main_logits(output: Tensor | TwoScaleLogits) -> Tensor:
    """The same without graph."""
    return main_output(output).detach()


def random_generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on these numbers alone, not on device, worker or history."""
    seed = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(seed[0]) << 31 ^ int(seed[1]))

"""UniMatch V2 (Yang et al., TPAMI 2025): two strong views whose features are dropped out in complement.

An EMA teacher in eval mode labels the weak view. Each image's two views are pasted from its neighbour in the batch, and in
half of the images one view has the channels that the other one lacks. loss = (labelled + (strong1 + strong2) / 2) / 2.

The released code pastes from the batch in reverse order; here images 2i and 2i + 1 are pasted on each other, so that a
batch cut into workers and micro-batches keeps its pairs.

Shapes: B unlabelled images, C channels of a map, K outputs, h w cells of the logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ecocseg.coding import Target
from ecocseg.data.pipeline import Batch
from ecocseg.device import to_device
from ecocseg.methods.base import Part, StepInput, random_generator
from ecocseg.methods.fixmatch import CHANNELS, COLOUR, WHOLE, FixMatch
from ecocseg.target import reordered


class UniMatchV2(FixMatch):
    needs_teacher = True
    whole_teacher = True
    num_views = 2

    @classmethod
    def images_in_graph(cls, labeled: int, unlabeled: int) -> int:
        return max(labeled, cls.num_views * unlabeled)

    @classmethod
    def fewest_images(cls, labeled: int, unlabeled: int) -> int:
        return min(labeled, cls.num_views * unlabeled)

    @classmethod
    def images_per_step(cls, labeled: int, unlabeled: int) -> tuple[int, int]:
        return labeled + cls.num_views * unlabeled, unlabeled

    def parts(self, given: StepInput) -> list[Part]:
        return [lambda: self.labeled_loss(given) / 2,
                lambda: self.config.mixed_weight * self.strong_loss(given, self.teacher_labels(given)) / 2]

    @torch.no_grad()
    def teacher_labels(self, given: StepInput) -> list[Target]:
        """The teacher's labels of the unlabelled images, and the same as those of their partners."""
        batch = self.unlabeled(given)
        assert given.teacher is not None
        with given.teacher_autocast():
            logits_BKhw = given.teacher(self.normalize(batch.image))
        target = self.guess(logits_BKhw, batch, given)
        return [target, reordered(target, neighbours(batch))]

    def view(self, given: StepInput, number: int) -> Tensor:
        """A strong view of each image with a box of its neighbour's. Shape: float [B, C, H, W] in [0, 1]."""
        batch = self.unlabeled(given)
        own_BCHW = self.strong(batch, given, COLOUR, number)
        box_B1HW = self.boxes(given, number)[:, None]
        return torch.where(box_B1HW, own_BCHW[neighbours(batch)], own_BCHW)

    def partner(self, given: StepInput) -> Batch:
        batch = self.unlabeled(given)
        order_B = neighbours(batch)
        return replace(batch, image=batch.image[order_B], valid=batch.valid[order_B])

    def predict_views(self, given: StepInput, image_VCHW: Tensor) -> Tensor:
        return given.student(self.normalize(image_VCHW), feature_factors=self.complementary_channels(given))

    def complementary_channels(self, given: StepInput) -> list[Tensor]:
        """Factors of each map's channels: 2m for the first view of an image and 2 (1 - m) for the second, m drawn for each
        channel and shared by the maps; ones for the images left whole. Shapes: [2 B, C]."""
        model, batch = given.model, self.unlabeled(given)
        widths = [model.encoder.channels[level] for level in model.feature_dropout_levels]
        total = given.unlabeled_total or len(batch.image)
        order = torch.randperm(total, generator=random_generator(given.seed, given.step, WHOLE))
        whole = set(order[:int(total * self.config.whole_pairs)].tolist())  # of the whole batch, whoever has it
        rows = []
        for generator, position in zip(self.generators(batch, given, CHANNELS), batch.positions.tolist(), strict=True):
            factors_C = 2.0 * (torch.rand(max(widths), generator=generator) < 0.5)
            rows.append(torch.ones(max(widths)) if position % total in whole else factors_C)
        first_BC = to_device(torch.stack(rows), batch.image.device)
        both_VC = torch.cat([first_BC, 2 - first_BC])
        return [both_VC[:, :width] for width in widths]


def neighbours(batch: Batch) -> Tensor:
    """The place of each image's partner: 1, 0, 3, 2, ... Shape: int64 [B]."""
    return torch.arange(len(batch.image), device=batch.image.device) ^ 1

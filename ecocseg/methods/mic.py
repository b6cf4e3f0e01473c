"""MIC, masked image consistency (Hoyer et al., CVPR 2023): self-training whose student also labels what it
cannot see.

A copy of each target image, with jitter and blur drawn anew, is blanked outside a random grid of blocks. The student has
to give the teacher's labels of the whole image from the blocks that are left, hence from their context. The labels and
their weights are those of the mixed images: the teacher makes them once a step.

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ecocseg.coding import Target
from ecocseg.data import mixing
from ecocseg.device import to_device
from ecocseg.methods.base import Part, StepInput, random_generator
from ecocseg.methods.self_training import SelfTraining

MASK, MASK_COLOUR = 3, 4  # random streams of a step, beside those of self-training


class MaskedConsistency(SelfTraining):
    @classmethod
    def images_per_step(cls, labeled: int, unlabeled: int) -> tuple[int, int]:
        return labeled + 2 * unlabeled, unlabeled

    def target_parts(self, given: StepInput, pseudo: Callable[[], Target]) -> list[Part]:
        return [*super().target_parts(given, pseudo), lambda: self.masked_loss(given, pseudo())]

    def masked_loss(self, given: StepInput, pseudo: Target) -> Tensor:
        """Loss of the masked images, over all their pixels, the masked ones too. Shape: scalar."""
        image_B3HW, target = self.images_to_mask(given, pseudo)
        unit_B3HW = image_B3HW.float() / 255
        if self.config.masked_colour:
            unit_B3HW = self.colour(unit_B3HW, given, MASK_COLOUR)
        keep_BHW = self.kept_blocks(given)
        output = given.student(self.normalize(unit_B3HW) * keep_BHW[:, None])  # 0 after it is the mean colour
        terms = self.loss(output, target)
        given.metrics["loss/masked"] = terms["loss"].detach()
        return self.config.masked_weight * terms["loss"]

    def images_to_mask(self, given: StepInput, pseudo: Target) -> tuple[Tensor, Target]:
        """The target images, or in every other place a source image with its true labels. Shape: uint8 [B, 3, H, W].

        The released code masks the first source and the first target image of its batch of two each; images next to one
        another take turns here, so that every worker and micro-batch has its share.
        """
        source, unlabeled = given.labeled, given.unlabeled
        assert unlabeled is not None and source.labels is not None
        if self.config.masked_images == "target":
            return unlabeled.image, pseudo
        partner = self.partners(given)
        is_source_B11 = to_device(unlabeled.positions % 2 == 0, unlabeled.image.device)[:, None, None]
        image_B3HW = torch.where(is_source_B11[:, None], source.image[partner], unlabeled.image)
        return image_B3HW, mixing.mix(self.coding.encode(source.labels[partner]), pseudo, is_source_B11)

    def kept_blocks(self, given: StepInput) -> Tensor:
        """Where each image is left as it is: one grid an image, a function of seed, step and the image's place alone.
        Shape: bool [B, H, W]."""
        batch = given.unlabeled
        assert batch is not None
        size = (batch.image.shape[-2], batch.image.shape[-1])
        masks = [mixing.patch_mask(size, self.config.mask_block, 1 - self.config.mask_ratio,
                                   generator=random_generator(given.seed, given.step, MASK, position))
                 for position in batch.positions.tolist()]
        return to_device(torch.stack(masks), batch.image.device)

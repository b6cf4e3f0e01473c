"""Training on labelled images alone: the source-only baseline of every table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ecocseg.losses import soft_dice_loss
from ecocseg.methods.base import Method, Part, StepInput, main_logits, main_output
from ecocseg.models.hrda import TwoScaleLogits
from ecocseg.target import IGNORE, Target


class Supervised(Method):
    def parts(self, given: StepInput) -> list[Part]:
        return [lambda: self.labeled_loss(given)]

    def labeled_loss(self, given: StepInput) -> Tensor:
        """Loss of the labelled images. Shape: scalar."""
        return self.learn_labels(given.student(self.normalize(given.labeled.image)), given)

    def learn_labels(self, output: Tensor | TwoScaleLogits, given: StepInput) -> Tensor:
        """Loss of what the student gave for the labelled images. Shape: scalar."""
        batch = given.labeled
        assert batch.labels is not None
        target = self.coding.encode(batch.labels)
        if self.config.ohem_threshold is not None:
            certainty_BHW = self.coding.certainty(main_logits(output), target)
            target.weight = hard_pixel_weight(certainty_BHW, batch.labels, self.config.ohem_threshold,
                                              self.config.ohem_min_pixels)
            terms = self.loss(output, target, normalizer=torch.full_like(target.weight[0, 0, 0], len(batch.labels)))
        else:
            terms = self.loss(output, target, average=self.config.average, normalizer=given.divisor)
        if self.config.dice:
            terms["loss"] = (terms["loss"] + self.dice_loss(main_output(output), target)) / 2
        given.metrics["loss/labeled"] = terms["loss"].detach()
        given.metrics.update({f"terms/labeled_{name}": value.detach() for name, value in terms.items() if name != "loss"})
        if given.pictures is not None:
            given.pictures.update(labeled_image=batch.image, labeled_labels=batch.labels,
                                  labeled_logits=main_logits(output))
        return terms["loss"]

    def dice_loss(self, logits_BKhw: Tensor, target: Target) -> Tensor:
        """Soft Dice of the coding's maps; ignored pixels are left out. Shape: scalar."""
        size = (target.labels.shape[1], target.labels.shape[2])
        if logits_BKhw.shape[-2:] != size:
            logits_BKhw = F.interpolate(logits_BKhw, size, mode="bilinear", align_corners=self.coding.align_corners)
        probabilities_BMHW, maps_BMHW = self.coding.maps(logits_BKhw, target)
        return soft_dice_loss(probabilities_BMHW, maps_BMHW, target.weight * (target.labels != IGNORE))


def hard_pixel_weight(certainty_BHW: Tensor, labels_BHW: Tensor, threshold: float, least: int) -> Tensor:
    """1 / n on the n labelled pixels of each image whose certainty is at most `threshold`, or that are among its `least`
    most uncertain ones; 0 elsewhere. Online hard example mining as UniMatch has it on Cityscapes, where a GPU sees one
    image: chosen and averaged image by image here, whatever the number of workers. Shape: float [B, H, W].
    """
    known_BHW = labels_BHW != IGNORE
    certainty_BP = certainty_BHW.masked_fill(~known_BHW, torch.inf).flatten(1)
    edge_B1 = certainty_BP.kthvalue(min(least, certainty_BP.shape[1]), dim=1, keepdim=True).values
    kept_BHW = (certainty_BP <= edge_B1.clamp_min(threshold)).view_as(known_BHW) & known_BHW
    return kept_BHW / kept_BHW.sum((1, 2), keepdim=True).clamp_min(1)

"""Training on labelled images alone, the source-only baseline of every table; or on a labelled pool as well (ST++).

With `method.pseudo_labels` the unlabelled stream is a pool that jobs/pseudo_label.py labelled. Its images are learned in
strong views: jitter, grey and blur as FixMatch has them, and a box of noise without label (Cutout).
loss = (labelled + pseudo-labelled) / 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ecocseg.data import mixing
from ecocseg.data.pipeline import Batch
from ecocseg.device import to_device
from ecocseg.losses import soft_dice_loss
from ecocseg.methods.base import Method, Part, StepInput, main_logits, main_output
from ecocseg.models.hrda import TwoScaleLogits
from ecocseg.target import IGNORE, Target

STRONG, CUTOUT, NOISE = 31, 32, 33  # separate random streams of a step


class Supervised(Method):
    def parts(self, given: StepInput) -> list[Part]:
        if not self.config.pseudo_labels:
            return [lambda: self.labeled_loss(given)]
        return [lambda: self.labeled_loss(given) / 2, lambda: self.config.mixed_weight * self.stored_loss(given) / 2]

    def labeled_loss(self, given: StepInput) -> Tensor:
        """Loss of the labelled images. Shape: scalar."""
        return self.learn_labels(given.student(self.normalize(given.labeled.image)), given)

    def learn_labels(self, output: Tensor | TwoScaleLogits, given: StepInput) -> Tensor:
        """Loss of what the student gave for the labelled images. Shape: scalar."""
        batch = given.labeled
        assert batch.labels is not None
        target = self.target(batch)
        if self.config.ohem_threshold is not None:
            certainty_BHW = self.coding.certainty(main_logits(output), target)
            target.weight = target.weight * hard_pixel_weight(certainty_BHW, batch.labels, self.config.ohem_threshold,
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

    def target(self, batch: Batch) -> Target:
        """What the masks of a batch say, be they annotated or a checkpoint's guesses."""
        assert batch.labels is not None
        if batch.weight is None:
            return self.coding.encode(batch.labels)
        return self.coding.stored(batch.labels, batch.changes, batch.weight)

    def stored_loss(self, given: StepInput) -> Tensor:
        """Loss of strong views of the images that a checkpoint labelled. Shape: scalar."""
        batch, boxes_BHW = self.unlabeled(given), self.cutouts(given)
        target = self.target(batch)
        target.labels = target.labels.masked_fill(~batch.valid | boxes_BHW, IGNORE)
        noise_BCHW = to_device(torch.stack([torch.rand(batch.image.shape[1:], generator=generator)
                                            for generator in self.generators(batch, given, NOISE)]), batch.image.device)
        view_BCHW = torch.where(boxes_BHW[:, None], noise_BCHW, self.strong(batch, given, STRONG, 0))
        output = given.student(self.normalize(view_BCHW))
        normalizer = None if given.unlabeled_divisors is None else given.unlabeled_divisors[0]
        terms = self.loss(output, target, average=self.config.average, normalizer=normalizer)
        if self.config.dice:
            terms["loss"] = (terms["loss"] + self.dice_loss(main_output(output), target)) / 2
        given.metrics["loss/pseudo"], given.metrics["pseudo/weight"] = terms["loss"].detach(), target.weight.mean()
        if given.pictures is not None:
            given.pictures.update(unlabeled_image=batch.image, pseudo=target, mixed_image=view_BCHW,
                                  mixed_labels=target.labels, mixed_logits=main_logits(output))
        return terms["loss"]

    def cutouts(self, given: StepInput) -> Tensor:
        """Where strong views of the labelled pool are noise. Shape: bool [B, H, W]."""
        return self.random_boxes(given, self.config.cutout_probability, CUTOUT)

    def random_boxes(self, given: StepInput, probability: float, *stream: int) -> Tensor:
        """A box in each unlabelled image, with some probability. Shape: bool [B, H, W]."""
        batch = self.unlabeled(given)
        size = (batch.image.shape[-2], batch.image.shape[-1])
        boxes = [mixing.cutmix_box(size, generator, probability) for generator in self.generators(batch, given, *stream)]
        return to_device(torch.stack(boxes), batch.image.device)

    def unlabeled_pixels(self, given: StepInput) -> Tensor | None:
        """Pixels of the strong views with a label. Shape: int64 [1]."""
        if not self.config.pseudo_labels or self.config.average == "all":
            return None
        batch = self.unlabeled(given)
        assert batch.labels is not None
        return ((batch.labels != IGNORE) & batch.valid & ~self.cutouts(given)).sum().reshape(1)

    def unlabeled(self, given: StepInput) -> Batch:
        assert given.unlabeled is not None
        return given.unlabeled

    def dice_loss(self, logits_BKhw: Tensor, target: Target) -> Tensor:
        """Soft Dice of the coding's maps; ignored pixels are left out. Shape: scalar."""
        size = (target.labels.shape[1], target.labels.shape[2])
        if logits_BKhw.shape[-2:] != size:
            logits_BKhw = F.interpolate(logits_BKhw, size, mode="bilinear", align_corners=self.coding.align_corners)
        probabilities_BMHW, maps_BMHW = self.coding.maps(logits_BKhw, target)
        return soft_dice_loss(probabilities_BMHW, maps_BMHW, target.weight * (target.labels != IGNORE))


class StPlusPlus(Supervised):
    """What is known of ST++ before its runs, each a supervised one, are made (see ecocseg/stpp.py)."""

    @classmethod
    def images_in_graph(cls, labeled: int, unlabeled: int) -> int:
        return labeled + unlabeled  # the teacher's batch


def hard_pixel_weight(certainty_BHW: Tensor, labels_BHW: Tensor, threshold: float, least: int) -> Tensor:
    """1 / n on the n labelled pixels of each image whose certainty is at most `threshold`, or that are among its `least`
    most uncertain ones; 0 elsewhere. Online hard example mining as UniMatch has it on Cityscapes, but for one thing: there
    the two images of a GPU share one choice, here each has its own, whatever the number of workers. Shape: float [B, H, W].
    """
    known_BHW = labels_BHW != IGNORE
    certainty_BP = certainty_BHW.masked_fill(~known_BHW, torch.inf).flatten(1)
    edge_B1 = certainty_BP.kthvalue(min(least, certainty_BP.shape[1]), dim=1, keepdim=True).values
    kept_BHW = (certainty_BP <= edge_B1.clamp_min(threshold)).view_as(known_BHW) & known_BHW
    return kept_BHW / kept_BHW.sum((1, 2), keepdim=True).clamp_min(1)

"""FixMatch for segmentation, as UniMatch's repository has it: labels of the weak view teach a strong view.

The student labels the weak view itself, in the pass that also learns the labelled images. The strong view has a box of
another unlabelled image, the partner, pasted on it with its labels (CutMix); those are made in a pass of their own, in
eval mode. loss = (labelled + unlabelled) / 2, the latter over all pixels that are no padding.

Shapes: B unlabelled images, L labelled ones, V strong views, K outputs, H W pixels, h w cells of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ecocseg.coding import Target
from ecocseg.collapse import CONFIDENT, pseudo_metrics
from ecocseg.data import mixing
from ecocseg.data.pipeline import Batch
from ecocseg.methods.base import Part, StepInput
from ecocseg.methods.supervised import Supervised
from ecocseg.profile import STUDENT, within
from ecocseg.target import IGNORE

BOX, COLOUR, PARTNER_COLOUR, CHANNELS, WHOLE = range(11, 16)  # separate random streams of a step; views are added behind


class FixMatch(Supervised):
    num_views = 1

    def parts(self, given: StepInput) -> list[Part]:
        labels: list[Target] = []  # of the unlabelled images and of their partners: the first part makes them
        return [lambda: self.weak_loss(given, labels) / 2,
                lambda: self.config.mixed_weight * self.strong_loss(given, labels) / 2]

    @classmethod
    def images_in_graph(cls, labeled: int, unlabeled: int) -> int:
        return max(labeled + unlabeled, cls.num_views * unlabeled)

    @classmethod
    def fewest_images(cls, labeled: int, unlabeled: int) -> int:
        return cls.num_views * unlabeled

    @classmethod
    def images_per_step(cls, labeled: int, unlabeled: int) -> tuple[int, int]:
        return labeled + (1 + cls.num_views) * unlabeled, unlabeled

    def weak_loss(self, given: StepInput, labels: list[Target]) -> Tensor:
        """Loss of the labelled images, and labels of the unlabelled ones by the same pass. Shape: scalar."""
        unlabeled, partner = self.unlabeled(given), self.partner(given)
        guess = self.guess_partner(given, partner)
        logits_BKhw = given.student(self.normalize(torch.cat([given.labeled.image, unlabeled.image])))
        labeled_LKhw, weak_BKhw = logits_BKhw.split([len(given.labeled.image), len(unlabeled.image)])
        labels.extend([self.guess(weak_BKhw, unlabeled, given), guess])
        return self.learn_labels(labeled_LKhw, given)

    def strong_loss(self, given: StepInput, labels: list[Target]) -> Tensor:
        """Mean over the strong views of their losses. Shape: scalar."""
        views = [self.view(given, number) for number in range(self.num_views)]
        logits_VKhw = self.predict_views(given, torch.cat(views))
        losses = []
        for number, logits_BKhw in enumerate(logits_VKhw.chunk(self.num_views)):
            target = mixing.mix(labels[1], labels[0], self.boxes(given, number))
            losses.append(self.unlabeled_loss(logits_BKhw, target, given, 1 + number))
            given.metrics[f"loss/strong{number + 1}"] = losses[-1].detach()
            if given.pictures is not None and number == 0:
                given.pictures.update(unlabeled_image=self.unlabeled(given).image, pseudo=labels[0], mixed_image=views[0],
                                      mixed_labels=target.labels, mixed_logits=logits_BKhw.detach())
        return torch.stack(losses).mean()

    def predict_views(self, given: StepInput, image_VCHW: Tensor) -> Tensor:
        """The student's logits of the strong views, one after another. Shape: [V * B, K, h, w]."""
        return given.student(self.normalize(image_VCHW))

    def view(self, given: StepInput, number: int) -> Tensor:
        """A strong view of each unlabelled image with a box of its partner's. Shape: float [B, C, H, W] in [0, 1]."""
        own_BCHW = self.strong(self.unlabeled(given), given, COLOUR, number)
        other_BCHW = self.strong(self.partner(given), given, PARTNER_COLOUR, number)
        return mixing.mix_images(other_BCHW, own_BCHW, self.boxes(given, number))

    def boxes(self, given: StepInput, number: int) -> Tensor:
        """Where the partner is pasted on a view. Shape: bool [B, H, W]."""
        return self.random_boxes(given, self.config.cutmix_probability, BOX, number)

    @torch.no_grad()
    def guess_partner(self, given: StepInput, partner: Batch) -> Target:
        """Weighted labels of the partners by the student in eval mode."""
        with within(STUDENT), evaluating(given.model), given.teacher_autocast():
            logits_BKhw = given.model(self.normalize(partner.image))
        return self.guess(logits_BKhw, partner)

    @torch.no_grad()
    def guess(self, logits_BKhw: Tensor, batch: Batch, given: StepInput | None = None) -> Target:
        """Labels of unlabelled images from logits, weighted and without padding; logged if `given`."""
        target = self.label(logits_BKhw, batch.image.shape[-2:])
        assert target.confidence is not None
        target.labels.masked_fill_(~batch.valid, IGNORE)
        confident_BHW = (target.confidence >= self.config.confidence_threshold) & batch.valid
        target.weight = self.pixel_weight(confident_BHW, batch.valid).to(target.weight.dtype)
        if given is not None:
            given.metrics.update(pseudo_metrics(target, confident_BHW, self.coding.num_classes))
            given.metrics[CONFIDENT] = confident_BHW.sum() / batch.valid.sum().clamp_min(1)  # of what is no padding
        return target

    def pixel_weight(self, confident_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
        """Weight of each pixel's label: 1 where confident, or the confident share of its image or of the worker's batch,
        padding left out; `by_coding` is what is published with the coding. Shape: [B, H, W]."""
        kind = self.coding.weighting if self.config.weighting == "by_coding" else self.config.weighting
        if kind == "pixel":
            return confident_BHW
        over = (1, 2) if kind == "image" else (0, 1, 2)
        share = confident_BHW.sum(over, keepdim=True).double() / valid_BHW.sum(over, keepdim=True).clamp_min(1)
        return share * valid_BHW

    def unlabeled_loss(self, logits_BKhw: Tensor, target: Target, given: StepInput, number: int) -> Tensor:
        """Loss of one view, over the pixels that `unlabeled_pixels` counts under `number`. Shape: scalar."""
        if self.config.dice:
            return self.dice_loss(logits_BKhw, target)
        divisors = given.unlabeled_divisors
        normalizer = self.unlabeled_pixels(given)[number].clamp_min(1) if divisors is None else divisors[number]
        return self.loss(logits_BKhw, target, normalizer=normalizer)["loss"]

    def unlabeled_pixels(self, given: StepInput) -> Tensor:
        """Pixels that are no padding, of the weak view and of each strong one. Shape: int64 [1 + V]."""
        own_BHW, other_BHW = self.unlabeled(given).valid, self.partner(given).valid
        views = [torch.where(self.boxes(given, number), other_BHW, own_BHW) for number in range(self.num_views)]
        return torch.stack([own_BHW.sum(), *(view_BHW.sum() for view_BHW in views)])

    def partner(self, given: StepInput) -> Batch:
        """The images whose boxes are pasted, one for each."""
        assert given.partner is not None
        return given.partner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

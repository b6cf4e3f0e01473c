"""Self-training for domain adaptation: DACS and DAFormer.

The teacher labels the unlabelled target images; half of the classes of the source images are pasted on them with their
labels (ClassMix); the student learns the source images and the mixed ones.

Shapes: B batch, N classes, K outputs, H W pixels, h w cells of the decoder or encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ecocseg.coding import Target
from ecocseg.collapse import disagreement, pseudo_metrics
from ecocseg.data import mixing
from ecocseg.methods.base import Part, StepInput, main_logits, random_generator
from ecocseg.methods.supervised import Supervised

MIX, COLOUR = 1, 2  # separate random streams of one step


class SelfTraining(Supervised):
    needs_teacher = True

    @classmethod
    def images_per_step(cls, labeled: int, unlabeled: int) -> tuple[int, int]:
        return labeled + unlabeled, unlabeled

    def parts(self, given: StepInput) -> list[Part]:
        source = self.source_loss if self.config.feature_distance > 0 else self.labeled_loss
        return [lambda: source(given), *self.target_parts(given, cache(lambda: self.pseudo_label(given)))]

    def target_parts(self, given: StepInput, pseudo: Callable[[], Target]) -> list[Part]:
        """The losses with unlabelled images; `pseudo` gives the teacher's labels, made when first asked for."""
        return [lambda: self.mixed_loss(given, pseudo())]

    def source_loss(self, given: StepInput) -> Tensor:
        """Loss of the source images plus the thing-class feature distance. Shape: scalar."""
        batch = given.labeled
        assert batch.labels is not None and self.pretrained_encoder is not None
        image = self.normalize(batch.image)
        output, feature_BChw = given.student(image, return_features=True)
        loss = self.learn_labels(output, given)
        with torch.no_grad():
            pretrained_BChw = self.pretrained_encoder(image)
        distance = feature_distance(feature_BChw, pretrained_BChw, batch.labels, self.config.feature_distance_classes,
                                    self.config.feature_distance_share)
        given.metrics["loss/feature_distance"] = distance.detach()
        return loss + self.config.feature_distance * distance

    def mixed_loss(self, given: StepInput, pseudo: Target) -> Tensor:
        """Loss of the target images with source classes pasted on. Shape: scalar."""
        source, unlabeled = given.labeled, given.unlabeled
        assert unlabeled is not None and source.labels is not None
        number = min(len(source.image), len(unlabeled.image))
        generators = [random_generator(given.seed, given.step, MIX, int(p)) for p in source.positions[:number]]
        labels_BHW = source.labels[:number]
        classes_N = self.classes_present(given) if given.mix_classes is None else given.mix_classes
        mask_BHW = mixing.class_mix_mask(labels_BHW, generators, classes_N, self.coding.num_classes + 1)
        if len(unlabeled.image) > number:  # images without a partner stay as they are
            mask_BHW = F.pad(mask_BHW, (0, 0, 0, 0, 0, len(unlabeled.image) - number))
        partner = self.partners(given)
        image_B3HW = torch.where(mask_BHW[:, None], source.image[partner], unlabeled.image)
        mixed = mixing.mix(self.coding.encode(source.labels[partner]), pseudo, mask_BHW)
        strong_B3HW = self.colour(image_B3HW.float() / 255, given, COLOUR)
        output = given.student(self.normalize(strong_B3HW))
        terms = self.loss(output, mixed)
        given.metrics["loss/mixed"] = terms["loss"].detach()
        given.metrics["pseudo/disagreement"] = disagreement(self.coding, main_logits(output), mixed)
        if given.pictures is not None:
            given.pictures.update(unlabeled_image=unlabeled.image, pseudo=pseudo, mixed_image=strong_B3HW,
                                  mixed_labels=mixed.labels, mixed_logits=main_logits(output))
        return self.config.mixed_weight * terms["loss"]

    def classes_present(self, given: StepInput) -> Tensor | None:
        """Classes of the source images, 255 among them, of which each image's half is drawn; None: each has its own.
        Shape: bool [256]."""
        if self.config.mix_classes == "image":
            return None
        assert given.labeled.labels is not None
        return mixing.classes_present(given.labeled.labels).any(0)

    def partners(self, given: StepInput) -> Tensor:
        """The place of each unlabelled image's source image. Shape: int64 [B]."""
        assert given.unlabeled is not None
        return torch.arange(len(given.unlabeled.image), device=given.unlabeled.image.device) % len(given.labeled.image)

    @torch.no_grad()
    def pseudo_label(self, given: StepInput) -> Target:
        """The teacher's labels of the unlabelled images, weighted."""
        batch = given.unlabeled
        assert batch is not None and given.teacher is not None
        with given.teacher_autocast():
            logits_BKhw = given.teacher(self.normalize(batch.image))
        target = self.label(logits_BKhw, batch.image.shape[-2:])
        assert target.confidence is not None
        target.labels.masked_fill_(~batch.valid, 255)
        confident_BHW = target.confidence >= self.config.confidence_threshold
        target.weight = self.pixel_weight(confident_BHW.to(target.weight.dtype)) * batch.valid
        given.metrics.update(pseudo_metrics(target, confident_BHW, self.coding.num_classes))
        return target

    def pixel_weight(self, confident_BHW: Tensor) -> Tensor:
        """Weight of each pixel's pseudo-label: its image's share of confident pixels (paper), the whole worker's batch's
        (released code), or its own; none in the rows a car's bonnet or a camera's edge takes. Shape: [B, H, W]."""
        if self.config.weighting == "pixel":
            weight_BHW = confident_BHW.clone()
        else:
            over = (1, 2) if self.config.weighting == "image" else (0, 1, 2)
            weight_BHW = confident_BHW.mean(over, keepdim=True).expand(confident_BHW.shape).clone()
        if self.config.ignore_top > 0:
            weight_BHW[:, :self.config.ignore_top] = 0
        if self.config.ignore_bottom > 0:
            weight_BHW[:, -self.config.ignore_bottom:] = 0
        return weight_BHW

    def colour(self, image_B3HW: Tensor, given: StepInput, stream: int) -> Tensor:
        """Colour jitter and blur of images in [0, 1]; one draw a step and random stream, the same on every worker."""
        generator = random_generator(given.seed, given.step, stream)
        jitter, blur, sigma = torch.rand(3, generator=generator).tolist()
        if jitter < self.config.jitter_probability:
            s = self.config.jitter
            image_B3HW = mixing.color_jitter(image_B3HW, s, s, s, s, generator=generator)
        if blur < self.config.blur_probability:
            low, high = self.config.blur_sigma
            image_B3HW = mixing.gaussian_blur(image_B3HW, low + (high - low) * sigma)
        return image_B3HW


def feature_distance(feature_BChw: Tensor, pretrained_BChw: Tensor, labels_BHW: Tensor, classes: tuple[int, ...],
                     share: float) -> Tensor:
    """Mean L2 distance to the pretrained encoder's features, on cells that one thing class mostly covers (DAFormer).

    Zero, and not NaN, when there is no such cell. Shape: scalar.
    """
    size = (feature_BChw.shape[-2], feature_BChw.shape[-1])
    is_class_BTHW = torch.stack([labels_BHW == c for c in classes], 1).float()
    cover_Bhw = F.adaptive_avg_pool2d(is_class_BTHW, size).amax(1)
    mask_Bhw = (cover_Bhw >= share).float()
    distance_Bhw = (feature_BChw.float() - pretrained_BChw.float()).square().sum(1).clamp_min(1e-12).sqrt()
    return (distance_Bhw * mask_Bhw).sum() / mask_Bhw.sum().clamp_min(1)

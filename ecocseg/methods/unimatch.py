"""UniMatch (Yang et al., CVPR 2023): FixMatch with two strong views and a view of perturbed features.

The first pass decodes labelled and weak images twice, as one batch: as they are, and with half of the channels of every
map the decoder reads dropped, image by image. loss = (labelled + (strong1 + strong2) / 4 + features / 2) / 2.

Shapes: B unlabelled images, L labelled ones, C channels of a map, K outputs, h w cells of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecocseg.coding import Target
from ecocseg.device import to_device
from ecocseg.methods.base import StepInput
from ecocseg.methods.fixmatch import CHANNELS, FixMatch


class UniMatch(FixMatch):
    num_views = 2

    @classmethod
    def images_in_graph(cls, labeled: int, unlabeled: int) -> int:
        return 2 * (labeled + unlabeled)  # all are decoded twice, though encoded once

    def weak_loss(self, given: StepInput, labels: list[Target]) -> Tensor:
        """Loss of the labelled images and of the view of perturbed features, and the labels it is taught. Shape: scalar."""
        unlabeled = self.unlabeled(given)
        guess = self.guess_partner(given, self.partner(given))
        images = torch.cat([given.labeled.image, unlabeled.image])
        logits_BKhw = given.student(self.normalize(images), feature_factors=self.dropped_channels(given))
        clean_BKhw, dropped_BKhw = logits_BKhw.chunk(2)
        number = len(given.labeled.image)
        labels.extend([self.guess(clean_BKhw[number:], unlabeled, given), guess])
        features = self.unlabeled_loss(dropped_BKhw[number:], labels[0], given, 0)
        given.metrics["loss/features"] = features.detach()
        weight = self.config.mixed_weight * self.config.feature_weight
        return self.learn_labels(clean_BKhw[:number], given) + weight * features

    def strong_loss(self, given: StepInput, labels: list[Target]) -> Tensor:
        return (1 - self.config.feature_weight) * super().strong_loss(given, labels)

    def dropped_channels(self, given: StepInput) -> list[Tensor]:
        """Factors of each map's channels: ones for the clean view, then Dropout2d's for the other. Shapes: [2 (L + B), C]."""
        model, share = given.model, self.config.feature_dropout
        widths = [model.encoder.channels[level] for level in model.feature_dropout_levels]
        rows: list[list[Tensor]] = []
        for kind, batch in enumerate((given.labeled, self.unlabeled(given))):
            for generator in self.generators(batch, given, CHANNELS, kind):
                rows.append([(torch.rand(width, generator=generator) >= share) / (1 - share) for width in widths])
        device = self.unlabeled(given).image.device
        dropped = [to_device(torch.stack(level), device) for level in zip(*rows, strict=True)]
        return [torch.cat([torch.ones_like(factors), factors]) for factors in dropped]

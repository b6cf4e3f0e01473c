"""Training on labelled images alone: the source-only baseline of every table."""

from __future__ import annotations

from torch import Tensor

from ecocseg.methods.base import Method, Part, StepInput, main_logits


class Supervised(Method):
    def parts(self, given: StepInput) -> list[Part]:
        return [lambda: self.labeled_loss(given)]

    def labeled_loss(self, given: StepInput) -> Tensor:
        """Loss of the labelled images. Shape: scalar."""
        batch = given.labeled
        assert batch.labels is not None
        target = self.coding.encode(batch.labels)
        output = given.student(self.normalize(batch.image))
        terms = self.loss(output, target, average=self.config.average, normalizer=given.divisor)
        given.metrics["loss/labeled"] = terms["loss"].detach()
        given.metrics.update({f"terms/labeled_{name}": value.detach() for name, value in terms.items() if name != "loss"})
        if given.pictures is not None:
            given.pictures.update(labeled_image=batch.image, labeled_labels=batch.labels,
                                  labeled_logits=main_logits(output))
        return terms["loss"]

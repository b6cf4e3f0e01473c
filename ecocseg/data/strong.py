"""Strong views of FixMatch and UniMatch, made on the device from the weak crop: colour jitter, grey, blur.

Each image of each view has a generator of its own, so a view depends on nothing but its seed: not on the worker, the
micro-batch or the device. Shapes: B batch, C channels (3 for each date), H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecocseg.data.mixing import gaussian_blur
from ecocseg.libraries import TF


@dataclass(frozen=True)
class StrongView:
    """How strong a view is. Called with uint8 images and a generator for each, it gives float images in [0, 1].

    Jitter is torchvision's: factors of brightness, contrast and saturation uniform in 1 +- `jitter`, hue in +- `hue` of a full
    turn, in random order. The dates of a pair, behind one another, have draws of their own.
    """

    jitter: float = 0.5
    hue: float = 0.25
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels

    def __call__(self, image_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        views = []
        for image_CHW, generator in zip(image_BCHW, generators, strict=True):
            unit_CHW = image_CHW.float() / 255
            views.append(torch.cat([self._one(date_3HW, generator) for date_3HW in unit_CHW.split(3)]))
        return torch.stack(views)

    def _one(self, image_3HW: Tensor, generator: torch.Generator) -> Tensor:
        """One image [3, H, W]. Every draw is made whether it is used or not."""
        jitter, grey, blur, sigma, *strengths = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
        order = torch.randperm(4, generator=generator).tolist()
        if jitter < self.jitter_probability:
            image_3HW = self._jittered(image_3HW, strengths, order)
        if grey < self.grey_probability:
            image_3HW = TF.rgb_to_grayscale(image_3HW, num_output_channels=3)
        if blur < self.blur_probability:
            low, high = self.blur_sigma
            image_3HW = gaussian_blur(image_3HW[None], low + (high - low) * sigma)[0]
        return image_3HW

    def _jittered(self, image_3HW: Tensor, strengths: Sequence[float], order: Sequence[int]) -> Tensor:
        signed = [2 * s - 1 for s in strengths]  # uniform in -1..1
        low = max(0.0, 1 - self.jitter)
        brightness, contrast, saturation = (low + (1 + self.jitter - low) * s for s in strengths[:3])
        steps = (lambda x: TF.adjust_brightness(x, brightness), lambda x: TF.adjust_contrast(x, contrast),
                 lambda x: TF.adjust_saturation(x, saturation), lambda x: TF.adjust_hue(x, self.hue * signed[3]))
        for which in order:
            image_3HW = steps[which](image_3HW)
        return image_3HW

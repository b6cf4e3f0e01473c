"""What a batch of pixels should be: the one form of label that codings make, methods weigh and mix, and losses read.

Shapes: B batch, K bits, X 64-bit words per code, H W pixels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ecocseg import bits as bit_words

IGNORE = 255


@dataclass
class Target:
    """What a batch of pixels should be, and how much each counts."""

    labels: Tensor
    """Class ids int64 [B, H, W]; 255 = ignored: such a pixel has no loss, whatever its weight."""
    weight: Tensor
    """Weight of each pixel in the loss, float [B, H, W]; 1 until a method sets it."""
    is_true: Tensor
    """Bool [B, H, W]: the label is annotated, not guessed by a network."""
    bits: Tensor | None = None
    """Target bits packed in int64 words [B, X, H, W] (see `dense_bits`); None for one-hot."""
    confidence: Tensor | None = None
    """Confidence of pseudo-labels, float [B, H, W]; None for true labels."""
    reliable: Tensor | None = None
    """Share of each pixel's bits that came from its codeword, float [B, H, W]; None for true labels and one-hot."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """0-dim tensors worth logging; empty for true labels."""

    def to(self, device: torch.device | str) -> Target:
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            values[item.name] = value.to(device) if isinstance(value, Tensor) else value
        values["metrics"] = {name: value.to(device) for name, value in self.metrics.items()}
        return Target(**values)

    def cropped(self, rows: slice, columns: slice) -> Target:
        """The part of it at these rows and columns; its metrics stay those of the whole."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            values[item.name] = value[..., rows, columns] if isinstance(value, Tensor) else value
        return Target(**values)

    def dense_bits(self, num_bits: int) -> Tensor:
        """Target bits bool [B, K, H, W]; False at ignored pixels."""
        if self.bits is None:
            raise ValueError("a one-hot target has no bits")
        height, width = self.labels.shape[1:]
        return torch.stack([bit_words.unpack(words_XHW.flatten(1), num_bits).view(num_bits, height, width)
                            for words_XHW in self.bits])


def reordered(target: Target, order_B: Tensor) -> Target:
    """The target of the images in another order, field by field; its metrics stay."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(target):
        value = getattr(target, item.name)
        values[item.name] = value[order_B] if isinstance(value, Tensor) else value
    return Target(**values)


def true_target(labels_BHW: Tensor, words_BXHW: Tensor | None) -> Target:
    """Target of annotated class ids, with the packed bits of their codewords."""
    return Target(labels=labels_BHW.long(), bits=words_BXHW,
                  weight=torch.ones(labels_BHW.shape, device=labels_BHW.device),
                  is_true=torch.ones(labels_BHW.shape, dtype=torch.bool, device=labels_BHW.device))

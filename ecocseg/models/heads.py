"""Decoder heads: from an encoder's feature maps (finest first) to logits at the head's own stride.

B batch, C channels of a map, D channels of the head, K outputs, h w cells of a map
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecocseg.errors import InputError


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; the size stays."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def separable_conv(inputs: int, outputs: int, dilation: int) -> nn.Sequential:
    """3x3 depthwise convolution, then 1x1, each with batch norm and ReLU."""
    return nn.Sequential(conv_norm_relu(inputs, inputs, 3, dilation, groups=inputs), conv_norm_relu(inputs, outputs))


def classifier(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """Dropout of whole channels and a 1x1 convolution; small first logits, as mmsegmentation has them (std 0.01)."""
    conv = nn.Conv2d(inputs, outputs, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def resized(map_BChw: Tensor, like: Tensor, align_corners: bool = False) -> Tensor:
    """A map, bilinearly resized to the cells of another."""
    size = like.shape[-2:]
    if map_BChw.shape[-2:] == size:
        return map_BChw
    return F.interpolate(map_BChw, size=size, mode="bilinear", align_corners=align_corners)


class LevelEmbedding(nn.Module):
    """A linear layer per level to D channels, resized to the finest level and concatenated: [B, levels * D, h, w]."""

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in inputs)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat([resized(linear(m), maps[0]) for linear, m in zip(self.linear, maps, strict=True)], dim=1)


class Head(nn.Module):
    """A decoder head, made of (channels and strides of the maps, outputs, inner channels, dropout before the classifier)."""

    feature_dropout_levels: tuple[int, ...] | None = None
    """Indices of the maps the head reads and UniMatch's feature perturbation drops channels of; None = all of them."""


class DaformerHead(Head):
    """DAFormer: level embedding, then a depthwise-separable ASPP over all levels at the finest stride (4).

    Hoyer et al., CVPR 2022. The branch of dilation 1 is a plain 1x1 convolution; a 3x3 convolution joins the branches.
    The classifier is dropout and 1x1 as in the paper (the released code has a 3x3 convolution before it).
    """

    dilations = (6, 12, 18)

    def __init__(self, inputs: Sequence[int], strides: Sequence[int], num_outputs: int, channels: int,
                 dropout: float) -> None:
        super().__init__()
        wide = len(inputs) * channels
        self.embed = LevelEmbedding(inputs, channels)
        self.branches = nn.ModuleList([conv_norm_relu(wide, channels)])
        self.branches.extend(separable_conv(wide, channels, dilation) for dilation in self.dilations)
        self.join = conv_norm_relu(len(self.branches) * channels, channels, 3)
        self.classify = classifier(channels, num_outputs, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        wide_BDhw = self.embed(maps)
        return self.classify(self.join(torch.cat([branch(wide_BDhw) for branch in self.branches], dim=1)))


class SegformerHead(Head):
    """SegFormer: level embedding, 1x1 convolution with batch norm and ReLU, classifier. Xie et al., NeurIPS 2021."""

    def __init__(self, inputs: Sequence[int], strides: Sequence[int], num_outputs: int, channels: int,
                 dropout: float) -> None:
        super().__init__()
        self.embed = LevelEmbedding(inputs, channels)
        self.fuse = conv_norm_relu(len(inputs) * channels, channels)
        self.classify = classifier(channels, num_outputs, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classify(self.fuse(self.embed(maps)))


class DeepLabV2Head(Head):
    """DeepLabV2 as in DACS: dilated 3x3 convolutions from the last map straight to the outputs, summed.

    It has no norm, no dropout and no inner channels; `channels` and `dropout` are without effect.
    """

    feature_dropout_levels = (-1,)
    dilations = (6, 12)

    def __init__(self, inputs: Sequence[int], strides: Sequence[int], num_outputs: int, channels: int,
                 dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(inputs[-1], num_outputs, 3, padding=d, dilation=d) for d in self.dilations)
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(branch.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        first, *others = [branch(maps[-1]) for branch in self.branches]
        return sum(others, start=first)


class PooledContext(nn.Module):
    """The image's mean feature, through 1x1 convolution, batch norm and ReLU, spread over the map again."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.project = conv_norm_relu(inputs, channels)

    def forward(self, map_BChw: Tensor) -> Tensor:
        if self.project[1].training and len(map_BChw) == 1:  # a teacher may be in eval mode, its norms not
            raise InputError("model.head: deeplabv3plus normalises one pooled value per image over the batch, so each "
                             "forward pass needs two images or more; raise the batch or train.micro_batch, or choose "
                             "another head")
        pooled_BD11 = self.project(map_BChw.mean(dim=(2, 3), keepdim=True))
        return pooled_BD11.expand(-1, -1, *map_BChw.shape[-2:])


class DeepLabV3PlusHead(Head):
    """DeepLabV3+ with plain 3x3 convolutions, as UniMatch has it: ASPP on the last map, joined with the finest one.

    Dilations are 6, 12, 18 at stride 16 and coarser, doubled at stride 8 (Chen et al., ECCV 2018). Maps are resized
    with corners aligned, as in UniMatch's code. UniMatch has no dropout before the classifier: dropout 0 is its recipe.
    """

    feature_dropout_levels = (0, -1)
    dilations = (6, 12, 18)
    low_channels = 48

    def __init__(self, inputs: Sequence[int], strides: Sequence[int], num_outputs: int, channels: int,
                 dropout: float) -> None:
        super().__init__()
        last, factor = inputs[-1], 2 if strides[-1] <= 8 else 1
        self.branches = nn.ModuleList([conv_norm_relu(last, channels)])
        self.branches.extend(conv_norm_relu(last, channels, 3, factor * d) for d in self.dilations)
        self.branches.append(PooledContext(last, channels))
        self.join = conv_norm_relu(len(self.branches) * channels, channels)
        self.reduce = conv_norm_relu(inputs[0], self.low_channels)
        self.fuse = nn.Sequential(conv_norm_relu(channels + self.low_channels, channels, 3),
                                  conv_norm_relu(channels, channels, 3))
        self.classify = classifier(channels, num_outputs, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        context_BDhw = self.join(torch.cat([branch(maps[-1]) for branch in self.branches], dim=1))
        low_BDhw = self.reduce(maps[0])
        wide_BDhw = torch.cat([resized(context_BDhw, low_BDhw, align_corners=True), low_BDhw], dim=1)
        return self.classify(self.fuse(wide_BDhw))


HEADS: dict[str, type[Head]] = {
    "daformer": DaformerHead,
    "deeplabv2": DeepLabV2Head,
    "segformer": SegformerHead,
    "deeplabv3plus": DeepLabV3PlusHead,
}

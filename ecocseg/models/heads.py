"""Decoder heads: from an encoder's feature maps (finest first) to logits at the head's own stride.

B batch, C channels of a map, D channels of the head, K outputs, h w cells of a map
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ecocseg.errors import InputError
from ecocseg.models.encoders import double_conv


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
    fewest_images = 1
    """Images that a pass in training needs on one worker; 2 where one pooled value an image is normalised over the batch."""

    @classmethod
    def default_channels(cls, inputs: Sequence[int]) -> int:
        """Inner channels of the published model, given those of the encoder's maps."""
        return 256


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


class HrdaHead(Head):
    """HRDA: DAFormer's decoder for both scales, and a lighter one for how much the detail counts, one channel per output.

    Hoyer et al., ECCV 2022. `hrda.HrdaSegmenter` runs it.
    """

    feature_dropout_levels = ()

    def __init__(self, inputs: Sequence[int], strides: Sequence[int], num_outputs: int, channels: int,
                 dropout: float) -> None:
        super().__init__()
        self.single = DaformerHead(inputs, strides, num_outputs, channels, dropout)
        self.attention = SegformerHead(inputs, strides, num_outputs, channels, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, K, ., .] of one scale at the stride of its finest map."""
        return self.single(maps)

    def scale_attention(self, maps: Sequence[Tensor]) -> Tensor:
        """How much detail counts, from the context's maps, in [0, 1]. Shape: [B, K, ., .]."""
        return self.attention(maps).sigmoid()


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
    """Mean features of `bins` x `bins` parts of the image, through 1x1 convolution, batch norm and ReLU, spread over the
    map again."""

    def __init__(self, inputs: int, channels: int, bins: int = 1) -> None:
        super().__init__()
        self.bins = bins
        self.project = conv_norm_relu(inputs, channels)

    def forward(self, map_BChw: Tensor) -> Tensor:
        norm = self.project[1]
        alone = not (isinstance(norm, nn.SyncBatchNorm) and dist.is_initialized() and dist.get_world_size() > 1)
        if norm.training and alone and len(map_BChw) * self.bins == 1:  # a teacher may be in eval mode, its norms not
            raise InputError("model.head: deeplabv3plus and pspnet normalise one pooled value per image over the batch, so "
                             "each forward pass needs two images or more; raise the batch or train.micro_batch, or "
                             "choose another head")
        return resized(self.project(F.adaptive_avg_pool2d(map_BChw, self.bins)), map_BChw, align_corners=True)


class DeepLabV3PlusHead(Head):
    """DeepLabV3+ with plain 3x3 convolutions, as UniMatch has it: ASPP on the last map, joined with the finest one.

    Dilations are 6, 12, 18 at stride 16 and coarser, doubled at stride 8 (Chen et al., ECCV 2018). Maps are resized
    with corners aligned, as in UniMatch's code. UniMatch has no dropout before the classifier: dropout 0 is its recipe.
    """

    fewest_images = 2
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


class PspHead(Head):
    """PSPNet: the last map joined with its means over 1, 2, 3 and 6 parts a side, then a 3x3 convolution.

    Zhao et al., CVPR 2017; maps are resized with corners aligned, as in UniMatch's change detection. All inner layers
    have a quarter of the last map's channels there, and single values are dropped out, not channels.
    """

    fewest_images = 2
    feature_dropout_levels = (-1,)
    bins = (1, 2, 3, 6)

    @classmethod
    def default_channels(cls, inputs: Sequence[int]) -> int:
        return inputs[-1] // 4

    def __init__(self, inputs: Sequence[int], strides: Sequence[int], num_outputs: int, channels: int,
                 dropout: float) -> None:
        super().__init__()
        self.pools = nn.ModuleList(PooledContext(inputs[-1], channels, bins) for bins in self.bins)
        self.join = conv_norm_relu(inputs[-1] + len(self.bins) * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(channels, num_outputs, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classify(self.join(torch.cat([maps[-1], *(pool(maps[-1]) for pool in self.pools)], dim=1)))


class UnetHead(Head):
    """The right side of a U-Net, over the maps of any encoder: 1x1 convolution, resizing with corners aligned, the finer
    map beside, two convolutions; a 3x3 convolution to the outputs at the finest map's stride.

    It has the channels of the maps and no dropout, as UniMatch's for cardiac slices; `channels` and `dropout` are
    without effect.
    """

    def __init__(self, inputs: Sequence[int], strides: Sequence[int], num_outputs: int, channels: int,
                 dropout: float) -> None:
        super().__init__()
        coarse_to_fine = list(zip(inputs[:0:-1], inputs[-2::-1], strict=True))
        self.reduce = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for coarse, fine in coarse_to_fine)
        self.blocks = nn.ModuleList(double_conv(2 * fine, fine, 0.0) for _, fine in coarse_to_fine)
        self.classify = nn.Conv2d(inputs[0], num_outputs, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x_BChw = maps[-1]
        for finer_BChw, reduce, block in zip(maps[-2::-1], self.reduce, self.blocks, strict=True):
            x_BChw = block(torch.cat([finer_BChw, resized(reduce(x_BChw), finer_BChw, align_corners=True)], dim=1))
        return self.classify(x_BChw)


class ResidualConv(nn.Module):
    """x + two 3x3 convolutions of it, each after a ReLU and without norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x_BDhw: Tensor) -> Tensor:
        out_BDhw = x_BDhw
        for conv in self.convs:
            out_BDhw = conv(F.relu(out_BDhw))
        return x_BDhw + out_BDhw


class DptHead(Head):
    """DPT: four maps brought to strides p/4, p/2, p, 2p of a plain ViT of patch p, refined from the coarsest to the finest.

    Ranftl et al., ICCV 2021, as UniMatch V2 and Depth Anything have it, without the one residual unit they make and never
    run. The four maps of a hierarchical encoder have such strides already. Logits have half the stride of the finest map:
    8 times a plain ViT's patch grid. UniMatch V2 has no dropout before the classifier: dropout 0 is its recipe.
    """

    # Width of the ViT -> (inner channels, channels of the four maps). UniMatch V2: S, B, L, g of DINOv2.
    sizes: dict[int, tuple[int, tuple[int, ...]]] = {
        384: (64, (48, 96, 192, 384)), 768: (128, (96, 192, 384, 768)), 1024: (256, (256, 512, 1024, 1024)),
        1536: (384, (1536, 1536, 1536, 1536))}

    @classmethod
    def default_channels(cls, inputs: Sequence[int]) -> int:
        if len(set(inputs)) > 1:  # hierarchical
            return 256
        return next((channels for width, (channels, _) in cls.sizes.items() if inputs[0] <= width), 384)

    def __init__(self, inputs: Sequence[int], strides: Sequence[int], num_outputs: int, channels: int,
                 dropout: float) -> None:
        super().__init__()
        if len(inputs) != 4:
            raise InputError(f"model.head: dpt takes four feature maps, and the encoder gives {len(inputs)}; choose a plain "
                             "ViT, a ResNet, a ConvNeXt or a MiT")
        widths = tuple(inputs)
        if len(set(strides)) == 1:
            _, widths = self.sizes.get(widths[0], (channels, tuple(widths[0] // part for part in (8, 4, 2, 1))))
            resample = [nn.ConvTranspose2d(widths[0], widths[0], 4, 4), nn.ConvTranspose2d(widths[1], widths[1], 2, 2),
                        nn.Identity(), nn.Conv2d(widths[3], widths[3], 3, 2, padding=1)]
            self.project = nn.ModuleList(nn.Sequential(nn.Conv2d(c, w, 1), layer)
                                         for c, w, layer in zip(inputs, widths, resample, strict=True))
        else:
            self.project = nn.ModuleList(nn.Identity() for _ in inputs)
        self.reduce = nn.ModuleList(nn.Conv2d(w, channels, 3, padding=1, bias=False) for w in widths)
        self.lateral = nn.ModuleList(ResidualConv(channels) for _ in range(3))
        self.refine = nn.ModuleList(ResidualConv(channels) for _ in range(4))
        self.out = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.smooth = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.classify = classifier(channels, num_outputs, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [reduce(project(m)) for reduce, project, m in zip(self.reduce, self.project, maps, strict=True)]
        path_BDhw = levels[3]
        for level in (3, 2, 1, 0):
            if level < 3:
                path_BDhw = path_BDhw + self.lateral[level](levels[level])
            size = levels[level - 1].shape[-2:] if level > 0 else [2 * side for side in path_BDhw.shape[-2:]]
            path_BDhw = F.interpolate(self.refine[level](path_BDhw), size, mode="bilinear", align_corners=True)
            path_BDhw = self.out[level](path_BDhw)
        return self.classify(self.smooth(path_BDhw))


HEADS: dict[str, type[Head]] = {
    "daformer": DaformerHead,
    "deeplabv2": DeepLabV2Head,
    "segformer": SegformerHead,
    "deeplabv3plus": DeepLabV3PlusHead,
    "pspnet": PspHead,
    "unet": UnetHead,
    "dpt": DptHead,
    "hrda": HrdaHead,
}

"""Encoders by name: timm's models, MiT-B0..B5, a small U-Net's and, for the `smp:` gate, any of segmentation_models_pytorch.

Each gives a list of feature maps, finest first, and says their channels and strides.

B batch, C channels, H W image pixels, h w feature cells
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ecocseg.errors import InputError
from ecocseg.libraries import smp, timm

MIT_NAMES = tuple(f"mit_b{i}" for i in range(6))
UNET = "unet"
# timm families of plain ViTs: one patch grid from the first block to the last. DINOv2 is of the first, DINOv3 of the second.
_PLAIN_VIT = ("vision_transformer", "eva")
# Blocks whose outputs are feature maps, by depth, where they are not the last of each quarter: ViT-L of DPT and DINOv2.
_VIT_LEVELS = {24: (4, 11, 17, 23)}
# timm families whose maps have ceil(size / stride) cells whatever the size; all others get padded images.
_ANY_SIZE = ("resnet", "mobilenetv3", "efficientnet", "regnet", "xception_aligned")
# What frees a timm family from the image size it was pretrained at.
_FREE_SIZE: dict[str, dict[str, Any]] = {
    **{family: {"dynamic_img_size": True} for family in _PLAIN_VIT},
    "deit": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
}


class Encoder(nn.Module):
    """A network that maps an image [B, C, H, W] to feature maps, finest first.

    `channels` and `strides` describe the maps. Images are expected with sides that are multiples of `divisor` and at
    least `smallest` pixels; `Segmenter` pads them where they are not.
    """

    def __init__(self, net: nn.Module, channels: Sequence[int], strides: Sequence[int], divisor: int = 1,
                 smallest: int = 1) -> None:
        super().__init__()
        self.net: Any = net
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.divisor, self.smallest = divisor, smallest

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (height, width) the image must be padded to at its bottom and right."""
        def up(pixels: int) -> int:
            return -(-max(pixels, self.smallest) // self.divisor) * self.divisor
        return up(height), up(width)


class MitEncoder(Encoder):
    """MiT (SegFormer) with its four maps at strides 4, 8, 16, 32."""

    def __init__(self, name: str, in_channels: int, drop_path: float, recompute: bool) -> None:
        with torch.device("cpu"):  # while it is built it reads numbers out of a tensor, which one on "meta" does not have
            net = smp.encoders.get_encoder(name, in_channels=in_channels, weights=None)
            net.reset_drop_path(drop_path)
        net.to(torch.get_default_device())
        # The attention reduces its keys by 8 at stride 4, which needs 32 pixels.
        super().__init__(net, net.out_channels[2:], (4, 8, 16, 32), smallest=32)
        self.recompute = recompute

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i in range(1, 5):
            x = getattr(self.net, f"patch_embed{i}")(x)
            for block in getattr(self.net, f"block{i}"):
                x = recomputed(block, x) if self.recompute and self.training else block(x)
            x = getattr(self.net, f"norm{i}")(x)
            maps.append(x)
        return maps


class TimmEncoder(Encoder):
    """A timm model by name; maps finer than stride 4 are left out."""

    def __init__(self, name: str, in_channels: int, drop_path: float, output_stride: int | None,
                 recompute: bool) -> None:
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        options: dict[str, Any] = dict(_FREE_SIZE.get(family, {}))
        if drop_path > 0:
            options["drop_path_rate"] = drop_path
        if output_stride is not None:
            options["output_stride"] = output_stride
        try:
            net = timm.create_model(name, pretrained=False, features_only=True, in_chans=in_channels, **options)
        except (TypeError, RuntimeError, AssertionError, AttributeError, NotImplementedError, ValueError) as error:
            raise InputError(f"model.encoder: timm cannot make feature maps of '{name}' with {options}: {error}; "
                             "choose another encoder, or leave model.output_stride and model.drop_path out") from error
        info: Any = net.feature_info
        strides, channels = info.reduction(), info.channels()
        if output_stride is not None and strides[-1] != output_stride:
            raise InputError(f"model.output_stride: '{name}' ends at stride {strides[-1]} whatever is asked for, not "
                             f"{output_stride}; leave it out, or choose a ResNet")
        kept = [i for i, stride in enumerate(strides) if stride >= 4]
        super().__init__(net, [channels[i] for i in kept], [strides[i] for i in kept],
                         divisor=1 if family in _ANY_SIZE else max(strides))
        if recompute and not isinstance(net, timm.models.FeatureListNet):
            raise InputError(f"model.activation_checkpointing: '{name}' has no stages to recompute one by one; set it "
                             "to false, or choose a ResNet, ConvNeXt or MiT encoder")
        self.kept, self.recompute = kept, recompute

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self._recomputing(x) if self.recompute and self.training else self.net(x)
        maps = [maps[i] for i in self.kept]
        if str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC"):
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return maps

    def _recomputing(self, x: Tensor) -> list[Tensor]:
        maps = []
        for name, stage in self.net.items():
            for part in stage if isinstance(stage, nn.Sequential) else (stage,):
                x = recomputed(part, x) if _is_block(part) else part(x)
            if name in self.net.return_layers:
                maps.append(x)
        return maps


class VitEncoder(Encoder):
    """A plain ViT of timm: the patch tokens of four blocks, after its last norm, as maps [B, C, h, w] of one stride.

    The blocks are the last of each quarter (2 5 8 11 of 12), as UniMatch V2 takes them of DINOv2. Images of any multiple
    of the patch are taken; learned position embeddings are interpolated.
    """

    def __init__(self, name: str, family: str, in_channels: int, drop_path: float, recompute: bool) -> None:
        options = {**_FREE_SIZE[family], **({"drop_path_rate": drop_path} if drop_path > 0 else {})}
        # Without pooling every ViT ends with the norm that was trained on its tokens, or with one of that name.
        net: Any = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", in_chans=in_channels, **options)
        depth, patch = len(net.blocks), max(net.patch_embed.patch_size)
        self.levels = _VIT_LEVELS.get(depth, tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)))
        super().__init__(net, [net.embed_dim] * 4, [patch] * 4, divisor=patch)
        self.recompute = recompute

    def forward(self, x: Tensor) -> list[Tensor]:
        self.net.set_grad_checkpointing(self.recompute and self.training)
        return self.net.forward_intermediates(x, indices=list(self.levels), norm=True, intermediates_only=True)


class UnetEncoder(Encoder):
    """The left side of the 2-D U-Net that UniMatch and others train on cardiac slices: five maps at strides 1 to 16."""

    widths = (16, 32, 64, 128, 256)
    dropouts = (0.05, 0.1, 0.2, 0.3, 0.5)

    def __init__(self, in_channels: int, recompute: bool) -> None:
        inputs = (in_channels, *self.widths)
        net = nn.ModuleList(double_conv(*sizes) for sizes in zip(inputs, self.widths, self.dropouts, strict=False))
        super().__init__(net, self.widths, (1, 2, 4, 8, 16), divisor=16)
        self.recompute = recompute

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for level, block in enumerate(self.net):
            x = F.max_pool2d(x, 2) if level > 0 else x
            x = recomputed(block, x) if self.recompute and self.training else block(x)
            maps.append(x)
        return maps


def double_conv(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """A U-Net's block: two 3x3 convolutions, each with batch norm and leaky ReLU, dropout between. The size stays."""
    def half(inputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU()]
    return nn.Sequential(*half(inputs), nn.Dropout(dropout), *half(outputs))


class SmpEncoder(Encoder):
    """The encoder of a segmentation_models_pytorch model; its first map is the image itself."""

    def __init__(self, net: Any) -> None:
        stride = max(net.output_stride, 32)
        strides = [min(2**i, net.output_stride) for i in range(len(net.out_channels))]
        super().__init__(net, net.out_channels, strides, stride, stride)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.net(x)


def build_encoder(name: str, *, in_channels: int = 3, drop_path: float = 0.0, output_stride: int | None = None,
                  activation_checkpointing: bool = False) -> Encoder:
    """An encoder with fresh weights. `InputError` for a name nobody knows, or an option the encoder does not have."""
    if output_stride not in (None, 8, 16, 32):
        raise InputError(f"model.output_stride: {output_stride} is not 8, 16 or 32; leave it out for the encoder's own")
    if name in MIT_NAMES:
        if output_stride not in (None, 32):
            raise InputError(f"model.output_stride: {name} ends at stride 32, not {output_stride}; leave it out")
        return MitEncoder(name, in_channels, drop_path, activation_checkpointing)
    if name == UNET:
        if output_stride is not None or drop_path > 0:
            raise InputError("model.output_stride, model.drop_path: encoder unet has neither; leave them out")
        return UnetEncoder(in_channels, activation_checkpointing)
    if not timm.is_model(name):
        raise unknown("model.encoder", name, (*MIT_NAMES, UNET, *timm.list_models()))
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if family in _PLAIN_VIT:
        if output_stride is not None:
            raise InputError(f"model.output_stride: '{name}' has its patch as its only stride; leave it out")
        return VitEncoder(name, family, in_channels, drop_path, activation_checkpointing)
    return TimmEncoder(name, in_channels, drop_path, output_stride, activation_checkpointing)


def unknown(key: str, value: str, known: Sequence[str]) -> InputError:
    """The error for a name that is not in a list, with the nearest ones that are."""
    close = difflib.get_close_matches(value, known, n=4, cutoff=0.5)
    listed = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(known[:12])}" + (
        f" and {len(known) - 12} more (timm.list_models())" if len(known) > 12 else "")
    return InputError(f"{key}: '{value}' is unknown; {listed}")


def _is_block(module: nn.Module) -> bool:
    """Whether a module holds enough to be worth recomputing; lone convolutions, norms and activations do not."""
    return any(True for _ in module.children()) and not isinstance(module, _BatchNorm)


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, with its activations computed again in the backward pass instead of being kept.

    Running statistics of batch norm are updated once, by the first pass.
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    if not norms:
        return checkpoint(block, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms)
    context_fn: Callable[[], Any] = contexts
    return checkpoint(block, x, use_reentrant=False, context_fn=context_fn)


@contextmanager
def _statistics_kept(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count

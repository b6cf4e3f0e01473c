"""The model: an encoder, a decoder and K output channels.

B batch, C channels, K outputs, H W image pixels, h w cells of a map
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecocseg.errors import InputError
from ecocseg.libraries import smp, timm
from ecocseg.models.encoders import Encoder, SmpEncoder, build_encoder, unknown
from ecocseg.models.heads import HEADS, Head, HrdaHead
from ecocseg.models.weights import load_encoder_weights

if TYPE_CHECKING:
    from ecocseg.storage import Storage

GATE = "smp:"


class Segmenter(nn.Module):
    """Encoder and decoder. Images of any size are taken: where the encoder needs a multiple of some number of pixels,
    zeros (the mean colour, after normalisation) are added at the bottom and right and their logits cut off again.
    A model of one input channel sees the mean of an image's three.

    UniMatch perturbs features between the two halves of `forward`, `decode(maps, size)` of `encode(image)`: channels of
    the maps at `feature_dropout_levels` are multiplied by `feature_factors`, which are 0 or 2 where they drop half.
    """

    def __init__(self, encoder: Encoder, decoder: Head, num_outputs: int, in_channels: int = 3) -> None:
        super().__init__()
        self.encoder, self.decoder, self.num_outputs, self.in_channels = encoder, decoder, num_outputs, in_channels
        self.weights_note = "from scratch"
        self.memory_format = torch.contiguous_format

    @property
    def feature_dropout_levels(self) -> tuple[int, ...]:
        """Indices into `encode`'s maps, from 0: those the decoder reads, in which UniMatch drops whole channels."""
        count, levels = len(self.encoder.channels), self.decoder.feature_dropout_levels
        return tuple(range(count) if levels is None else sorted(level % count for level in levels))

    @overload
    def forward(self, image_B3HW: Tensor, return_features: Literal[False] = False,
                feature_factors: Sequence[Tensor] | None = None) -> Tensor: ...
    @overload
    def forward(self, image_B3HW: Tensor, return_features: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, image_B3HW: Tensor, return_features: bool = False,
                feature_factors: Sequence[Tensor] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, K, h, w] at the decoder's stride; with `return_features` also the last map [B, C, h, w].

        `feature_factors`: a tensor [V * B, C] for each of `feature_dropout_levels`; V views of the features are decoded as
        one batch, and the logits are [V * B, K, h, w], those of the first view first.
        """
        maps = self.encode(image_B3HW)
        if feature_factors is not None:
            for level, factors_VC in zip(self.feature_dropout_levels, feature_factors, strict=True):
                repeated = maps[level].repeat(len(factors_VC) // len(maps[level]), 1, 1, 1)
                maps[level] = repeated * factors_VC[:, :, None, None].to(repeated.dtype)
        logits_BKhw = self.decode(maps, image_B3HW.shape[-2:])
        return (logits_BKhw, maps[-1]) if return_features else logits_BKhw

    def begin_step(self, generator: torch.Generator) -> None:
        """Where the forward passes of a training step take what they draw for themselves (HRDA its box) from."""

    def encode(self, image_B3HW: Tensor) -> list[Tensor]:
        """Feature maps, finest first, of the image (padded, if the encoder needs that); those that `decode` reads."""
        if self.in_channels == 1 and image_B3HW.shape[1] == 3:
            image_B3HW = image_B3HW.mean(1, keepdim=True)
        height, width = image_B3HW.shape[-2:]
        padded_B3HW = padded_to(image_B3HW, self.encoder.padded_size(height, width))
        return self.encoder(padded_B3HW.contiguous(memory_format=self.memory_format))

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits [B, K, h, w] from `encode`'s maps; `size` is the image's (height, width) in pixels, before padding."""
        return trimmed(self.decoder(maps), size, self.encoder.padded_size(size[0], size[1]))


def padded_to(image_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The image with zeros added at the bottom and right, up to (height, width)."""
    height, width = image_BCHW.shape[-2:]
    return image_BCHW if size == (height, width) else F.pad(image_BCHW, (0, size[1] - width, 0, size[0] - height))


def trimmed(logits_BKhw: Tensor, size: Sequence[int], padded: Sequence[int]) -> Tensor:
    """The cells of a padded image's logits that an image of `size` (height, width) reaches into."""
    rows, columns = (-(-side * cells // whole) for side, cells, whole in zip(size, logits_BKhw.shape[-2:], padded, strict=True))
    return logits_BKhw[..., :rows, :columns]


class SiameseSegmenter(Segmenter):
    """Two dates of one place through one encoder, the decoder on the absolute difference of their features, as UniMatch
    detects change (Daudt et al., ICIP 2018). An image is the two dates behind one another: [B, 6, H, W]."""

    def encode(self, image_B6HW: Tensor) -> list[Tensor]:
        """|f1 - f2| of the two dates' feature maps, finest first. Each date is normalised by statistics of its own."""
        before, after = (super(SiameseSegmenter, self).encode(date) for date in image_B6HW.chunk(2, dim=1))
        return [(a - b).abs() for a, b in zip(before, after, strict=True)]


class SmpDecoder(Head):
    """Decoder and output layer of a segmentation_models_pytorch model."""

    def __init__(self, model: Any, num_maps: int) -> None:
        super().__init__()
        self.feature_dropout_levels = tuple(range(1, num_maps))  # all but the first, which is the image
        self.body, self.output = model.decoder, model.segmentation_head

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.output(self.body(list(maps)))


def build_segmenter(encoder: str, head: str, num_outputs: int, *, pretrained: str | None = None,
                    allow_missing: Sequence[str] = (), channels: int | None = None, dropout: float = 0.1,
                    output_stride: int | None = None, in_channels: int = 3, drop_path: float = 0.0,
                    activation_checkpointing: bool = False, siamese: bool = False,
                    detail_crop: tuple[int, int] | None = None, detail_weight: float = 0.1,
                    storage: Storage | None = None) -> Segmenter:
    """A segmenter with `num_outputs` (K) logits per pixel.

    `encoder` is mit_b0..mit_b5, unet or a timm name; `head` one of `HEADS`, or `smp:<Architecture>`, which takes the
    encoder names of segmentation_models_pytorch (and timm's) and its own decoder settings (`channels` and `dropout` are
    without effect), or `hrda` with its `detail_crop` and `detail_weight` (see `hrda.HrdaSegmenter`). `channels` None is
    the head's own number. `siamese` compares two dates, [B, 2 * in_channels, H, W].
    `pretrained` is explained at `weights.load_encoder_weights`. Names and options that do not exist raise `InputError`.
    """
    kind = SiameseSegmenter if siamese else Segmenter
    if head.startswith(GATE):
        if activation_checkpointing:
            raise InputError("model.activation_checkpointing: smp: heads do not have it; set it to false")
        model = kind(*_through_gate(head.removeprefix(GATE), encoder, num_outputs, output_stride, in_channels, drop_path),
                     num_outputs, in_channels)
    elif head in HEADS:
        net = build_encoder(encoder, in_channels=in_channels, drop_path=drop_path, output_stride=output_stride,
                            activation_checkpointing=activation_checkpointing)
        channels = HEADS[head].default_channels(net.channels) if channels is None else channels
        decoder = HEADS[head](net.channels, net.strides, num_outputs, channels, dropout)
        if isinstance(decoder, HrdaHead):
            from ecocseg.models.hrda import HrdaSegmenter  # is a Segmenter, which this file has to define first

            if siamese:
                raise InputError("model.siamese: hrda cannot compare two dates; choose another model.head")
            model = HrdaSegmenter(net, decoder, num_outputs, in_channels, detail_crop, detail_weight)
        else:
            model = kind(net, decoder, num_outputs, in_channels)
    else:
        raise unknown("model.head", head, (*HEADS, *(GATE + name for name in _architectures())))
    if pretrained is not None:
        model.weights_note = load_encoder_weights(model.encoder.net, encoder, pretrained, allow_missing, storage)
    return model


def _architectures() -> dict[str, Any]:
    return {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}


def _through_gate(architecture: str, encoder: str, num_outputs: int, output_stride: int | None, in_channels: int,
                  drop_path: float) -> tuple[Encoder, Head]:
    known = _architectures()
    name = next((k for k in known if k.lower() == architecture.lower()), None)
    if name is None:
        raise unknown("model.head", GATE + architecture, [GATE + k for k in known])
    if encoder not in smp.encoders.encoders and not encoder.startswith("tu-"):
        if not timm.is_model(encoder):
            raise unknown("model.encoder", encoder, [*smp.encoders.get_encoder_names(), *timm.list_models()])
        encoder = f"tu-{encoder}"
    options = {} if output_stride is None else {"encoder_output_stride": output_stride}
    if options and "encoder_output_stride" not in inspect.signature(known[name].__init__).parameters:
        raise InputError(f"model.output_stride: {GATE}{name} has no such choice; leave it out, or take "
                         f"{GATE}DeepLabV3Plus")
    try:
        model = known[name](encoder_name=encoder, encoder_weights=None, in_channels=in_channels, classes=num_outputs,
                            **options)
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"model.head: {GATE}{name} cannot be made with encoder '{encoder}' and output stride "
                         f"{output_stride}: {error}; choose another pair, or leave model.output_stride out") from error
    if hasattr(model.encoder, "reset_drop_path"):
        model.encoder.reset_drop_path(drop_path)
    elif drop_path > 0:
        raise InputError(f"model.drop_path: {GATE}{name} with '{encoder}' has none; set it to 0")
    return SmpEncoder(model.encoder), SmpDecoder(model, len(model.encoder.out_channels))


def describe(model: Segmenter) -> str:
    """Parameters of encoder and decoder in millions, outputs, and where the encoder's weights came from."""
    parts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)]
    return (f"{sum(parts):.2f} M parameters (encoder {parts[0]:.2f} M, decoder {parts[1]:.2f} M), "
            f"{model.num_outputs} outputs, encoder {model.weights_note}")


def parameter_groups(model: nn.Module, lr: float, decoder_lr_factor: float, weight_decay: float,
                     no_decay: Literal["norm_and_position", "none"]) -> list[dict[str, Any]]:
    """Optimiser groups `encoder`, `encoder_no_decay` and `decoder`; empty ones are left out.

    `norm_and_position`: norm layers and position embeddings of the encoder are not decayed; its biases and the whole
    decoder are. That is what DAFormer's configuration does: its pattern for the decoder comes before the one for
    norms. `none`: everything is decayed (the ResNet recipes). Frozen parameters are in no group.
    """
    spared = _norm_and_position(model.encoder) if no_decay == "norm_and_position" else set()  # type: ignore[arg-type]
    groups: dict[str, list[nn.Parameter]] = {"encoder": [], "encoder_no_decay": [], "decoder": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_encoder = name.startswith("encoder.")
            group = ("encoder_no_decay" if id(parameter) in spared else "encoder") if in_encoder else "decoder"
            groups[group].append(parameter)
    settings = {"encoder": (lr, weight_decay), "encoder_no_decay": (lr, 0.0),
                "decoder": (lr * decoder_lr_factor, weight_decay)}
    return [{"name": name, "params": params, "lr": settings[name][0], "initial_lr": settings[name][0],
             "weight_decay": settings[name][1]} for name, params in groups.items() if params]


def _norm_and_position(module: nn.Module) -> set[int]:
    """Ids of the parameters of norm layers and of position embeddings."""
    found = set()
    for layer in module.modules():
        if "norm" in type(layer).__name__.lower():  # LayerNorm, BatchNorm2d, GroupNorm, timm's kinds of them
            found |= {id(p) for p in layer.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        if any(part in name for part in ("pos_embed", "pos_block", "relative_position")):
            found.add(id(parameter))
    return found

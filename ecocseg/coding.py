"""How a class is written as outputs of a network: one output per class, or the bits of a codeword.

A coding owns targets, decoding, pseudo-labels and loss. Methods, models and evaluation use this one interface and never
ask which coding it is.

Shapes: B batch, N classes, K outputs (bits), X 64-bit words per code, H W pixels, h w cells of the logits, P pixels of
a strip of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ecocseg import bits as bit_words
from ecocseg import cpu, pseudo_labels
from ecocseg.kernels import Choice, dispatch, supported
from ecocseg.losses import EcocWeights, StripLoss, StripTarget, cross_entropy_loss, ecoc_loss, stripwise_loss
from ecocseg.metrics import calibration_counts, check_ids, confusion
from ecocseg.pseudo_labels import Tables
from ecocseg.resize import Scratch, Upsample, bilinear, compute_dtype
from ecocseg.target import IGNORE, Target, true_target

if TYPE_CHECKING:
    from ecocseg.codebook import Codebook


class Coding:
    """What one-hot and ECOC share."""

    num_classes: int
    num_outputs: int
    align_corners: bool = False
    kernels: Choice = "auto"
    """What computes pseudo-labels, losses and counts: what is fastest (Triton on a GPU, C++ on a CPU), torch, or Triton in any
    case."""
    weighting: Literal["image", "pixel"] = "pixel"
    """Which weight of pseudo-labels is published with FixMatch and UniMatch (the share of an image's confident
    pixels helps codewords and harms one-hot labels)."""

    def scores(self, logits_BKHW: Tensor) -> Tensor:
        """Class scores, whose argmax is the class. Shape: [B, N, H, W]."""
        raise NotImplementedError

    def scores_from_probabilities(self, probabilities_BKHW: Tensor) -> Tensor:
        """Class scores of (averaged) probabilities. Shape: [B, N, H, W]."""
        raise NotImplementedError

    def probabilities(self, logits_BKHW: Tensor) -> Tensor:
        """What windows, flips and scales may average. Shape: [B, K, H, W]."""
        raise NotImplementedError

    def logits(self, probabilities_BKHW: Tensor) -> Tensor:
        """Logits that have these (averaged) probabilities. Shape: [B, K, H, W]."""
        raise NotImplementedError

    def encode(self, labels_BHW: Tensor) -> Target:
        """Target of annotated class ids (255 ignored)."""
        raise NotImplementedError

    def pseudo_label(self, logits_BKhw: Tensor, size: tuple[int, int] | torch.Size | None = None) -> Target:
        """Target guessed from a teacher's logits, upsampled to `size` first; detached, with its confidence."""
        raise NotImplementedError

    @torch.no_grad()
    def changes(self, target: Target) -> Tensor | None:
        """What a shard keeps of a pseudo-label's bits: those that are not its class's, in planes of 8, nearly all 0.
        Shape: uint8 [B, L, H, W]; None where the class says it all."""
        if target.bits is None:
            return None
        return bit_words.to_planes(target.bits ^ self._class_words(target.labels), self.num_outputs)

    @torch.no_grad()
    def stored(self, labels_BHW: Tensor, changes_BLHW: Tensor | None, weight_B: Tensor) -> Target:
        """Target of pseudo-labels from a shard: what `changes` was taken of, weighed image by image."""
        target = self.encode(labels_BHW)
        if target.bits is not None and changes_BLHW is not None:
            target.bits = target.bits ^ bit_words.from_planes(changes_BLHW)
        target.weight = weight_B[:, None, None].to(target.weight.dtype).expand_as(target.weight)
        target.is_true = torch.zeros_like(target.is_true)
        return target

    def _class_words(self, labels_BHW: Tensor) -> Tensor:
        """Packed codewords of class ids; 0 where ignored. Shape: int64 [B, X, H, W]."""
        raise NotImplementedError

    def loss(self, logits_BKhw: Tensor, target: Target, *, average: Literal["all", "valid"] = "all",
             normalizer: float | Tensor | None = None) -> dict[str, Tensor]:
        """Scalars: "loss", which carries the gradient, and its terms, detached.

        Logits of another size than the target are resized to it (bilinear) inside. Pixel losses are summed and divided
        by the number of pixels ("all"), by that of pixels not labelled 255 ("valid"), or by `normalizer`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def certainty(self, logits_BKhw: Tensor, target: Target) -> Tensor:
        """Probability given to each pixel's target; anything in (0, 1] where it is ignored. Shape: float [B, H, W]."""
        size = _size(target.labels)
        upsample = Upsample((logits_BKhw.shape[-2], logits_BKhw.shape[-1]), size, self.align_corners, logits_BKhw)
        certainty_BHW = torch.empty(target.labels.shape, dtype=upsample.dtype, device=logits_BKhw.device)
        for image, first, end, logits_KP in pseudo_labels.strips(logits_BKhw, upsample):
            certainty_BHW[image, first:end].view(-1).copy_(self._certainty(logits_KP, target, image, first, end))
        return certainty_BHW

    def _certainty(self, logits_KP: Tensor, target: Target, image: int, first: int, end: int) -> Tensor:
        """`certainty` of the rows first to end of one image. Shape: [P]."""
        raise NotImplementedError

    def maps(self, logits_BKHW: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Probabilities and 0/1 targets of M complementary maps of a pixel, for losses on areas. Shapes: [B, M, H, W]."""
        raise NotImplementedError

    def describe(self) -> str:
        raise NotImplementedError

    def _weight(self, target: Target, average: str, normalizer: float | Tensor | None, dtype: torch.dtype) -> Tensor:
        """Weight of each pixel over the divisor, 0 where ignored. Shape: [B, H, W]."""
        divisor = self._divisor(target, average, normalizer)
        return (target.weight.to(dtype) / divisor).masked_fill_(target.labels == IGNORE, 0)

    def _divisor(self, target: Target, average: str, normalizer: float | Tensor | None) -> float | Tensor:
        """What the losses summed over pixels are divided by."""
        if normalizer is not None:
            return normalizer
        if average not in ("all", "valid"):
            raise ValueError(f'average is "all" or "valid", not {average!r}')
        return target.labels.numel() if average == "all" else (target.labels != IGNORE).sum().clamp_min(1)

    def uses_kernels(self, logits_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> bool:
        """Triton kernels compute this case."""
        return supported(self.kernels, logits_BKhw, size, self.num_classes, align_corners)

    def uses_compiled(self, logits_BKhw: Tensor, size: tuple[int, int]) -> bool:
        """Compiled functions compute this case, on a CPU."""
        return self.kernels == "auto" and cpu.supported(logits_BKhw, size, self.align_corners)

    @torch.no_grad()
    def counts(self, logits_BKhw: Tensor, labels_BHW: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
        """Evaluation of logits, upsampled to the labels' size first: confusion int64 [N, N] and calibration int64 [15, 3],
        see metrics.py. InputError for a label that is no class."""
        size = _size(labels_BHW)
        check_ids(labels_BHW, self.num_classes)
        if self.uses_kernels(logits_BKhw, size, align_corners):
            return dispatch.counts(logits_BKhw, labels_BHW, self._kernel_tables(logits_BKhw.device), align_corners)
        if self.kernels == "auto" and cpu.supported(logits_BKhw, size, align_corners):
            return cpu.counts(logits_BKhw, labels_BHW, self._cpu_tables(), align_corners)
        logits_BKHW = bilinear(logits_BKhw, size, align_corners)
        return (confusion(self.scores(logits_BKHW).argmax(1), labels_BHW, self.num_classes),
                calibration_counts(self.probabilities(logits_BKHW), labels_BHW, self))

    def _cpu_tables(self) -> Tables | None:
        return None

    def _kernel_tables(self, device: torch.device) -> dispatch.Tables | None:
        return None


class OneHotCoding(Coding):
    """One output per class: softmax cross-entropy and argmax, the baseline."""

    def __init__(self, num_classes: int, *, align_corners: bool = False, kernels: Choice = "auto") -> None:
        self.num_classes = self.num_outputs = num_classes
        self.align_corners, self.kernels = align_corners, kernels

    def scores(self, logits_BKHW: Tensor) -> Tensor:
        return logits_BKHW

    def scores_from_probabilities(self, probabilities_BKHW: Tensor) -> Tensor:
        return probabilities_BKHW

    def probabilities(self, logits_BKHW: Tensor) -> Tensor:
        return logits_BKHW.to(compute_dtype(logits_BKHW)).softmax(1)

    def logits(self, probabilities_BKHW: Tensor) -> Tensor:
        return probabilities_BKHW.log()

    def encode(self, labels_BHW: Tensor) -> Target:
        return true_target(labels_BHW, None)

    @torch.no_grad()
    def pseudo_label(self, logits_BKhw: Tensor, size: tuple[int, int] | torch.Size | None = None) -> Target:
        if self.uses_kernels(logits_BKhw, pixels := _pixels(logits_BKhw, size), self.align_corners):
            return dispatch.one_hot_pseudo_label(logits_BKhw, pixels, self.align_corners)
        compute = cpu.one_hot_pseudo_label if self.uses_compiled(logits_BKhw, pixels) else pseudo_labels.one_hot_pseudo_label
        return compute(logits_BKhw, pixels, self.align_corners)

    def loss(self, logits_BKhw: Tensor, target: Target, *, average: Literal["all", "valid"] = "all",
             normalizer: float | Tensor | None = None) -> dict[str, Tensor]:
        if self.uses_kernels(logits_BKhw, _size(target.labels), self.align_corners):
            return dispatch.cross_entropy(logits_BKhw, target, self._divisor(target, average, normalizer), self.align_corners)
        weight_BHW = self._weight(target, average, normalizer, compute_dtype(logits_BKhw))
        if self.uses_compiled(logits_BKhw, _size(target.labels)):
            return {"loss": cpu.loss(logits_BKhw, target, weight_BHW, self.align_corners)[0]}
        labels_BHW = target.labels.clamp_max(self.num_classes - 1)  # 255 has weight 0

        def strip(buffers: Scratch) -> StripLoss:
            return lambda logits_KP, image, first, end, grad_KP: cross_entropy_loss(
                logits_KP, labels_BHW[image, first:end].reshape(-1), weight_BHW[image, first:end].reshape(-1), buffers, grad_KP)

        loss, _ = stripwise_loss(logits_BKhw, _size(target.labels), strip, 1, self.align_corners)
        return {"loss": loss}

    def _certainty(self, logits_KP: Tensor, target: Target, image: int, first: int, end: int) -> Tensor:
        labels_1P = target.labels[image, first:end].reshape(1, -1).clamp_max(self.num_classes - 1)
        return logits_KP.log_softmax(0).gather(0, labels_1P)[0].exp_()

    def maps(self, logits_BKHW: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """One map per class."""
        classes_N = torch.arange(self.num_classes, device=logits_BKHW.device)
        return self.probabilities(logits_BKHW), target.labels[:, None] == classes_N[:, None, None]

    def describe(self) -> str:
        return f"one-hot, {self.num_classes} classes"


class EcocCoding(Coding):
    """A codeword per class: K bits, decoded to the class at the least soft Hamming distance."""

    weighting = "image"

    def __init__(
        self,
        codebook: Codebook,
        *,
        reliability: float = 0.95,
        distance_weight: float = 5.0,
        contrast_weight: float = 2.0,
        temperature: float = 0.5,
        bce_weight: float = 1.0,
        contrast_negatives: Literal["codewords", "target_and_negatives"] = "codewords",
        label_form: Literal["hybrid", "code", "bit"] = "hybrid",
        max_candidates: int | None = None,
        align_corners: bool = False,
        kernels: Choice = "auto",
    ) -> None:
        if contrast_negatives not in ("codewords", "target_and_negatives"):
            raise ValueError(f'contrast_negatives is "codewords" or "target_and_negatives", not {contrast_negatives!r}')
        if label_form not in ("hybrid", "code", "bit"):
            raise ValueError(f'label_form is "hybrid", "code" or "bit", not {label_form!r}')
        self.codebook = codebook
        self.num_classes, self.num_outputs = (int(n) for n in codebook.matrix.shape)
        self.reliability, self.label_form, self.max_candidates = reliability, label_form, max_candidates
        self.loss_weights = EcocWeights(bce_weight, distance_weight, contrast_weight, temperature, contrast_negatives)
        self.align_corners, self.kernels = align_corners, kernels
        self._codes_NK = torch.tensor(codebook.matrix, dtype=torch.bool)
        self._tables: dict[tuple[torch.device, torch.dtype], Tables] = {}
        self._tables_of_kernels: dict[torch.device, dispatch.Tables] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_tables_of_kernels": {}}  # tables belong to a device of this process

    def _on(self, device: torch.device, dtype: torch.dtype) -> Tables:
        key = (device, dtype)
        if key not in self._tables:
            codes_NK = self._codes_NK.to(device)
            self._tables[key] = Tables(codes_NK.to(dtype) * 2 - 1, (~codes_NK).to(dtype).sum(1)[:, None],
                                        bit_words.pack(codes_NK.t()))
        return self._tables[key]

    def _cpu_tables(self) -> Tables:
        return self._on(torch.device("cpu"), torch.float32)

    def _kernel_tables(self, device: torch.device) -> dispatch.Tables:
        if device not in self._tables_of_kernels:
            self._tables_of_kernels[device] = dispatch.tables(self._codes_NK, device)
        return self._tables_of_kernels[device]

    def probabilities(self, logits_BKHW: Tensor) -> Tensor:
        return logits_BKHW.to(compute_dtype(logits_BKHW)).sigmoid()

    def logits(self, probabilities_BKHW: Tensor) -> Tensor:
        return probabilities_BKHW.logit()

    def scores(self, logits_BKHW: Tensor) -> Tensor:
        return self.scores_from_probabilities(self.probabilities(logits_BKHW))

    def scores_from_probabilities(self, probabilities_BKHW: Tensor) -> Tensor:
        """K - d_n = sum_k p_k S_nk + sum_k (1 - M_nk): one matrix product."""
        p_BKP = probabilities_BKHW.to(compute_dtype(probabilities_BKHW)).flatten(2)
        tables = self._on(p_BKP.device, p_BKP.dtype)
        with torch.autocast(p_BKP.device.type, enabled=False):
            scores_BNP = tables.signs_NK @ p_BKP + tables.zeros_N1
        return scores_BNP.view(len(p_BKP), self.num_classes, *probabilities_BKHW.shape[2:])

    def encode(self, labels_BHW: Tensor) -> Target:
        return true_target(labels_BHW, self._class_words(labels_BHW))

    def _class_words(self, labels_BHW: Tensor) -> Tensor:
        words_XN = self._on(labels_BHW.device, torch.float32).words_XN
        known_BHW = labels_BHW != IGNORE
        index_BHW = torch.where(known_BHW, labels_BHW, 0).long()
        return torch.where(known_BHW[:, None], words_XN[:, index_BHW].transpose(0, 1), 0)

    @torch.no_grad()
    def pseudo_label(self, logits_BKhw: Tensor, size: tuple[int, int] | torch.Size | None = None) -> Target:
        if self.uses_kernels(logits_BKhw, pixels := _pixels(logits_BKhw, size), self.align_corners):
            return dispatch.ecoc_pseudo_label(
                logits_BKhw, pixels, self._kernel_tables(logits_BKhw.device), reliability=self.reliability,
                max_candidates=self.max_candidates, label_form=self.label_form, align_corners=self.align_corners)
        compute = cpu.ecoc_pseudo_label if self.uses_compiled(logits_BKhw, pixels) else pseudo_labels.ecoc_pseudo_label
        limit = min(self.max_candidates or self.num_classes, self.num_classes)
        return compute(logits_BKhw, pixels, self._on(logits_BKhw.device, compute_dtype(logits_BKhw)),
                       reliability=self.reliability, limit=limit, label_form=self.label_form, align_corners=self.align_corners)

    def loss(self, logits_BKhw: Tensor, target: Target, *, average: Literal["all", "valid"] = "all",
             normalizer: float | Tensor | None = None) -> dict[str, Tensor]:
        if target.bits is None:
            raise ValueError("this target has no bits; make it with this coding's encode or pseudo_label")
        if self.uses_kernels(logits_BKhw, _size(target.labels), self.align_corners):
            return dispatch.ecoc_loss(logits_BKhw, target, self._divisor(target, average, normalizer),
                                      self._kernel_tables(logits_BKhw.device), self.loss_weights, self.align_corners)
        dtype = compute_dtype(logits_BKhw)
        signs_NK = self._on(logits_BKhw.device, dtype).signs_NK
        weight_BHW = self._weight(target, average, normalizer, dtype)
        same_size = logits_BKhw.shape[-2:] == target.labels.shape[1:]  # then products are as many as pixels: torch is faster
        if not same_size and self.uses_compiled(logits_BKhw, _size(target.labels)):
            loss, detail = cpu.loss(logits_BKhw, target, weight_BHW, self.align_corners, self.loss_weights, signs_NK)
            return {"loss": loss, "bce": detail[0], "distance": detail[1], "contrast": detail[2]}
        labels_BHW, words_BXHW = target.labels.clamp_max(self.num_classes - 1), target.bits  # 255 has weight 0

        words_XN = self._on(logits_BKhw.device, dtype).words_XN

        def strip(buffers: Scratch) -> StripLoss:
            def loss(maps_CP: Tensor, image: int, first: int, end: int, grad_CP: Tensor | None) -> Tensor:
                part = self._strip_target(labels_BHW[image, first:end], weight_BHW[image, first:end],
                                          words_BXHW[image, :, first:end], words_XN)
                return ecoc_loss(maps_CP, part, signs_NK, self.loss_weights, buffers, grad_CP)

            return loss

        loss, detail = stripwise_loss(logits_BKhw, _size(target.labels), strip, 4, self.align_corners, signs_NK)
        return {"loss": loss, "bce": detail[0], "distance": detail[1], "contrast": detail[2]}

    @staticmethod
    def _strip_target(labels_rW: Tensor, weight_rW: Tensor, words_XrW: Tensor, words_XN: Tensor) -> StripTarget:
        labels_P, weight_P, words_XP = labels_rW.reshape(-1), weight_rW.reshape(-1), words_XrW.flatten(1)
        on_cpu = labels_P.device.type == "cpu"  # elsewhere the answer would have to be waited for
        differ_P = (words_XN.index_select(1, labels_P) != words_XP).any(0).logical_and_(weight_P != 0) if on_cpu else None
        return StripTarget(labels_P, weight_P, words_XP, differ_P is not None and not differ_P.any())

    def _certainty(self, logits_KP: Tensor, target: Target, image: int, first: int, end: int) -> Tensor:
        """Mean over bits of the probability of the target's bit."""
        assert target.bits is not None
        bits_KP = bit_words.unpack(target.bits[image, :, first:end].flatten(1), len(logits_KP))
        return torch.where(bits_KP, logits_KP, -logits_KP).sigmoid_().mean(0)

    def maps(self, logits_BKHW: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Two maps per bit, of its ones and its zeros: each bit parts the pixels into two classes."""
        p_BKHW, bits_BKHW = self.probabilities(logits_BKHW), target.dense_bits(self.num_outputs)
        return torch.cat([p_BKHW, 1 - p_BKHW], 1), torch.cat([bits_BKHW, ~bits_BKHW], 1)

    def describe(self) -> str:
        w = self.loss_weights
        form = f"hybrid (T {self.reliability:g})" if self.label_form == "hybrid" else f"{self.label_form}-wise"
        return (f"ECOC, {self.num_classes} classes in {self.num_outputs} bits, {form} pseudo-labels, "
                f"loss {w.bce:g} bce + {w.distance:g} distance + {w.contrast:g} contrast (tau {w.temperature:g})")


def _size(labels_BHW: Tensor) -> tuple[int, int]:
    return labels_BHW.shape[1], labels_BHW.shape[2]


def _pixels(logits_BKhw: Tensor, size: tuple[int, int] | torch.Size | None) -> tuple[int, int]:
    """Height and width of the labels of these logits."""
    height, width = logits_BKhw.shape[-2:] if size is None else size
    return height, width

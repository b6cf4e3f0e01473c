"""The coding maths as slow and obvious loops over pixels, classes and bits, in Python floats (float64).

Decoding, losses and bit mining of ECOCSeg (NeurIPS 2025), term by term; nothing here is shared with the package. Tests compare
the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

IGNORE = 255
COSINE_EPS = 1e-3


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def distances(p: list[float], codes: list[list[int]]) -> list[float]:
    """Soft Hamming distance of one pixel's bit probabilities to each codeword."""
    return [sum(abs(m - x) for m, x in zip(code, p, strict=True)) for code in codes]


def scores(logits_BKHW: Tensor, codes: list[list[int]]) -> Tensor:
    """K - d_n. Shape: float64 [B, N, H, W]."""
    B, K, H, W = logits_BKHW.shape
    out = torch.empty(B, len(codes), H, W, dtype=torch.float64)
    for b in range(B):
        for y in range(H):
            for x in range(W):
                p = [sigmoid(v) for v in logits_BKHW[b, :, y, x].tolist()]
                out[b, :, y, x] = torch.tensor([K - d for d in distances(p, codes)], dtype=torch.float64)
    return out


def reliable_mask(p: list[float], codes: list[list[int]], threshold: float, max_candidates: int | None) -> list[int]:
    """Reliable bit mining of one pixel."""
    K, N = len(p), len(codes)
    q = [max(x, 1 - x) for x in p]
    d = distances(p, codes)
    order = sorted(range(N), key=lambda n: (d[n], n))
    for n in range(1, N + 1):
        if max_candidates is not None and n > max_candidates:
            return [0] * K
        candidates = [codes[c] for c in order[:n]]
        shared = [int(all(code[k] == candidates[0][k] for code in candidates)) for k in range(K)]
        if sum(shared) == 0:
            return [0] * K
        if sum(x for x, s in zip(q, shared, strict=True) if s) / sum(shared) > threshold:
            return shared
    return shared


def pseudo_label_pixel(z: list[float], codes: list[list[int]], threshold: float,
                       max_candidates: int | None) -> tuple[int, list[int], float, list[int]]:
    """Class, hybrid bits, confidence and reliability mask of one pixel."""
    p = [sigmoid(v) for v in z]
    d = distances(p, codes)
    label = d.index(min(d))
    mask = reliable_mask(p, codes, threshold, max_candidates)
    bits = [codes[label][k] if mask[k] else int(z[k] >= 0) for k in range(len(z))]
    return label, bits, sum(max(x, 1 - x) for x in p) / len(p), mask


def cosine(z: list[float], sign: list[int]) -> float:
    norm = max(math.sqrt(sum(v * v for v in z)), COSINE_EPS)
    return sum(v * s for v, s in zip(z, sign, strict=True)) / (norm * math.sqrt(len(z)))


def bit_cross_entropy(z: float, bit: int) -> float:
    return max(z, 0) - z * bit + math.log1p(math.exp(-abs(z)))


def loss(logits_BKHW: Tensor, labels_BHW: Tensor, bits_BKHW: Tensor, weight_BHW: Tensor, codes: list[list[int]], *,
         weights: tuple[float, float, float] = (1, 5, 2), temperature: float = 0.5,
         negatives: str = "codewords") -> dict[str, float]:
    """Sums over pixels of bce, distance, contrast, and their weighted sum."""
    B, K, H, W = logits_BKHW.shape
    total = {"bce": 0.0, "distance": 0.0, "contrast": 0.0}
    for b in range(B):
        for y in range(H):
            for x in range(W):
                label, w = int(labels_BHW[b, y, x]), float(weight_BHW[b, y, x])
                if label == IGNORE:
                    continue
                z, bits = logits_BKHW[b, :, y, x].tolist(), bits_BKHW[b, :, y, x].int().tolist()
                target = cosine(z, [2 * v - 1 for v in bits])
                others = [cosine(z, [2 * v - 1 for v in code]) for code in codes]
                if negatives == "target_and_negatives":
                    others = [target] + [c for n, c in enumerate(others) if n != label]
                total["bce"] += w * sum(bit_cross_entropy(v, t) for v, t in zip(z, bits, strict=True)) / K
                total["distance"] += w * (1 - target)
                total["contrast"] += w * (math.log(sum(math.exp(c / temperature) for c in others))
                                          - target / temperature)
    total["loss"] = sum(f * total[name] for f, name in zip(weights, ("bce", "distance", "contrast"), strict=True))
    return total


def cross_entropy(logits_BNHW: Tensor, labels_BHW: Tensor, weight_BHW: Tensor) -> float:
    """Sum over pixels of the softmax cross-entropy."""
    total = 0.0
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in labels_BHW.shape)).tolist():
        label = int(labels_BHW[b, y, x])
        if label != IGNORE:
            z = logits_BNHW[b, :, y, x].tolist()
            top = max(z)
            total += float(weight_BHW[b, y, x]) * (top + math.log(sum(math.exp(v - top) for v in z)) - z[label])
    return total


# Both codings by one name: `codes` is a codeword per class, or None for one-hot. Pixels of a batch are (b, y, x).

def probabilities(z: list[float], codes: list[list[int]] | None) -> list[float]:
    """Of each output of one pixel: softmax of one-hot, sigmoid of bits."""
    if codes is not None:
        return [sigmoid(v) for v in z]
    powers = [math.exp(v - max(z)) for v in z]
    return [power / sum(powers) for power in powers]


def guess(z: list[float], codes: list[list[int]] | None, threshold: float) -> tuple[int, list[int], float]:
    """Class, bits (none for one-hot) and confidence of one pixel's pseudo-label."""
    if codes is not None:
        return pseudo_label_pixel(z, codes, threshold, None)[:3]
    p = probabilities(z, None)
    return p.index(max(p)), [], max(p)


def true_bits(labels_BHW: Tensor, codes: list[list[int]] | None) -> Tensor:
    """Codeword of every pixel; zeros where ignored; no bits for one-hot. Shape: bool [B, K, H, W]."""
    B, H, W = labels_BHW.shape
    bits = torch.zeros(B, len(codes[0]) if codes else 0, H, W, dtype=torch.bool)
    for n, code in enumerate(codes or []):
        for k, bit in enumerate(code):
            bits[:, k] |= (labels_BHW == n) & bool(bit)
    return bits


def sum_of_losses(logits_BKHW: Tensor, labels_BHW: Tensor, bits_BKHW: Tensor, weight_BHW: Tensor,
                  codes: list[list[int]] | None) -> float:
    """Sum over pixels of a coding's loss, with the paper's constants."""
    if codes is None:
        return cross_entropy(logits_BKHW, labels_BHW, weight_BHW)
    return loss(logits_BKHW, labels_BHW, bits_BKHW, weight_BHW, codes)["loss"]


def hard_weight(logits_BKHW: Tensor, labels_BHW: Tensor, codes: list[list[int]] | None, threshold: float, least: int) -> Tensor:
    """Online hard example mining, image by image: 1 / n on the n pixels whose label is given `threshold` or less (the mean
    over its bits), or the `least` pixels given least. Shape: float64 [B, H, W]."""
    weight = torch.zeros(labels_BHW.shape, dtype=torch.float64)
    for b in range(len(labels_BHW)):
        ranked = []
        for y, x in torch.cartesian_prod(*(torch.arange(n) for n in labels_BHW.shape[1:])).tolist():
            label = int(labels_BHW[b, y, x])
            if label != IGNORE:
                p = probabilities(logits_BKHW[b, :, y, x].tolist(), codes)
                ranked.append((p[label] if codes is None else sum(v if bit else 1 - v for v, bit in zip(
                    p, codes[label], strict=True)) / len(p), y, x))
        ranked.sort()
        number = max(min(least, len(ranked)), sum(p <= threshold for p, *_ in ranked))
        for _, y, x in ranked[:number]:
            weight[b, y, x] = 1 / number
    return weight


def dice(logits_BKHW: Tensor, labels_BHW: Tensor, bits_BKHW: Tensor, weight_BHW: Tensor,
         codes: list[list[int]] | None) -> float:
    """Soft Dice with squared denominators, averaged over maps: a class's, or a bit's ones and its zeros. Times the mean
    weight of the pixels that have any."""
    maps: list[list[tuple[float, float, float]]] = [[] for _ in range(logits_BKHW.shape[1] * (1 if codes is None else 2))]
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in labels_BHW.shape)).tolist():
        label, w = int(labels_BHW[b, y, x]), float(weight_BHW[b, y, x])
        p = probabilities(logits_BKHW[b, :, y, x].tolist(), codes)
        truth = [float(n == label) for n in range(len(p))] if codes is None else bits_BKHW[b, :, y, x].double().tolist()
        if codes is not None:
            p, truth = p + [1 - v for v in p], truth + [1 - v for v in truth]
        for one, v, t in zip(maps, p, truth, strict=True):
            one.append((0.0 if label == IGNORE else w, v, t))
    weights = [w for w, _, _ in maps[0] if w > 0]
    total = sum(1 - (2 * sum(w * v * t for w, v, t in one) + 1e-5) / (sum(w * (v * v + t * t) for w, v, t in one) + 1e-5)
                for one in maps)
    return total / len(maps) * sum(weights) / len(weights)


class PixelStudent(nn.Module):
    """Each pixel by itself, in float64; it keeps what it was shown."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Conv2d(3, outputs, 1).double()
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image.detach().clone())
        return self.layer(image.double()) * 4

    def logits(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(image.double()) * 4

"""Bits in 64-bit words, and the mining of reliable bits (METHOD 4).

Shapes: B batch, N classes, K bits, X 64-bit words per code (ceil(K / 64)), P pixels in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 64
_GROUP = 16  # bits summed as one float32 number: exact below 2^24


def num_words(num_bits: int) -> int:
    return (num_bits + WORD - 1) // WORD


def pack(bits_KP: Tensor) -> Tensor:
    """Bits [K, P] (bool or 0/1) as words int64 [X, P]; bit k is bit k % 64 of word k // 64, unused bits are 0."""
    num_bits = len(bits_KP)
    groups = WORD // _GROUP * num_words(num_bits)
    powers_GK = torch.zeros(groups, num_bits, device=bits_KP.device)
    k = torch.arange(num_bits, device=bits_KP.device)
    powers_GK[k // _GROUP, k] = 2.0 ** (k % _GROUP)
    with torch.autocast(bits_KP.device.type, enabled=False):
        parts_GP = (powers_GK @ bits_KP.float()).long()  # one product of small whole numbers, exact
    shift_4 = torch.arange(0, WORD, _GROUP, device=bits_KP.device)[:, None]
    return (parts_GP.view(-1, WORD // _GROUP, parts_GP.shape[1]) << shift_4).sum(1)


def unpack(words_XP: Tensor, num_bits: int) -> Tensor:
    """Words int64 [X, P] as bits bool [K, P]."""
    num_pixels = words_XP.shape[1]
    bytes_XP8 = words_XP.contiguous().view(torch.uint8).view(len(words_XP), num_pixels, 8)  # little-endian everywhere
    bytes_LP = bytes_XP8.transpose(1, 2).contiguous().view(-1, 1, num_pixels)[: (num_bits + 7) // 8]
    masks_8 = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=words_XP.device)
    return (bytes_LP & masks_8[:, None]).ne(0).reshape(-1, num_pixels)[:num_bits]


def popcount(words: Tensor) -> Tensor:
    """Number of ones in each int64 word. Shape: as given."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def first_argmax(scores_NP: Tensor) -> Tensor:
    """Class of the largest score, the lowest id among equals, the last where scores are NaN. Shape: int64 [P].

    Several passes that vectorise: 4 to 10 times faster on CPU than argmax over the first axis.
    """
    rank_N1 = torch.arange(len(scores_NP), 0, -1, dtype=torch.int16, device=scores_NP.device)[:, None]
    first_P = len(scores_NP) - (scores_NP == scores_NP.amax(0)).mul(rank_N1).amax(0).long()
    return first_P.clamp_max(len(scores_NP) - 1)  # NaN equals nothing, and must not point outside the tables


def all_ones(num_bits: int, device: torch.device) -> Tensor:
    """A code of K ones. Shape: int64 [X, 1]."""
    return pack(torch.ones(num_bits, 1, device=device))


def reliable_words(q_KP: Tensor, scores_NP: Tensor, labels_P: Tensor, confidence_P: Tensor, words_XN: Tensor,
                   threshold: float, max_candidates: int | None = None) -> Tensor:
    """Reliable bit mining: which bits of each pixel are taken from its class's codeword. Shape: packed, int64 [X, P].

    Classes join the candidates nearest first (ties: lowest id first); bits on which all candidates' codewords agree are
    shared; a pixel is settled when its mean confidence q over the shared bits exceeds `threshold` (R = shared bits), or
    when none is left (R = 0). R is the shared bits too after the last class, and 0 when `max_candidates` classes, being
    fewer than all, did not settle the pixel (the authors' code: 8). `labels_P` are the nearest classes, `confidence_P`
    the mean of q over all bits: with one candidate every bit is shared, so it settles most pixels at once.
    """
    num_bits, num_classes = len(q_KP), len(scores_NP)
    limit = num_classes if max_candidates is None else min(max_candidates, num_classes)
    ones_X1 = all_ones(num_bits, q_KP.device)
    found_XP = torch.where(confidence_P > threshold, ones_X1, 0)
    pixel_U = (confidence_P <= threshold).nonzero().squeeze(1)  # those still open
    shared_XU = ones_X1.expand(-1, len(pixel_U))
    q_KU, scores_NU = q_KP.index_select(1, pixel_U), scores_NP.index_select(1, pixel_U)  # faster than q_KP[:, pixel_U]
    nearest_U = labels_P[pixel_U]
    first_XU = words_XN.index_select(1, nearest_U)
    for n in range(2, limit + 1):
        if len(pixel_U) == 0:
            break
        scores_NU.scatter_(0, nearest_U[None], -torch.inf)  # candidates already in leave the queue
        nearest_U = first_argmax(scores_NU)
        shared_XU = shared_XU & ~(words_XN.index_select(1, nearest_U) ^ first_XU)
        count_U = popcount(shared_XU).sum(0)
        sum_U = q_KU.mul(unpack(shared_XU, num_bits)).sum(0)
        confident_U = sum_U / count_U.clamp_min(1) > threshold
        settled_U = confident_U | (count_U == 0) | (n == num_classes)
        # Confident or after the last class: R = shared bits, which are none where none is left.
        found_XP[:, pixel_U] = torch.where(settled_U, shared_XU, 0)
        open_V = settled_U.logical_not_().nonzero().squeeze(1)
        pixel_U, nearest_U = pixel_U[open_V], nearest_U[open_V]
        q_KU, scores_NU = q_KU.index_select(1, open_V), scores_NU.index_select(1, open_V)
        shared_XU, first_XU = shared_XU.index_select(1, open_V), first_XU.index_select(1, open_V)
    return found_XP

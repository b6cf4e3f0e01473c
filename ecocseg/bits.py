"""Bits in 64-bit words, and the mining of reliable bits.

Shapes: B batch, N classes, K bits, X 64-bit words per code (ceil(K / 64)), P pixels in a row,
L planes of 8 bits of an image of H W pixels.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ecocseg.device import constant

WORD = 64
_WORTH_LEAVING = 0.7  # share of open pixels below which the others are left out
_GROUP = 24  # bits summed as one float32 number, exact below 2^24


def num_words(num_bits: int) -> int:
    return (num_bits + WORD - 1) // WORD


@functools.lru_cache(maxsize=32)
def _powers(num_bits: int, device: torch.device) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Powers of two [G, K] that sum up groups of bits of one word, and the word and shift of each group."""
    k = torch.arange(num_bits)
    places = sorted({(n // WORD, n % WORD // _GROUP * _GROUP) for n in range(num_bits)})
    group = torch.tensor([places.index((n // WORD, n % WORD // _GROUP * _GROUP)) for n in range(num_bits)])
    powers_GK = torch.zeros(len(places), num_bits)
    powers_GK[group, k] = 2.0 ** (k % WORD % _GROUP)
    return powers_GK.to(device), tuple(places)


def pack(bits_KP: Tensor) -> Tensor:
    """Bits [K, P] (bool or 0/1) as words int64 [X, P]; bit k is bit k % 64 of word k // 64, unused bits are 0."""
    powers_GK, places = _powers(len(bits_KP), bits_KP.device)
    with torch.autocast(bits_KP.device.type, enabled=False):
        parts_GP = (powers_GK @ bits_KP.float()).long()  # one product of small whole numbers, exact
    words_XP = parts_GP.new_zeros(num_words(len(bits_KP)), parts_GP.shape[1])
    for part_P, (word, shift) in zip(parts_GP, places, strict=True):
        words_XP[word] |= part_P << shift
    return words_XP


@functools.lru_cache(maxsize=64)
def _countdown(start: int, last: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """start, start - 1, ..., last as a column."""
    return torch.arange(start, last - 1, -1, dtype=dtype, device=device)[:, None]


def _integers(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """Whole numbers as wide as floats of a type, and their width."""
    return (torch.int64, 64) if dtype == torch.float64 else (torch.int32, 32)


def _bits_at_the_top(words_XP: Tensor, out_KP: Tensor) -> Tensor:
    """Whole numbers whose sign bit is each bit of the words, in the memory of floats `out_KP`; other bits are any.
    Shape: int32 or int64 [K, P]."""
    dtype, width = _integers(out_KP.dtype)
    out_KP = out_KP.view(dtype)
    parts_P = words_XP.unbind() if width == WORD else [
        part_P.contiguous() for word_P in words_XP for part_P in word_P.contiguous().view(-1, 1).view(dtype).unbind(1)]
    for rows_KP, part_P in zip(out_KP.split(width), parts_P, strict=False):
        shift_K1 = _countdown(width - 1, width - len(rows_KP), dtype, out_KP.device)
        torch.bitwise_left_shift(part_P, shift_K1, out=rows_KP)
    return out_KP


def negative_signs(words_XP: Tensor, out_KP: Tensor) -> Tensor:
    """Whole numbers with nothing but the sign bit, set where a bit is 0 (see `with_signs`). Shape: [K, P]."""
    width = _integers(out_KP.dtype)[1]
    return _bits_at_the_top(~words_XP, out_KP).bitwise_and_(-(1 << (width - 1)))


def with_signs(values_KP: Tensor, negative_KP: Tensor, out_KP: Tensor) -> Tensor:
    """Values times 1 or -1, by their sign bits. Shape: [K, P]."""
    torch.bitwise_xor(values_KP.view(negative_KP.dtype), negative_KP, out=out_KP.view(negative_KP.dtype))
    return out_KP


def keep(values_KP: Tensor, words_XP: Tensor) -> Tensor:
    """In place 0 where a bit is 0. Shape: [K, P]."""
    width = _integers(values_KP.dtype)[1]
    mask_KP = _bits_at_the_top(words_XP, torch.empty_like(values_KP)).bitwise_right_shift_(width - 1)
    values_KP.view(mask_KP.dtype).bitwise_and_(mask_KP)
    return values_KP


def unpack(words_XP: Tensor, num_bits: int) -> Tensor:
    """Words int64 [X, P] as bits bool [K, P]."""
    num_pixels = words_XP.shape[1]
    bytes_XP8 = words_XP.contiguous().view(torch.uint8).view(len(words_XP), num_pixels, 8)  # little-endian everywhere
    bytes_LP = bytes_XP8.transpose(1, 2).contiguous().view(-1, 1, num_pixels)[: (num_bits + 7) // 8]
    masks_8 = constant((1, 2, 4, 8, 16, 32, 64, 128), words_XP.device, torch.uint8)
    return (bytes_LP & masks_8[:, None]).ne(0).reshape(-1, num_pixels)[:num_bits]


def to_planes(words_BXHW: Tensor, num_bits: int) -> Tensor:
    """Words of images as planes of 8 bits each, without the unused ones. Shape: uint8 [B, ceil(K / 8), H, W]."""
    batch, words, height, width = words_BXHW.shape
    bytes_BXHW8 = words_BXHW.contiguous().view(torch.uint8).view(batch, words, height, width, 8)
    return bytes_BXHW8.permute(0, 1, 4, 2, 3).reshape(batch, 8 * words, height, width)[:, : (num_bits + 7) // 8]


def from_planes(planes_BLHW: Tensor) -> Tensor:
    """The words that `to_planes` took apart. Shape: int64 [B, X, H, W]."""
    batch, planes, height, width = planes_BLHW.shape
    whole_BLHW = F.pad(planes_BLHW, (0, 0, 0, 0, 0, -planes % 8))
    bytes_BXHW8 = whole_BLHW.view(batch, -1, 8, height, width).permute(0, 1, 3, 4, 2).contiguous()
    return bytes_BXHW8.view(torch.int64).squeeze(-1)


def popcount(words: Tensor) -> Tensor:
    """Number of ones in each int64 word. Shape: as given."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def first_argmax(scores_NP: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score and its class, the lowest id among equals, the last where scores are NaN. Shapes: [P], int64 [P].

    Several passes that vectorise: 4 to 10 times faster on CPU than argmax over the first axis.
    """
    top_P = scores_NP.amax(0)
    rank_N1 = _countdown(len(scores_NP), 1, scores_NP.dtype, scores_NP.device)
    hit_NP = torch.eq(scores_NP, top_P, out=torch.empty_like(scores_NP))  # as floats: comparisons to bool do not vectorise
    first_P = len(scores_NP) - hit_NP.mul_(rank_N1).amax(0).long()
    return top_P, first_P.clamp_max(len(scores_NP) - 1)  # NaN equals nothing, and must not point outside the tables


def all_ones(num_bits: int, device: torch.device) -> Tensor:
    """A code of K ones. Shape: int64 [X, 1]."""
    return pack(torch.ones(num_bits, 1, device=device))


def reliable_words(surplus_KP: Tensor, scores_NP: Tensor, labels_P: Tensor, settled_P: Tensor, words_XN: Tensor,
                   max_candidates: int | None = None) -> Tensor:
    """Reliable bit mining: which bits of each pixel are taken from its class's codeword. Shape: packed, int64 [X, P].

    Classes join the candidates nearest first (ties: lowest id first); bits on which all candidates' codewords agree are
    shared; a pixel is settled when its mean confidence q over the shared bits exceeds the threshold (R = shared bits). R is
    0 where none is left, which at the latest is so with all classes (a codebook has no constant column), and where
    `max_candidates` classes did not settle the pixel (the authors' code: 8). `labels_P` are the nearest classes; with one
    candidate every bit is shared, so it settles most pixels at once: `settled_P`. Overwrites surplus and scores.

    What is kept of an open pixel is its surplus, q - threshold on shared bits and 0 elsewhere: its sum is above 0 where
    the mean exceeds the threshold, and once no bit of it is above 0, no later mean can exceed it.
    """
    limit = len(scores_NP) if max_candidates is None else min(max_candidates, len(scores_NP))
    ones_X1 = all_ones(len(surplus_KP), surplus_KP.device)
    found_XP = torch.where(settled_P, ones_X1, 0)
    pixel_U, closed_U = torch.arange(len(labels_P), device=labels_P.device), settled_P | (surplus_KP.amax(0) <= 0)
    surplus_KU, scores_NU, nearest_U = surplus_KP, scores_NP, labels_P
    first_XU, shared_XU = words_XN.index_select(1, nearest_U), ones_X1.expand(-1, len(pixel_U))
    for _ in range(2, limit + 1):
        open_V = (~closed_U).nonzero().squeeze(1)
        if len(open_V) == 0:
            break
        if len(open_V) < _WORTH_LEAVING * len(pixel_U):  # picking out those still open costs as much as half a round
            pixel_U, nearest_U, closed_U = pixel_U[open_V], nearest_U[open_V], closed_U[open_V]
            surplus_KU, scores_NU = surplus_KU.index_select(1, open_V), scores_NU.index_select(1, open_V)
            first_XU, shared_XU = first_XU.index_select(1, open_V), shared_XU.index_select(1, open_V)
        scores_NU.scatter_(0, nearest_U[None], -torch.inf)  # candidates already in leave the queue
        nearest_U = first_argmax(scores_NU)[1]
        shared_XU = shared_XU & ~(words_XN.index_select(1, nearest_U) ^ first_XU)
        settled_V = (keep(surplus_KU, shared_XU).sum(0) > 0).logical_and_(~closed_U).nonzero().squeeze(1)
        found_XP[:, pixel_U[settled_V]] = shared_XU.index_select(1, settled_V)
        closed_U |= surplus_KU.amax(0) <= 0
        closed_U[settled_V] = True
    return found_XP

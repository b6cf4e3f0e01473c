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
    return (bytes_LP & masks_8[:, None]).ne(0).view(-1, num_pixels)[:num_bits]


def popcount(words: Tensor) -> Tensor:
    """Number of ones in each int64 word. Shape: as given."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def reliable_bits(q_KP: Tensor, scores_NP: Tensor, codes_NK: Tensor, threshold: float,
                  max_candidates: int | None = None) -> Tensor:
    """Reliable bit mining over all pixels given. Shape: bool [K, P].

    Classes join the candidates nearest first (ties: lowest id first); bits on which all candidates' codewords agree are
    shared; a pixel is settled when its mean confidence q over the shared bits exceeds `threshold` (R = shared bits), or
    when none is left (R = 0). R is the shared bits too after the last class, and 0 when `max_candidates` classes, being
    fewer than all, did not settle the pixel (the authors' code: 8). Memory is a few [K, P] tensors.
    """
    num_classes = len(codes_NK)
    limit = num_classes if max_candidates is None else min(max_candidates, num_classes)
    order_PN = scores_NP.t().sort(dim=1, descending=True, stable=True).indices
    q_PK = q_KP.t().contiguous()
    found_PK = torch.zeros(q_PK.shape, dtype=torch.bool, device=q_PK.device)
    first_PK = codes_NK[order_PN[:, 0]]
    shared_PK = torch.ones_like(found_PK)
    pixel_P = torch.arange(len(q_PK), device=q_PK.device)  # those still open
    for n in range(limit):
        if n > 0:
            shared_PK &= codes_NK[order_PN[:, n]] == first_PK
        count_P = shared_PK.sum(1)
        confident_P = (q_PK * shared_PK).sum(1) > threshold * count_P
        if n == num_classes - 1:
            confident_P |= True
        found_PK[pixel_P[confident_P]] = shared_PK[confident_P]
        open_P = (~confident_P & (count_P > 0)).nonzero().squeeze(1)
        if len(open_P) == 0:
            break
        pixel_P, order_PN, q_PK = pixel_P[open_P], order_PN[open_P], q_PK[open_P]
        first_PK, shared_PK = first_PK[open_P], shared_PK[open_P]
    return found_PK.t()

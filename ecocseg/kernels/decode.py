"""Kernels from the decoder's logits straight to pseudo-labels at label size: class, packed bits, confidence, reliable share.

A program owns a tile of label pixels (see `tile`); nothing of label size but the results is written.

Bit mining keeps each pixel's probabilities in registers. Pixels whose nearest class passes by itself are settled first; for
the rest of a tile, the next class is taken again and again (a masked argmax over scores), the shared bits are narrowed as
packed words, and the surplus over the threshold is summed over them anew. A tile stops when none of its pixels is open:
most never begin, the others take as many rounds as their least sure pixel.

Shapes: P pixels of a tile, C cells of its window, K outputs, N classes, A a piece of K, D a piece of N.
"""

# Triton reads these functions by rules of its own
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from ecocseg.kernels.tile import (
    LOG2_E,
    SIZES,
    bits_of,
    exp2,
    first_best,
    packed,
    pixel_index,
    popcount,
    reciprocal,
    sigmoid,
    upsampled,
    window_weights,
    with_codewords,
)


@triton.jit
def tile_logits(logits, lower_y, part_y, lower_x, part_x, h, w, H, W, tiles_x, K, stride_b, stride_k, stride_y, stride_x,
                TILE: tl.constexpr, FLAT: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr, IDENTITY: tl.constexpr,
                K_FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """This program's pixels: their logits, their place in the image, whether they are there; and its interpolation matrix."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index_P, inside_P = pixel_index(tile, H, W, tiles_x, TILE, FLAT, IDENTITY)
    if IDENTITY:
        weight_PC, offset_C, cell_C = index_P, index_P, inside_P  # unused
    else:
        weight_PC, offset_C, cell_C = window_weights(tile, tiles_x, lower_y, part_y, lower_x, part_x, h, w, H, W,
                                                     stride_y, stride_x, TILE, CY, CX)
    pieces = upsampled(logits + image * stride_b, weight_PC, offset_C, cell_C, index_P, inside_P, K, stride_k, stride_x,
                       IDENTITY, K_FAST, SIZE, PIECES)
    return pieces, index_P, inside_P, weight_PC


@triton.jit
def class_scores(pieces, signs, zeros, N, P: tl.constexpr, SIZE: tl.constexpr,
                 PIECES: tl.constexpr, CLASS_SIZE: tl.constexpr, CLASS_PIECES: tl.constexpr):
    """K - d_n of bit probabilities, minus infinity beyond the last class. Shape: a tuple of [P, D]."""
    products = with_codewords(pieces, signs, P, SIZE, PIECES, CLASS_SIZE, CLASS_PIECES)
    scores = ()
    for j in tl.static_range(CLASS_PIECES):
        n_D = j * CLASS_SIZE + tl.arange(0, CLASS_SIZE)
        zeros_D = tl.load(zeros + n_D, mask=n_D < N, other=0.0)
        scores = scores + (tl.where((n_D < N)[None, :], products[j] + zeros_D[None, :], float("-inf")),)
    return scores


@triton.jit
def mined(surplus, scores, place_P, open_P, mask0_P, mask1_P, codes, N, limit, WORDS: tl.constexpr, SIZE: tl.constexpr,
          PIECES: tl.constexpr, CLASS_SIZE: tl.constexpr, CLASS_PIECES: tl.constexpr):
    """Reliable bits of the pixels still open, the others' as they are. Shapes: packed, int64 [P], twice."""
    first0_P = tl.load(codes + place_P)
    shared0_P = tl.full(first0_P.shape, -1, tl.int64)
    first1_P, shared1_P = first0_P, shared0_P
    if WORDS == 2:
        first1_P = tl.load(codes + N + place_P)
    taken = 1
    going = (tl.max(open_P.to(tl.int32), 0) > 0) & (taken < limit)
    while going:
        left = ()
        for j in tl.static_range(CLASS_PIECES):
            n_D = j * CLASS_SIZE + tl.arange(0, CLASS_SIZE)
            left = left + (tl.where(n_D[None, :] == place_P[:, None], float("-inf"), scores[j]),)
        scores = left
        best_P, place_P = first_best(scores, CLASS_SIZE, CLASS_PIECES)
        place_P = tl.minimum(place_P, N - 1)  # NaN scores must not point outside the tables
        shared0_P = shared0_P & ~(tl.load(codes + place_P) ^ first0_P)
        if WORDS == 2:
            shared1_P = shared1_P & ~(tl.load(codes + N + place_P) ^ first1_P)
        sum_P = tl.zeros(best_P.shape, tl.float32)
        most_P = tl.zeros(best_P.shape, tl.float32)
        for i in tl.static_range(PIECES):
            part_PA = tl.where(bits_of(shared0_P, shared1_P, i, SIZE), surplus[i], 0.0)
            sum_P += tl.sum(part_PA, 1)
            most_P = tl.maximum(most_P, tl.max(part_PA, 1))
        settled_P = open_P & (sum_P > 0)
        mask0_P = tl.where(settled_P, shared0_P, mask0_P)
        mask1_P = tl.where(settled_P, shared1_P, mask1_P)
        open_P = open_P & (sum_P <= 0) & (most_P > 0)
        taken += 1
        going = (tl.max(open_P.to(tl.int32), 0) > 0) & (taken < limit)
    return mask0_P, mask1_P


@triton.jit(do_not_specialize=SIZES)
def ecoc_pseudo_label_kernel(
        logits, lower_y, part_y, lower_x, part_x, signs, zeros, codes, labels, words, confidence, reliable, counts,
        h, w, H, W, tiles_x, K, N, stride_b, stride_k, stride_y, stride_x, threshold, limit,
        TILE: tl.constexpr, FLAT: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr, IDENTITY: tl.constexpr,
        K_FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, CLASS_SIZE: tl.constexpr,
        CLASS_PIECES: tl.constexpr, WORDS: tl.constexpr, FORM: tl.constexpr, FAST: tl.constexpr):
    """FORM: "hybrid", "code" or "bit". `counts` gets each program's corrected and differing bits."""
    P: tl.constexpr = FLAT if IDENTITY else TILE * TILE
    pieces, index_P, inside_P, _ = tile_logits(logits, lower_y, part_y, lower_x, part_x, h, w, H, W, tiles_x, K, stride_b,
                                               stride_k, stride_y, stride_x, TILE, FLAT, CY, CX, IDENTITY, K_FAST, SIZE,
                                               PIECES)
    probabilities, surplus = (), ()
    own0_P = tl.zeros([P], tl.int64)
    own1_P = tl.zeros([P], tl.int64)
    sum_P = tl.zeros([P], tl.float32)
    most_P = tl.zeros([P], tl.float32)
    for i in tl.static_range(PIECES):
        live_A = i * SIZE + tl.arange(0, SIZE) < K
        p_PA = sigmoid(pieces[i], FAST)
        q_PA = tl.where(live_A[None, :], tl.abs(p_PA - 0.5) + 0.5, 0.0)
        sum_P += tl.sum(q_PA, 1)
        most_P = tl.maximum(most_P, tl.max(q_PA, 1))
        ones_P = packed((pieces[i] >= 0) & live_A[None, :], i, SIZE)
        if i * SIZE < 64:
            own0_P |= ones_P
        else:
            own1_P |= ones_P
        probabilities = probabilities + (p_PA,)
        surplus = surplus + (tl.where(live_A[None, :], q_PA - threshold, 0.0),)
    scores = class_scores(probabilities, signs, zeros, N, P, SIZE, PIECES, CLASS_SIZE, CLASS_PIECES)
    _, place_P = first_best(scores, CLASS_SIZE, CLASS_PIECES)
    place_P = tl.minimum(place_P, N - 1)
    mean_P = sum_P / K

    settled_P = inside_P if FORM == "code" else (inside_P & (mean_P > threshold))
    mask0_P = tl.where(settled_P, -1, tl.zeros([P], tl.int64))
    if FORM == "bit":
        mask0_P = tl.zeros([P], tl.int64)
    mask1_P = mask0_P
    if FORM == "hybrid":
        open_P = inside_P & (mean_P <= threshold) & (most_P > threshold)
        mask0_P, mask1_P = mined(surplus, scores, place_P, open_P, mask0_P, mask1_P, codes, N, limit, WORDS, SIZE, PIECES,
                                 CLASS_SIZE, CLASS_PIECES)

    first = tl.program_id(1).to(tl.int64) * H * W
    at_P = first + index_P
    tl.store(labels + at_P, place_P.to(tl.int64), mask=inside_P)
    tl.store(confidence + at_P, mean_P, mask=inside_P)
    word_P = words + first * WORDS + index_P
    differ_P = tl.load(codes + place_P) ^ own0_P
    mask0_P &= _ones(K)
    tl.store(word_P, own0_P ^ (differ_P & mask0_P), mask=inside_P)
    corrected_P, differing_P, shared_P = popcount(differ_P & mask0_P), popcount(differ_P), popcount(mask0_P)
    if WORDS == 2:
        differ_P = tl.load(codes + N + place_P) ^ own1_P
        mask1_P &= _ones(K - 64)
        tl.store(word_P + H * W, own1_P ^ (differ_P & mask1_P), mask=inside_P)
        corrected_P += popcount(differ_P & mask1_P)
        differing_P += popcount(differ_P)
        shared_P += popcount(mask1_P)
    tl.store(reliable + at_P, shared_P.to(tl.float32) / K, mask=inside_P)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + 2 * program, tl.sum(corrected_P, 0))
    tl.store(counts + 2 * program + 1, tl.sum(tl.where(inside_P, differing_P, 0), 0))


@triton.jit
def _ones(number):
    """A word whose lowest `number` bits are 1."""
    return tl.where(number >= 64, tl.full([1], -1, tl.int64), (tl.full([1], 1, tl.int64) << tl.minimum(number, 63)) - 1)


@triton.jit
def one_hot_summary(pieces, K, FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """Largest logit of each pixel times log2(e), its class, and the sum of exp(z - largest); with it each exp(z - largest), 0
    beyond the last output. Shapes: [P], int32 [P], [P], a tuple of [P, A]."""
    known = ()  # in units of log2
    for i in tl.static_range(PIECES):
        live_A = i * SIZE + tl.arange(0, SIZE) < K
        known = known + (tl.where(live_A[None, :], pieces[i] * LOG2_E, float("-inf")),)
    best_P, place_P = first_best(known, SIZE, PIECES)
    sum_P = tl.zeros(best_P.shape, tl.float32)
    powers = ()
    for i in tl.static_range(PIECES):
        power_PA = exp2(known[i] - best_P[:, None], FAST)
        sum_P += tl.sum(power_PA, 1)
        powers = powers + (power_PA,)
    return best_P, tl.minimum(place_P, K - 1), sum_P, powers


@triton.jit(do_not_specialize=SIZES)
def one_hot_pseudo_label_kernel(
        logits, lower_y, part_y, lower_x, part_x, labels, confidence, h, w, H, W, tiles_x, K, stride_b, stride_k, stride_y,
        stride_x, TILE: tl.constexpr, FLAT: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr, IDENTITY: tl.constexpr,
        K_FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, FAST: tl.constexpr):
    pieces, index_P, inside_P, _ = tile_logits(logits, lower_y, part_y, lower_x, part_x, h, w, H, W, tiles_x, K, stride_b,
                                               stride_k, stride_y, stride_x, TILE, FLAT, CY, CX, IDENTITY, K_FAST, SIZE,
                                               PIECES)
    _, place_P, sum_P, _ = one_hot_summary(pieces, K, FAST, SIZE, PIECES)
    at_P = tl.program_id(1).to(tl.int64) * H * W + index_P
    tl.store(labels + at_P, place_P.to(tl.int64), mask=inside_P)
    tl.store(confidence + at_P, reciprocal(sum_P, FAST), mask=inside_P)

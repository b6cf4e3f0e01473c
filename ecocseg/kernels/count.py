"""Kernels of evaluation: from the decoder's logits and the true labels to counts; nothing of label size is written.

Counts are whole numbers, so their order does not matter. A tile has few different pairs of true and predicted class: each
is counted in the tile and added once to the table of all. Confidences are binned per tile; a program writes its own bins.

Shapes: P pixels of a tile, C cells of its window, K outputs, N classes, A a piece of K.
"""

# Triton reads these functions by rules of its own
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from ecocseg.kernels.decode import class_scores, one_hot_summary, tile_logits
from ecocseg.kernels.tile import SIZES, bits_of, first_best, sigmoid

BINS = tl.constexpr(15)  # as in evaluate.py
UNIT, UNITS_OF_BIN = tl.constexpr(15360), tl.constexpr(1024)
# a value in a bin as one number: its confidence in units below, then 1 if it is right, then 1 (64 pixels of 128 bits are 2^13
# values of up to 2^14 units)
RIGHT_BIT, COUNT_BIT, ONE_VALUE = tl.constexpr(28), tl.constexpr(44), tl.constexpr(1 << 44)


@triton.jit
def true_labels(labels, index_P, inside_P, H, W, N):
    """Label of each pixel, 0 where there is none, and whether there is one. Shapes: int32 [P], bool [P]."""
    at_P = tl.program_id(1).to(tl.int64) * H * W + index_P
    label_P = tl.load(labels + at_P, mask=inside_P, other=255).to(tl.int32)
    known_P = (label_P != 255) & (label_P >= 0) & (label_P < N)
    return tl.where(known_P, label_P, 0), known_P


@triton.jit
def add_pairs(confusion, label_P, place_P, left_P, N):
    """Count each pair of true and predicted class of the tile: the lowest one left, again and again."""
    pair_P = label_P * N + place_P
    while tl.max(left_P.to(tl.int32), 0) > 0:
        pair = tl.min(tl.where(left_P, pair_P, 1 << 30), 0)
        same_P = left_P & (pair_P == pair)
        tl.atomic_add(confusion + pair, tl.sum(same_P.to(tl.int64), 0), sem="relaxed")
        left_P = left_P & (pair_P != pair)


@triton.jit
def binned(confidence, right, known):
    """Bin of each value, and the value as one number. Shapes: int32, int64, as given."""
    confidence = tl.where(confidence == confidence, confidence, 0.0)  # NaN
    level = ((confidence * UNIT + 12582912.0) - 12582912.0).to(tl.int32)  # to the nearest, halves to even
    value = level.to(tl.int64) + (right.to(tl.int64) << RIGHT_BIT) + ONE_VALUE
    return tl.maximum(level - 1, 0) // UNITS_OF_BIN, tl.where(known, value, 0)


@triton.jit
def put_bin(bins, bin, total):
    """Store a bin's number of values, of right ones, and the sum of confidences."""
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    at = bins + (program * BINS + bin) * 3
    tl.store(at, (total >> COUNT_BIT).to(tl.int32))
    tl.store(at + 1, ((total >> RIGHT_BIT) & 0xFFFF).to(tl.int32))
    tl.store(at + 2, (total & 0xFFFFFFF).to(tl.int32))


@triton.jit(do_not_specialize=SIZES)
def ecoc_count_kernel(
        logits, lower_y, part_y, lower_x, part_x, signs, zeros, codes, labels, confusion, bins,
        h, w, H, W, tiles_x, K, N, stride_b, stride_k, stride_y, stride_x,
        TILE: tl.constexpr, FLAT: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr, IDENTITY: tl.constexpr,
        K_FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, CLASS_SIZE: tl.constexpr,
        CLASS_PIECES: tl.constexpr, WORDS: tl.constexpr, FAST: tl.constexpr):
    P: tl.constexpr = FLAT if IDENTITY else TILE * TILE
    pieces, index_P, inside_P, _ = tile_logits(logits, lower_y, part_y, lower_x, part_x, h, w, H, W, tiles_x, K, stride_b,
                                               stride_k, stride_y, stride_x, TILE, FLAT, CY, CX, IDENTITY, K_FAST, SIZE,
                                               PIECES)
    label_P, known_P = true_labels(labels, index_P, inside_P, H, W, N)
    code0_P = tl.load(codes + label_P)
    code1_P = code0_P
    if WORDS == 2:
        code1_P = tl.load(codes + N + label_P)
    probabilities, places, values = (), (), ()
    for i in tl.static_range(PIECES):
        p_PA = sigmoid(pieces[i], FAST)
        right_PA = (p_PA >= 0.5) == bits_of(code0_P, code1_P, i, SIZE)
        live_A = i * SIZE + tl.arange(0, SIZE) < K
        place_PA, value_PA = binned(tl.maximum(p_PA, 1.0 - p_PA), right_PA, known_P[:, None] & live_A[None, :])
        probabilities, places, values = probabilities + (p_PA,), places + (place_PA,), values + (value_PA,)
    scores = class_scores(probabilities, signs, zeros, N, P, SIZE, PIECES, CLASS_SIZE, CLASS_PIECES)
    _, place_P = first_best(scores, CLASS_SIZE, CLASS_PIECES)
    add_pairs(confusion, label_P, tl.minimum(place_P, N - 1), known_P, N)
    for bin in range(0, 15):
        total_PA = tl.zeros([P, SIZE], tl.int64)
        for i in tl.static_range(PIECES):
            total_PA += tl.where(places[i] == bin, values[i], 0)
        put_bin(bins, bin, tl.sum(tl.sum(total_PA, 1), 0))


@triton.jit(do_not_specialize=SIZES)
def one_hot_count_kernel(
        logits, lower_y, part_y, lower_x, part_x, labels, confusion, bins, h, w, H, W, tiles_x, K, stride_b, stride_k,
        stride_y, stride_x, TILE: tl.constexpr, FLAT: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
        IDENTITY: tl.constexpr, K_FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, FAST: tl.constexpr):
    pieces, index_P, inside_P, _ = tile_logits(logits, lower_y, part_y, lower_x, part_x, h, w, H, W, tiles_x, K, stride_b,
                                               stride_k, stride_y, stride_x, TILE, FLAT, CY, CX, IDENTITY, K_FAST, SIZE,
                                               PIECES)
    label_P, known_P = true_labels(labels, index_P, inside_P, H, W, K)
    _, place_P, sum_P, _ = one_hot_summary(pieces, K, FAST, SIZE, PIECES)
    add_pairs(confusion, label_P, place_P, known_P, K)
    bin_P, value_P = binned(1.0 / sum_P, place_P == label_P, known_P)
    for bin in range(0, 15):
        put_bin(bins, bin, tl.sum(tl.where(bin_P == bin, value_P, 0), 0))

"""What the kernels share: the pixels of a tile, upsampling as a product of matrices, class scores, packed bits.

A tile of P = 64 pixels is the rows of every matrix here and outputs or classes are the columns, in pieces of 16, 32 or 64
held in registers as a tuple, so that 40 bits take 48 columns and not 64. As in attention kernels, the result [P, 16] of one
product is then the left operand of the next without going through shared memory. Tensor cores multiply TF32 numbers of 11
bits and sum in float32: of a product with codewords (+1 and -1, exact) the other operand is split in two, which keeps 22
bits, and interpolation uses Triton's tf32x3, which splits both. What is left is bound by instructions: exp, log and 1/x are
one each (their hardware approximations, good to 1 or 2 units of the last place), signs are flipped by xor.

Shapes: P pixels of a tile, C cells of its window, K outputs, N classes, A a piece of K, D a piece of N.
"""

# Triton reads these functions by rules of its own
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

SIZES = ["h", "w", "H", "W", "tiles", "tiles_x", "K", "N", "limit", "most_y", "most_x"]
"""Numbers of which 1 is no case of its own: else Triton compiles anew for an image or window of one row."""


@triton.jit
def pixel_index(tile, H, W, tiles_x, TILE: tl.constexpr, FLAT: tl.constexpr, IDENTITY: tl.constexpr):
    """Place of each pixel in its image, and whether there is such a pixel. Shapes: int32 [P], bool [P]."""
    if IDENTITY:
        index_P = tile * FLAT + tl.arange(0, FLAT)
        return index_P, index_P < H * W
    else:
        p = tl.arange(0, TILE * TILE)
        y_P = (tile // tiles_x) * TILE + p // TILE
        x_P = (tile % tiles_x) * TILE + p % TILE
        return y_P * W + x_P, (y_P < H) & (x_P < W)


@triton.jit
def axis_weights(lower, part, start, size, cell_C, source, offset_P):
    """Weight of each cell of a window in each pixel along one axis, and the cells' places. Shapes: [P, C], int32 [C]."""
    base = tl.load(lower + start)
    place_P = tl.minimum(start + offset_P, size - 1)
    low_P = tl.load(lower + place_P)
    part_P = tl.load(part + place_P)
    high_P = tl.minimum(low_P + 1, source - 1)
    place_C = base + cell_C
    weight_PC = tl.where(place_C[None, :] == low_P[:, None], 1.0 - part_P[:, None], 0.0)
    weight_PC += tl.where(place_C[None, :] == high_P[:, None], part_P[:, None], 0.0)
    return weight_PC, place_C


@triton.jit
def window_weights(tile, tiles_x, lower_y, part_y, lower_x, part_x, h, w, H, W, stride_y, stride_x,
                   TILE: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr):
    """Interpolation matrix of a tile; offset of each cell, and whether it is in the image. Shapes: [P, C], int64 [C], [C]."""
    p = tl.arange(0, TILE * TILE)
    c = tl.arange(0, CY * CX)
    rows_PC, y_C = axis_weights(lower_y, part_y, (tile // tiles_x) * TILE, H, c // CX, h, p // TILE)
    columns_PC, x_C = axis_weights(lower_x, part_x, (tile % tiles_x) * TILE, W, c % CX, w, p % TILE)
    offset_C = y_C.to(tl.int64) * stride_y + x_C.to(tl.int64) * stride_x
    return rows_PC * columns_PC, offset_C, (y_C < h) & (x_C < w)


@triton.jit
def upsampled(logits, weight_PC, offset_C, cell_C, index_P, inside_P, K, stride_k, stride_x,
              IDENTITY: tl.constexpr, K_FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """Logits of the tile's pixels, float32, 0 beyond the last output. Shape: a tuple of [P, A]."""
    pieces = ()
    for i in tl.static_range(PIECES):
        k_A = i * SIZE + tl.arange(0, SIZE)
        offset_A = k_A.to(tl.int64) * stride_k
        if IDENTITY:
            at_PA = logits + index_P.to(tl.int64)[:, None] * stride_x + offset_A[None, :]
            z_PA = tl.load(at_PA, mask=inside_P[:, None] & (k_A < K)[None, :], other=0.0).to(tl.float32)
        else:
            if K_FAST:  # channels_last: neighbours in memory are outputs of one cell
                cells_CA = tl.load(logits + offset_C[:, None] + offset_A[None, :],
                                   mask=cell_C[:, None] & (k_A < K)[None, :], other=0.0)
            else:
                cells_CA = tl.trans(tl.load(logits + offset_A[:, None] + offset_C[None, :],
                                            mask=(k_A < K)[:, None] & cell_C[None, :], other=0.0))
            z_PA = tl.dot(weight_PC, cells_CA.to(tl.float32), input_precision="tf32x3")
        pieces = pieces + (z_PA,)
    return pieces


@triton.jit
def sign_dot(left, signs, sum):
    """sum + left @ signs, for signs of +1, -1 and 0, on tensor cores: products of two parts of `left` of 11 and 13 bits."""
    high = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    sum = tl.dot(left - high, signs, sum, input_precision="tf32")
    return tl.dot(high, signs, sum, input_precision="tf32")


@triton.jit
def with_codewords(pieces, signs, P: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr,
                   CLASS_SIZE: tl.constexpr, CLASS_PIECES: tl.constexpr):
    """Product of each pixel's outputs with each class's codeword of signs. Shape: a tuple of [P, D]."""
    products = ()
    for j in tl.static_range(CLASS_PIECES):
        n_D = j * CLASS_SIZE + tl.arange(0, CLASS_SIZE)
        sum_PD = tl.zeros([P, CLASS_SIZE], tl.float32)
        for i in tl.static_range(PIECES):
            k_A = i * SIZE + tl.arange(0, SIZE)
            signs_AD = tl.load(signs + n_D[None, :] * (SIZE * PIECES) + k_A[:, None])
            sum_PD = sign_dot(pieces[i], signs_AD, sum_PD)
        products = products + (sum_PD,)
    return products


@triton.jit
def first_best(scores, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """Largest score of each pixel and its place, the lowest among equals. Shapes: [P], int32 [P]."""
    best_P, place_P = tl.max(scores[0], 1, return_indices=True, return_indices_tie_break_left=True)
    for j in tl.static_range(1, PIECES):
        other_P, at_P = tl.max(scores[j], 1, return_indices=True, return_indices_tie_break_left=True)
        better_P = other_P > best_P
        best_P = tl.where(better_P, other_P, best_P)
        place_P = tl.where(better_P, at_P + j * SIZE, place_P)
    return best_P, place_P


@triton.jit
def bits_of(first_P, second_P, piece: tl.constexpr, SIZE: tl.constexpr):
    """Bits of a piece of the outputs, from words of 64. Shape: bool [P, A]."""
    return ((_part(first_P, second_P, piece, SIZE)[:, None] >> tl.arange(0, SIZE)[None, :]) & 1) != 0


@triton.jit
def sign_masks(first_P, second_P, piece: tl.constexpr, SIZE: tl.constexpr):
    """The sign bit alone where a bit is 0, else nothing: xor with it multiplies a float by +1 or -1. Shape: int32 [P, A]."""
    return (~_part(first_P, second_P, piece, SIZE)[:, None] << (31 - tl.arange(0, SIZE))[None, :]) & -2147483648


@triton.jit
def flipped(values, masks):
    """Values with the sign that `sign_masks` gives them."""
    return (values.to(tl.int32, bitcast=True) ^ masks).to(tl.float32, bitcast=True)


@triton.jit
def _part(first_P, second_P, piece: tl.constexpr, SIZE: tl.constexpr):
    """Bits of a piece in the low bits of 32: shifts of 64 are several instructions each. Shape: int32 [P]."""
    if piece * SIZE < 64:
        return (first_P >> (piece * SIZE)).to(tl.int32)
    else:
        return (second_P >> (piece * SIZE - 64)).to(tl.int32)


@triton.jit
def packed(bits_PA, piece: tl.constexpr, SIZE: tl.constexpr):
    """Bits of a piece in their places of a word of 64. Shape: int64 [P]."""
    part_P = tl.sum(bits_PA.to(tl.int32) << tl.arange(0, SIZE)[None, :], 1)
    return part_P.to(tl.int64) << (piece * SIZE) % 64


@triton.jit
def popcount(words):
    """Number of ones in each int64 word."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    words += words >> 8
    words += words >> 16
    words += words >> 32
    return (words & 127).to(tl.int32)



@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2 to the power x, by the one instruction there is for it; 0 and infinity at the ends."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Logarithm of a number that is not tiny, by one instruction."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x, to the last bit but one, by one instruction; 0 for infinity."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    return reciprocal(1.0 + exp2(x * -LOG2_E, FAST), FAST)

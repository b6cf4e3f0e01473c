"""Kernels of the losses, forward and backward at once: from the decoder's logits and the target to sums and a gradient.

A program makes its tile's logits, their loss and its gradient in closed form (as losses.py has it) and folds the gradient
back onto its window of cells with the transposed interpolation matrix. Each tile writes its own window; `gather_kernel` then
sums the windows of the few tiles (4 at stride 4) that share a cell, in the order of tiles. No atomic operation is used: the
same input gives the same bits. What is held is these windows, float32, at stride 4 the size of 4 gradients of the logits or
a quarter of the upsampled logits; at stride 1 nothing is.

Shapes: P pixels of a tile, C cells of its window, K outputs, N classes, A a piece of K, D a piece of N.
"""

# Triton reads these functions by rules of its own
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from ecocseg.kernels.decode import one_hot_summary, tile_logits
from ecocseg.kernels.tile import LN_2, LOG2_E, SIZES, exp2, flipped, log2, sigmoid, sign_dot, sign_masks, with_codewords


@triton.jit
def pixel_weights(labels, weight, divisor, index_P, inside_P, H, W, label_b, label_y, label_x, weight_b, weight_y, weight_x):
    """Label of each pixel, and its weight over the divisor, 0 where it is ignored. Shapes: int64 [P], [P]."""
    image = tl.program_id(1).to(tl.int64)
    y_P, x_P = (index_P // W).to(tl.int64), (index_P % W).to(tl.int64)
    label_P = tl.load(labels + image * label_b + y_P * label_y + x_P * label_x, mask=inside_P, other=255)
    weight_P = tl.load(weight + image * weight_b + y_P * weight_y + x_P * weight_x, mask=inside_P, other=0.0)
    return label_P, tl.where(label_P != 255, weight_P.to(tl.float32) / tl.load(divisor), 0.0)


@triton.jit
def put_gradient(gradient, grad_PA, weight_PC, index_P, inside_P, K, piece: tl.constexpr, grad_b, grad_k, grad_x,
                 C: tl.constexpr, IDENTITY: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """Write a piece of a tile's gradient: as it is at stride 1, else folded onto the tile's window of cells."""
    k_A = piece * SIZE + tl.arange(0, SIZE)
    if IDENTITY:
        at_PA = (gradient + tl.program_id(1).to(tl.int64) * grad_b + index_P.to(tl.int64)[:, None] * grad_x
                 + k_A.to(tl.int64)[None, :] * grad_k)
        tl.store(at_PA, grad_PA.to(gradient.dtype.element_ty), mask=inside_P[:, None] & (k_A < K)[None, :])
    else:
        # each of 4 warps folds its own 16 pixels: one product for all of them would be done by every warp again
        G: tl.constexpr = grad_PA.shape[0] // 4
        weight_4CG = tl.permute(tl.reshape(weight_PC, [4, G, C]), (0, 2, 1))
        window_CA = tl.sum(tl.dot(weight_4CG, tl.reshape(grad_PA, [4, G, SIZE]), input_precision="tf32x3"), 0)
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        at_CA = (program * C + tl.arange(0, C))[:, None] * (SIZE * PIECES) + k_A[None, :]
        tl.store(gradient + at_CA, window_CA)


@triton.jit(do_not_specialize=SIZES)
def ecoc_loss_kernel(
        logits, lower_y, part_y, lower_x, part_x, signs, labels, words, weight, divisor, gradient, terms,
        h, w, H, W, tiles_x, K, N, stride_b, stride_k, stride_y, stride_x, label_b, label_y, label_x, word_b, word_w, word_y,
        word_x, weight_b, weight_y, weight_x, grad_b, grad_k, grad_x, bce, distance, contrast, temperature, root_k, eps,
        TILE: tl.constexpr, FLAT: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr, IDENTITY: tl.constexpr,
        K_FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, CLASS_SIZE: tl.constexpr,
        CLASS_PIECES: tl.constexpr, WORDS: tl.constexpr, BCE: tl.constexpr, DISTANCE: tl.constexpr, CONTRAST: tl.constexpr,
        STAND_IN: tl.constexpr, GRADIENT: tl.constexpr, FAST: tl.constexpr):
    """BCE, DISTANCE and CONTRAST say which terms there are; STAND_IN: the target stands in for its class's codeword."""
    P: tl.constexpr = FLAT if IDENTITY else TILE * TILE
    pieces, index_P, inside_P, weight_PC = tile_logits(
        logits, lower_y, part_y, lower_x, part_x, h, w, H, W, tiles_x, K, stride_b, stride_k, stride_y, stride_x, TILE, FLAT,
        CY, CX, IDENTITY, K_FAST, SIZE, PIECES)
    label_P, share_P = pixel_weights(labels, weight, divisor, index_P, inside_P, H, W, label_b, label_y, label_x, weight_b,
                                     weight_y, weight_x)
    word_P = (words + tl.program_id(1).to(tl.int64) * word_b + (index_P // W).to(tl.int64) * word_y
              + (index_P % W).to(tl.int64) * word_x)
    word0_P = tl.load(word_P, mask=inside_P, other=0)
    word1_P = word0_P
    if WORDS == 2:
        word1_P = tl.load(word_P + word_w, mask=inside_P, other=0)

    square_P = tl.zeros([P], tl.float32)
    product_P = tl.zeros([P], tl.float32)
    agreements = ()  # of a logit with its bit: times +1 or -1
    for i in tl.static_range(PIECES):
        square_P += tl.sum(pieces[i] * pieces[i], 1)
        agree_PA = flipped(pieces[i], sign_masks(word0_P, word1_P, i, SIZE))
        product_P += tl.sum(agree_PA, 1)
        agreements = agreements + (agree_PA,)
    norm_P = tl.sqrt(square_P)
    inverse_P = 1.0 / tl.maximum(norm_P, eps)
    scale_P = inverse_P / root_k
    target_P = product_P * scale_P
    slope_P = tl.zeros([P], tl.float32)  # of the loss with respect to the target's cosine
    radial_P = tl.zeros([P], tl.float32)
    distance_sum = 0.0
    contrast_sum = 0.0
    if DISTANCE:
        distance_sum = tl.sum((1.0 - target_P) * share_P, 0)
        slope_P -= distance
    slopes = ()
    if CONTRAST:
        log_P, slope_P, radial_P, slopes = contrast_of(
            pieces, signs, label_P, target_P, scale_P, slope_P, share_P, N, contrast, temperature, P, SIZE, PIECES,
            CLASS_SIZE, CLASS_PIECES, STAND_IN, GRADIENT, FAST)
        contrast_sum = tl.sum((log_P - target_P / temperature) * share_P, 0)
    radial_P = (radial_P + slope_P * target_P) * share_P * inverse_P * inverse_P
    radial_P = tl.where(norm_P > eps, radial_P, 0.0)
    along_P = slope_P * share_P * scale_P

    bce_P = tl.zeros([P], tl.float32)
    wrong_scale_P = share_P * (bce / K)
    for i in tl.static_range(PIECES):
        grad_PA = along_P[:, None] - agreements[i] * radial_P[:, None]  # times the bit's sign: see below
        if BCE:
            wrong_PA = sigmoid(-agreements[i], FAST)
            # log(1 + exp(-a)) = max(-a, 0) - log(|s - 1/2| + 1/2) with s = sigmoid(-a)
            log_PA = log2(tl.abs(wrong_PA - 0.5) + 0.5, FAST)
            bce_P -= tl.sum(log_PA * LN_2 + tl.minimum(agreements[i], 0.0), 1)
            grad_PA -= wrong_PA * wrong_scale_P[:, None]
        if GRADIENT:
            grad_PA = flipped(grad_PA, sign_masks(word0_P, word1_P, i, SIZE))
            if CONTRAST:
                k_A = i * SIZE + tl.arange(0, SIZE)
                for j in tl.static_range(CLASS_PIECES):
                    n_D = j * CLASS_SIZE + tl.arange(0, CLASS_SIZE)
                    signs_DA = tl.load(signs + n_D[:, None] * (SIZE * PIECES) + k_A[None, :])
                    grad_PA = sign_dot(slopes[j], signs_DA, grad_PA)
            put_gradient(gradient, grad_PA, weight_PC, index_P, inside_P, K, i, grad_b, grad_k, grad_x, CY * CX, IDENTITY,
                         SIZE, PIECES)
    # an output beyond the last has logit 0 and so log(1 + exp(0)) = log(2)
    bce_sum = tl.sum((bce_P - (SIZE * PIECES - K) * LN_2) * share_P, 0) / K if BCE else 0.0
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(terms + 4 * program, bce * bce_sum + distance * distance_sum + contrast * contrast_sum)
    tl.store(terms + 4 * program + 1, bce_sum)
    tl.store(terms + 4 * program + 2, distance_sum)
    tl.store(terms + 4 * program + 3, contrast_sum)


@triton.jit
def contrast_of(pieces, signs, label_P, target_P, scale_P, slope_P, share_P, N, contrast, temperature, P: tl.constexpr,
                SIZE: tl.constexpr, PIECES: tl.constexpr, CLASS_SIZE: tl.constexpr, CLASS_PIECES: tl.constexpr,
                STAND_IN: tl.constexpr, GRADIENT: tl.constexpr, FAST: tl.constexpr):
    """Log of the sum over classes of exp(cosine / temperature); the slope of the target's cosine; the sum of slope times
    cosine over classes; and each class's slope times the pixel's share and scale, a tuple of [P, D]."""
    products = with_codewords(pieces, signs, P, SIZE, PIECES, CLASS_SIZE, CLASS_PIECES)
    exponents = ()  # in units of log2
    unit_P = scale_P * (LOG2_E / temperature)
    for j in tl.static_range(CLASS_PIECES):
        n_D = j * CLASS_SIZE + tl.arange(0, CLASS_SIZE)
        exponent_PD = products[j] * unit_P[:, None]
        if STAND_IN:
            its_P = target_P * (LOG2_E / temperature)
            exponent_PD = tl.where(n_D[None, :] == label_P[:, None], its_P[:, None], exponent_PD)
        exponents = exponents + (tl.where((n_D < N)[None, :], exponent_PD, float("-inf")),)
    most_P = tl.max(exponents[0], 1)
    for j in tl.static_range(1, CLASS_PIECES):
        most_P = tl.maximum(most_P, tl.max(exponents[j], 1))
    sum_P = tl.zeros([P], tl.float32)
    powers = ()
    for j in tl.static_range(CLASS_PIECES):
        power_PD = exp2(exponents[j] - most_P[:, None], FAST)
        sum_P += tl.sum(power_PD, 1)
        powers = powers + (power_PD,)
    log_P = (most_P + log2(sum_P, FAST)) * LN_2
    slope_P -= contrast / temperature
    radial_P = tl.zeros([P], tl.float32)
    slopes = ()
    if GRADIENT:
        factor_P = contrast / temperature / sum_P
        for j in tl.static_range(CLASS_PIECES):
            power_PD = powers[j]
            if STAND_IN:
                its_PD = (j * CLASS_SIZE + tl.arange(0, CLASS_SIZE))[None, :] == label_P[:, None]
                slope_P += tl.sum(tl.where(its_PD, power_PD, 0.0), 1) * factor_P
                power_PD = tl.where(its_PD, 0.0, power_PD)
            radial_P += tl.sum(power_PD * products[j], 1)
            slopes = slopes + (power_PD * (factor_P * share_P * scale_P)[:, None],)
        radial_P *= factor_P * scale_P
    return log_P, slope_P, radial_P, slopes


@triton.jit(do_not_specialize=SIZES)
def cross_entropy_kernel(
        logits, lower_y, part_y, lower_x, part_x, labels, weight, divisor, gradient, terms,
        h, w, H, W, tiles_x, K, stride_b, stride_k, stride_y, stride_x, label_b, label_y, label_x, weight_b, weight_y,
        weight_x, grad_b, grad_k, grad_x,
        TILE: tl.constexpr, FLAT: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr, IDENTITY: tl.constexpr,
        K_FAST: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, GRADIENT: tl.constexpr, FAST: tl.constexpr):
    pieces, index_P, inside_P, weight_PC = tile_logits(
        logits, lower_y, part_y, lower_x, part_x, h, w, H, W, tiles_x, K, stride_b, stride_k, stride_y, stride_x, TILE, FLAT,
        CY, CX, IDENTITY, K_FAST, SIZE, PIECES)
    label_P, share_P = pixel_weights(labels, weight, divisor, index_P, inside_P, H, W, label_b, label_y, label_x, weight_b,
                                     weight_y, weight_x)
    best_P, _, sum_P, powers = one_hot_summary(pieces, K, FAST, SIZE, PIECES)
    share_of_sum_P = share_P / sum_P
    its_P = tl.zeros(best_P.shape, tl.float32)  # logit of the target's class
    for i in tl.static_range(PIECES):
        is_its_PA = (i * SIZE + tl.arange(0, SIZE))[None, :] == label_P[:, None]
        its_P += tl.sum(tl.where(is_its_PA, pieces[i], 0.0), 1)
        if GRADIENT:
            grad_PA = powers[i] * share_of_sum_P[:, None] - tl.where(is_its_PA, share_P[:, None], 0.0)
            put_gradient(gradient, grad_PA, weight_PC, index_P, inside_P, K, i, grad_b, grad_k, grad_x,
                         CY * CX, IDENTITY, SIZE, PIECES)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(terms + program, tl.sum(((best_P + log2(sum_P, FAST)) * LN_2 - its_P) * share_P, 0))


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(windows, gradient, lower_y, lower_x, first_y, count_y, first_x, count_x, h, w, tiles, tiles_x, K,
                  grad_b, grad_k, grad_y, grad_x, most_y, most_x, TILE: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
                  COLUMNS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Gradient of one row's stretch of cells, a piece of the outputs: the windows of the tiles that have a cell, summed.

    The order is by row and column of tiles, for every cell the same.
    """
    stretches = tl.cdiv(w, COLUMNS)
    y, x_c = tl.program_id(0) // stretches, (tl.program_id(0) % stretches) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(1).to(tl.int64)
    k_A = tl.program_id(2) * SIZE + tl.arange(0, SIZE)
    there_c = x_c < w
    top, rows = tl.load(first_y + y), tl.load(count_y + y)
    left_c = tl.load(first_x + x_c, mask=there_c, other=0)
    columns_c = tl.load(count_x + x_c, mask=there_c, other=0)
    sum_cA = tl.zeros([COLUMNS, SIZE], tl.float32)
    for i in range(0, most_y):
        if i < rows:
            row = y - tl.load(lower_y + (top + i) * TILE)
            for j in range(0, most_x):
                reads_c = j < columns_c
                tile_c = tl.where(reads_c, left_c + j, 0)
                column_c = x_c - tl.load(lower_x + tile_c * TILE)
                program_c = image * tiles + (top + i) * tiles_x + tile_c
                at_c = (program_c * (CY * CX) + row * CX + column_c) * PADDED
                sum_cA += tl.load(windows + at_c[:, None] + k_A[None, :], mask=reads_c[:, None] & (k_A < K)[None, :],
                                  other=0.0)
    at_cA = (gradient + image * grad_b + y.to(tl.int64) * grad_y + x_c.to(tl.int64)[:, None] * grad_x
             + k_A.to(tl.int64)[None, :] * grad_k)
    tl.store(at_cA, sum_cA.to(gradient.dtype.element_ty), mask=there_c[:, None] & (k_A < K)[None, :])

"""The random search of ECOCSeg (section on max-min codebooks): many random matrices, keep the best separated.

Draws are packed into 64-bit words and scored together; a draw is dropped as soon as the pairs seen so far prove that it
cannot beat the best one, which leaves the result of the full search unchanged.
"""

from __future__ import annotations

import warnings

import numpy as np

from ecocseg.codebook_search import random_words

CHUNK_BYTES = 32 << 20
MAX_WORD_PAIRS = 3_000_000_000  # about half a minute on one core
DISTINCT_BITS = 16  # up to this length rows can be drawn without repetition


def search(num_classes: int, length: int, seed: int, draws: int) -> np.ndarray:
    """Bits uint8 [N, K] with the largest d_min_r + d_min_c + (N - d_max_c) of `draws` valid random matrices."""
    rng = np.random.default_rng(seed)
    pairs = num_classes**2 // 2 * -(-length // 64) + length**2 // 2 * -(-num_classes // 64)
    affordable = max(1, MAX_WORD_PAIRS // pairs)
    if draws > affordable:
        warnings.warn(
            f"random codebook of {num_classes} x {length}: {affordable} draws made instead of {draws}, to end in "
            f"reasonable time; pass draws={affordable} or fewer to silence this",
            stacklevel=4,
        )
        draws = affordable
    best, best_score = None, 0
    chunk = max(1, min(4096, CHUNK_BYTES // (8 * num_classes * length)))
    while draws > 0:
        bits = draw(min(chunk, draws), num_classes, length, rng)
        draws -= len(bits)
        scores = score(bits, best_score)
        if len(scores) and scores.max() > best_score:
            best, best_score = bits[int(scores.argmax())], int(scores.max())
    if best is None:  # no draw was valid
        best = random_words(num_classes, length, rng) > 0
    return np.asarray(best, dtype=np.uint8)


def draw(count: int, num_classes: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Random bits uint8 [count, N, K], or fewer; no column is constant, and short rows are drawn without repetition."""
    if length <= DISTINCT_BITS and num_classes > 2 ** (length / 2):
        rows = np.stack([rng.permutation(2**length)[:num_classes] for _ in range(count)])
        bits = (rows[..., None] >> np.arange(length) & 1).astype(np.uint8)
        return bits[(bits.min(axis=1) != bits.max(axis=1)).all(axis=1)]
    bits = rng.integers(0, 2, size=(count, num_classes, length), dtype=np.uint8)
    while len(found := np.argwhere(bits.min(axis=1) == bits.max(axis=1))):
        bits[found[:, 0], :, found[:, 1]] = rng.integers(0, 2, size=(len(found), num_classes), dtype=np.uint8)
    return bits


def score(bits: np.ndarray, beat: int = 0) -> np.ndarray:
    """d_min_r + d_min_c + (N - d_max_c) of each matrix [count, N, K]; 0 if rows repeat or it cannot exceed `beat`."""
    count, num_classes, length = bits.shape
    rows, columns = pack(bits), pack(bits.transpose(0, 2, 1))
    alive = np.arange(count)
    row_least = np.full(count, length)
    column_least = np.full(count, num_classes // 2 if length == 1 else num_classes)
    column_most = np.full(count, num_classes // 2 if length == 1 else 0)

    def keep() -> None:
        nonlocal alive
        columns_at_most = np.minimum(num_classes, column_least + num_classes - column_most)[alive]
        alive = alive[(row_least[alive] > 0) & (row_least[alive] + columns_at_most > beat)]

    for offset in range(1, num_classes):
        between = distances_at(rows[alive], offset)
        row_least[alive] = np.minimum(row_least[alive], between.min(axis=1, initial=length))
        keep()
    for offset in range(1, length):
        between = distances_at(columns[alive], offset)
        column_least[alive] = np.minimum(column_least[alive], between.min(axis=1, initial=num_classes))
        column_most[alive] = np.maximum(column_most[alive], between.max(axis=1, initial=0))
        keep()
    out = np.zeros(count, dtype=np.int64)
    out[alive] = (row_least + column_least + num_classes - column_most)[alive]
    return out


def pack(bits: np.ndarray) -> np.ndarray:
    """Bits [count, rows, length] as uint64 words [count, rows, ceil(length / 64)]."""
    packed = np.packbits(bits, axis=2)
    words = -(-packed.shape[2] // 8)
    padded = np.zeros((*packed.shape[:2], 8 * words), dtype=np.uint8)
    padded[..., : packed.shape[2]] = packed
    return padded.view(np.uint64)


def distances_at(words: np.ndarray, offset: int) -> np.ndarray:
    """Hamming distances between the rows i and i + offset of each matrix, int64 [count, rows - offset]."""
    return np.bitwise_count(words[:, :-offset] ^ words[:, offset:]).sum(axis=2, dtype=np.int64)

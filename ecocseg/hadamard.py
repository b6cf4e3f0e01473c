"""Hadamard matrices of many orders and the linear codes used where they end: building blocks of `ecocseg.codebook`.

Orders come from Sylvester (powers of two), Paley I (q + 1, q = 3 mod 4), Paley II (2q + 2, q = 1 mod 4), with q a prime
or a prime's square or cube, and Kronecker products of those. Everything here is exact integer arithmetic, so that a
seed gives the same code on every machine.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np

MAX_ORDER = 1024
# Primitive polynomials over GF(2), bit i = coefficient of x^i (Lidl & Niederreiter, table D).
PRIMITIVE = {2: 0b111, 3: 0b1011, 4: 0b10011, 5: 0b100101, 6: 0b1000011, 7: 0b10001001, 8: 0b100011101, 9: 0b1000010001}


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p**e, p an odd prime and e <= 3, or None."""
    for exponent in (1, 2, 3):
        p = round(q ** (1 / exponent))
        if p > 2 and p**exponent == q and all(p % f for f in range(2, int(p**0.5) + 1)):
            return p, exponent
    return None


def _digits(values: np.ndarray, p: int, length: int) -> np.ndarray:
    return values[..., None] // p ** np.arange(length) % p


def _field_squares(p: int, e: int) -> np.ndarray:
    """Squares of all p**e elements; an element is an integer whose base-p digits are its polynomial's coefficients."""
    q = p**e
    coefficients = _digits(np.arange(q), p, e)
    square = np.zeros((q, 2 * e - 1), dtype=np.int64)
    for i in range(e):
        for j in range(e):
            square[:, i + j] += coefficients[:, i] * coefficients[:, j]
    if e > 1:
        # Up to degree 3 a polynomial without a root is irreducible.
        x = np.arange(p)
        powers = x[:, None] ** np.arange(e)
        tail = next(t for t in _digits(np.arange(q), p, e) if np.all((x**e + powers @ t) % p))
        for degree in range(2 * e - 2, e - 1, -1):
            square[:, degree - e : degree] -= square[:, degree : degree + 1] * tail
    return (square[:, :e] % p) @ p ** np.arange(e)


def _jacobsthal(p: int, e: int) -> np.ndarray:
    """Q[a, b] = quadratic character of a - b in GF(p**e), int8."""
    q = p**e
    character = np.full(q, -1, dtype=np.int8)
    character[_field_squares(p, e)] = 1
    character[0] = 0
    digits = _digits(np.arange(q), p, e)
    difference = ((digits[:, None, :] - digits[None, :, :]) % p) @ p ** np.arange(e)
    return character[difference]


def _paley_one(p: int, e: int) -> np.ndarray:
    core = _jacobsthal(p, e)
    order = len(core) + 1
    skew = np.zeros((order, order), dtype=np.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
    return skew + np.eye(order, dtype=np.int8)


def _paley_two(p: int, e: int) -> np.ndarray:
    core = _jacobsthal(p, e)
    size = len(core) + 1
    conference = np.zeros((size, size), dtype=np.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, core
    off = np.array([[1, 1], [1, -1]], dtype=np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(conference, off) + np.kron(np.eye(size, dtype=np.int8), diagonal)


@cache
def _recipe(order: int) -> tuple[str, int, int] | None:
    """How to build this order: (construction, two numbers), or None where these constructions give none."""
    if order in (1, 2):
        return ("base", order, 0)
    if order % 4 or order > MAX_ORDER:
        return None
    if (field := _prime_power(order - 1)) and (order - 1) % 4 == 3:
        return ("paley1", *field)
    if (field := _prime_power(order // 2 - 1)) and (order // 2 - 1) % 4 == 1:
        return ("paley2", *field)
    for factor in range(2, int(order**0.5) + 1):
        if order % factor == 0 and _recipe(factor) and _recipe(order // factor):
            return ("kronecker", factor, order // factor)
    return None


@lru_cache(maxsize=64)
def hadamard(order: int) -> np.ndarray | None:
    """Hadamard matrix [order, order] of +-1 (int8, read-only) with first row and column +1; None if no recipe."""
    recipe = _recipe(order)
    if recipe is None:
        return None
    kind, first, second = recipe
    if kind == "base":
        matrix = np.array([[1]] if order == 1 else [[1, 1], [1, -1]], dtype=np.int8)
    elif kind == "kronecker":
        left, right = hadamard(first), hadamard(second)
        assert left is not None and right is not None
        matrix = np.kron(left, right)
    else:
        matrix = (_paley_one if kind == "paley1" else _paley_two)(first, second)
    matrix = matrix * matrix[:1, :]
    matrix = matrix * matrix[:, :1]
    matrix.setflags(write=False)
    return matrix


def shuffled(order: int, rng: np.random.Generator) -> np.ndarray:
    """A random Hadamard matrix [order, order] of +-1, int8, of an order in `orders()`.

    Columns are permuted, and where half the order exists too, [[A, A], [B, -B]] of two random halves (or its transpose)
    is often taken: Sylvester matrices alone hold many triples of dependent columns.
    """
    if order >= 8 and _recipe(order // 2) and (_recipe(order) or ("",))[0] == "kronecker" and rng.random() < 0.75:
        upper, lower = shuffled(order // 2, rng), shuffled(order // 2, rng)
        matrix = np.block([[upper, upper], [lower, -lower]])
        matrix = matrix.T if rng.random() < 0.5 else matrix
    else:
        plain = hadamard(order)
        assert plain is not None
        matrix = plain
    signs = rng.choice(np.array([-1, 1], dtype=np.int8), size=(order, 1))
    return np.asarray(signs * matrix[rng.permutation(order)][:, rng.permutation(order)])


@lru_cache(maxsize=1)
def orders() -> tuple[int, ...]:
    """All orders up to MAX_ORDER that `hadamard` builds, ascending."""
    return tuple(n for n in (2, *range(4, MAX_ORDER + 1, 4)) if _recipe(n))


def walsh(values: np.ndarray) -> np.ndarray:
    """Walsh-Hadamard transform of an int64 vector of length 2**k: out[c] = sum_m values[m] * (-1)**popcount(m & c)."""
    out = values.astype(np.int64)
    step = 1
    while step < len(out):
        pairs = out.reshape(-1, 2, step)
        out = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1).reshape(-1)
        step *= 2
    return out


def _multiply(a: np.ndarray, b: np.ndarray, m: int) -> np.ndarray:
    """Product in GF(2**m), elements as integers."""
    out = np.zeros_like(a)
    for bit in range(m):
        out ^= np.where(b >> bit & 1, a << bit, 0)
    for bit in range(2 * m - 2, m - 1, -1):
        out ^= np.where(out >> bit & 1, PRIMITIVE[m] << (bit - m), 0)
    return out


def bch_columns(m: int, k: int) -> np.ndarray | None:
    """Generator columns (integers < 2**k) of a k-dimensional subcode of the extended dual BCH code of length 2**m.

    Its rows are 1, the bits of x, of x**(2**(m/2) + 1) (m even) and of x**3 at every x of GF(2**m), for instance
    [64, 10, 28] and [128, 15, 56] (MacWilliams & Sloane, ch. 9 and 15). None if these give fewer than k rows.
    """
    x = np.arange(2**m)
    powers = [x]
    if m % 2 == 0:
        norm = x
        for _ in range(m // 2):
            norm = _multiply(norm, norm, m)
        powers.append(_multiply(norm, x, m))
    powers.append(_multiply(_multiply(x, x, m), x, m))
    rows: list[np.ndarray] = []
    basis: list[int] = []
    for row in [np.ones(2**m, dtype=np.int64), *(power >> bit & 1 for power in powers for bit in range(m))]:
        packed = int("".join(map(str, row)), 2)
        for vector in basis:
            packed = min(packed, packed ^ vector)
        if packed:
            basis.append(packed)
            rows.append(row)
    if len(rows) < k:
        return None
    return np.asarray(sum(rows[i] << i for i in range(k)))


def linear_columns(k: int, length: int, rng: np.random.Generator, swaps: int = 200) -> list[np.ndarray]:
    """Generator columns (distinct nonzero integers < 2**k) of [length, k] codes of large least distance, best effort.

    Starts from nothing and from dual BCH codes near the length, adds (or takes away) the column that leaves fewest
    light words, then swaps columns. Needs length <= 2**k - 1.
    """
    starts: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for m in PRIMITIVE:
        if 2 ** (m - 1) < length < 2 ** (m + 1) and (columns := bch_columns(m, k)) is not None:
            starts.append(np.unique(columns[columns > 0]))
    return [_improve_columns(start, k, length, rng, swaps) for start in starts]


def _improve_columns(start: np.ndarray, k: int, length: int, rng: np.random.Generator, swaps: int) -> np.ndarray:
    chosen = np.zeros(2**k, dtype=np.int64)
    chosen[start] = 1
    best, best_rank = chosen, (-1, 0)
    for turn in range(swaps + 2**k):
        count = int(chosen.sum())
        weight = (count - walsh(chosen)) // 2  # weight of the word of each message
        if count == length:
            lightest = int(weight[1:].min())
            rank = (lightest, -int((weight[1:] == lightest).sum()))
            if rank > best_rank:
                best, best_rank = chosen.copy(), rank
            if turn >= swaps + abs(length - len(start)):
                break
            chosen[rng.choice(np.flatnonzero(chosen))] = 0
            weight = (length - 1 - walsh(chosen)) // 2
        # Light words count most: 2**-weight, kept exact in integers.
        potential = np.left_shift(1, np.clip(24 - 2 * (weight - weight[1:].min()), 0, 24))
        potential[0] = 0
        gain = int(potential.sum()) - walsh(potential)
        if count > length:
            gain = np.where(chosen > 0, gain, np.iinfo(np.int64).max)
            chosen[_pick(gain == gain.min(), rng)] = 0
        else:
            gain = np.where(chosen > 0, -1, gain)
            gain[0] = -1
            chosen[_pick(gain == gain.max(), rng)] = 1
    return np.flatnonzero(best)


def _pick(mask: np.ndarray, rng: np.random.Generator) -> int:
    return int(rng.choice(np.flatnonzero(mask)))


def linear_words(columns: np.ndarray, k: int) -> np.ndarray:
    """All 2**k words of the code with these generator columns, as +-1 int8 [2**k, length]."""
    parity = np.bitwise_count(np.arange(2**k)[:, None] & columns[None, :]) & 1
    return (1 - 2 * parity.astype(np.int8)).astype(np.int8)

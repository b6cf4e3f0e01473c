"""Search for well separated codes: combinations of Hadamard codes first, linear and greedy codes where those end.

Legend: N classes (rows), K bits (columns). Codes are +-1 matrices here ("words"), bits in `ecocseg.codebook`.
Candidates are ranked by the least row distance, then by column separation, then by how few columns repeat.
Every choice is made in exact integers, so a seed gives the same code everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ecocseg import hadamard

PLANS = 4  # number of Hadamard combinations built per request and way of breaking ties
SHORTENINGS = 4  # number of columns tried for a shortened code without repeated columns
CELLS_DENSE = 20_000_000  # N * N * K above which the quadratic searches are left out: a second or two on one core
CELLS_ROWS = 16_000_000  # matrix cells the column-separation search may touch per candidate
LEXICODE_BITS = 12


class Block(NamedTuple):
    """A code with at least N words that can stand beside others; lengths and distances add up (Levenshtein)."""

    kind: str  # "full" (rows and complements), "punctured" (rows less the constant column) or "shortened" (one more)
    order: int
    length: int
    distance: int


class Rank(NamedTuple):
    distance: int
    column_separation: int
    few_repeats: int


@dataclass
class Candidate:
    """Words [N, K] as blocks side by side: `pools[c][index[c]]`, then `padding` columns."""

    pools: list[np.ndarray]
    index: list[np.ndarray]
    padding: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int8))

    def words(self) -> np.ndarray:
        parts = [pool[index] for pool, index in zip(self.pools, self.index, strict=True)]
        return np.concatenate([*parts, self.padding] if self.padding.size else parts, axis=1)


def largest_code(length: int, distance: int) -> int:
    """Plotkin's limit on the number of words of this length and least distance, with shortening."""
    if distance % 2:
        return largest_code(length + 1, distance + 1)
    excess = max(0, length - 2 * distance)  # length K has at most twice the words of length K - 1
    length -= excess
    words = 4 * distance if length == 2 * distance else 2 * (distance // (2 * distance - length))
    return int(words << min(excess, 64))


def plotkin(num_classes: int, length: int) -> int:
    """Largest least row distance that Plotkin's bound leaves to `num_classes` words of `length` bits."""
    return max((d for d in range(1, length + 1) if largest_code(length, d) >= num_classes), default=0)


def gram(words: np.ndarray) -> np.ndarray:
    """Inner products of the rows, exact (float32 holds integers to 2**24)."""
    as_float = words.astype(np.float32)
    return np.rint(as_float @ as_float.T).astype(np.int32)


def row_distances(words: np.ndarray) -> np.ndarray:
    """Hamming distances between all rows of a +-1 matrix, int32 [N, N], the diagonal set to K + 1."""
    distances = (words.shape[1] - gram(words)) // 2
    np.fill_diagonal(distances, words.shape[1] + 1)
    return distances


def rank_of(words: np.ndarray) -> Rank | None:
    """Rank of a code, None if it is invalid (equal rows or a constant column)."""
    num_classes, length = words.shape
    distance = int(row_distances(words).min())
    if distance < 1 or np.any(np.abs(words.sum(axis=0, dtype=np.int64)) == num_classes):
        return None
    alike = np.abs(gram(words.T))
    np.fill_diagonal(alike, 0)
    separation = (num_classes - int(alike.max())) // 2 if length > 1 else num_classes // 2
    return Rank(distance, separation, -int((alike == num_classes).sum()))


def best_words(num_classes: int, length: int, seed: int) -> np.ndarray:
    """The best valid +-1 code [N, K] found; the caller has made sure that one exists."""
    rng = np.random.default_rng([seed, num_classes, length])
    bound = plotkin(num_classes, length)
    best: tuple[Rank, np.ndarray] | None = None

    def offer(candidate: Candidate) -> None:
        nonlocal best
        if bound_below(candidate, best):
            return
        words = separate_columns(candidate, rng)
        rank = rank_of(words)
        if rank and (best is None or rank > best[0]):
            best = rank, words

    for plan in hadamard_plans(num_classes, length):
        offer(combine(plan, num_classes, length, rng))
    if best is None or best[0].distance < bound:
        for candidate in linear_candidates(num_classes, length, rng):
            offer(candidate)
    if best is None or best[0].distance < bound:
        for words in greedy_candidates(num_classes, length, best, bound, rng):
            offer(Candidate([words], [np.arange(num_classes)]))
    words = random_words(num_classes, length, rng) if best is None else best[1]
    signs = rng.choice(np.array([-1, 1], dtype=np.int8), size=length)
    return np.asarray(words[:, rng.permutation(length)] * signs)


def bound_below(candidate: Candidate, best: tuple[Rank, np.ndarray] | None) -> bool:
    """Whether the candidate's row distance is already less than the best one's (its column search keeps it)."""
    return best is not None and int(row_distances(candidate.words()).min()) < best[0].distance


# Hadamard combinations


def blocks_for(num_classes: int, max_length: int) -> list[Block]:
    """Hadamard codes of at least N words and at most `max_length` bits."""
    blocks = []
    for order in hadamard.orders():
        half = order // 2
        options = (
            (2 * order, Block("full", order, order, half)),
            (order, Block("punctured", order, order - 1, half)),
            (half, Block("shortened", order, order - 2, half)),
        )
        blocks += [b for count, b in options if count >= num_classes and 0 < b.length <= max_length]
    return blocks


def hadamard_plans(num_classes: int, length: int) -> list[list[Block]]:
    """Block combinations with the largest guaranteed distance, best first; too long ones lose their last columns."""
    longest = length + max(8, length // 2)
    blocks = blocks_for(num_classes, longest)
    if not blocks:
        return []
    plans = []
    for price in (1, 8):  # distance first, then few blocks; then few shortened ones, whose columns may repeat
        plans += [plan for plan in _best_plans(blocks, price, longest, length) if plan not in plans]
    return plans


def _best_plans(blocks: list[Block], price: int, longest: int, length: int) -> list[list[Block]]:
    lengths = np.array([b.length for b in blocks])
    many = 16 * longest
    worth = np.array([b.distance * many - (price if b.kind == "shortened" else 1) for b in blocks])
    value = np.zeros(longest + 1, dtype=np.int64)
    last = np.full(longest + 1, -1)
    for total in range(1, longest + 1):
        fits = np.flatnonzero(lengths <= total)
        options = np.where(value[total - lengths[fits]] >= 0, value[total - lengths[fits]] + worth[fits], -1)
        # Exact fills only: a shorter filling is its own plan with padding.
        options[(total > lengths[fits]) & (last[total - lengths[fits]] < 0)] = -1
        if len(options) and options.max() > 0:
            last[total] = fits[int(options.argmax())]
            value[total] = options.max()
    totals = [t for t in range(1, longest + 1) if last[t] >= 0]
    reach = {t: -(-int(value[t]) // many) - max(0, t - length) for t in totals}
    totals.sort(key=lambda t: (-reach[t], abs(t - length), -t))
    plans = []
    for total in totals[:PLANS]:
        if reach[total] > 0 or total <= length:
            plan = []
            while total:
                plan.append(blocks[last[total]])
                total -= blocks[last[total]].length
            plans.append(plan)
    return plans


def block_words(block: Block, rng: np.random.Generator) -> np.ndarray:
    """All words of a block, from a randomly normalised Hadamard matrix, so that two blocks of a kind differ."""
    matrix = hadamard.shuffled(block.order, rng)
    if block.kind == "full":
        return np.concatenate([matrix, -matrix])
    matrix = matrix * matrix[:, :1]
    if block.kind == "punctured":
        return np.asarray(matrix[:, 1:])
    for column in range(1, min(block.order, SHORTENINGS + 1)):
        rows = matrix[matrix[:, column] == 1]
        words = np.delete(rows, [0, column], axis=1)
        alike = np.abs(gram(words.T)) == len(words)
        if alike.sum() == block.length:  # each column only like itself
            break
    return words


def combine(plan: list[Block], num_classes: int, length: int, rng: np.random.Generator) -> Candidate:
    """Blocks side by side with rows drawn at random, cut or padded to `length` columns."""
    pools = [block_words(block, rng) for block in plan]
    index = [rng.permutation(len(pool))[:num_classes] for pool in pools]
    candidate = Candidate(pools, index)
    surplus = sum(block.length for block in plan) - length
    if surplus > 0:
        keep = np.split(columns_to_keep(candidate.words(), surplus, rng), np.cumsum([b.length for b in plan])[:-1])
        parts = [(p[:, k], i) for p, k, i in zip(pools, keep, index, strict=True) if k.any()]
        candidate = Candidate([p for p, _ in parts], [i for _, i in parts])
    elif surplus < 0:
        words = candidate.words()
        for _ in range(-surplus):
            words = np.concatenate([words, dividing_column(words, rng)[:, None]], axis=1)
        candidate.padding = words[:, surplus:]
    return candidate


def columns_to_keep(words: np.ndarray, surplus: int, rng: np.random.Generator) -> np.ndarray:
    """Mask of columns left after cutting `surplus`: greedily those that the nearest pairs need least."""
    num_classes, length = words.shape
    keep = np.ones(length, dtype=bool)
    if num_classes * num_classes * length * surplus > 20 * CELLS_DENSE:
        keep[rng.permutation(length)[:surplus]] = False
        return keep
    for _ in range(surplus):
        part = words[:, keep].astype(np.float64)  # sums stay below 2**53, so exact
        nearness = closeness(words[:, keep]).astype(np.float64)
        need = -np.einsum("nk,nk->k", part, nearness @ part)  # more = separates nearer pairs
        least = np.flatnonzero(need == need.min())
        keep[np.flatnonzero(keep)[rng.choice(least)]] = False
    return keep


def closeness(words: np.ndarray, levels: int = 10) -> np.ndarray:
    """Symmetric int64 [N, N]: 4**levels for the nearest pairs, a quarter of it per bit further, 0 on the diagonal."""
    distances = row_distances(words) if words.shape[1] else np.zeros((len(words), len(words)), dtype=np.int32)
    nearest = distances.min()
    out = np.left_shift(1, np.clip(2 * (levels - (distances - nearest)), 0, None).astype(np.int64))
    out[distances - nearest > levels] = 0
    np.fill_diagonal(out, 0)
    return np.asarray(out)


def dividing_column(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A +-1 column that puts the nearest pairs of rows on different sides: local maximum cut by single flips."""
    num_classes = len(words)
    near = closeness(words)
    column = rng.permutation(np.where(np.arange(num_classes) < num_classes // 2, -1, 1)).astype(np.int64)
    pull = near @ column if num_classes <= 64 else np.rint(near.astype(np.float64) @ column).astype(np.int64)
    for _ in range(4 * num_classes):
        gain = column * pull
        worst = int(gain.argmax())
        if gain[worst] <= 0 or abs(int(column.sum()) - 2 * int(column[worst])) == num_classes:
            break
        column[worst] = -column[worst]
        pull += 2 * column[worst] * near[:, worst]
    return column.astype(np.int8)


# Linear and greedy codes


def linear_candidates(num_classes: int, length: int, rng: np.random.Generator) -> list[Candidate]:
    """Linear codes of the least dimension that has N words."""
    k = (num_classes - 1).bit_length()
    if length >= 2**k:
        return []
    out = []
    for columns in hadamard.linear_columns(k, length, rng):
        pool = hadamard.linear_words(columns, k)
        if len(np.unique(pool, axis=0)) == len(pool):
            out.append(Candidate([pool], [rng.permutation(len(pool))[:num_classes]]))
    return out


def greedy_candidates(
    num_classes: int, length: int, best: tuple[Rank, np.ndarray] | None, bound: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Greedy codes for small requests, and column-by-column improvement of the best code."""
    out = []
    if length <= LEXICODE_BITS:
        out += lexicodes(num_classes, length, best[0].distance + 1 if best else 1, bound, rng)
    if num_classes * num_classes * length <= CELLS_DENSE:
        words = np.zeros((num_classes, 0), dtype=np.int8)
        for _ in range(length):
            words = np.concatenate([words, dividing_column(words, rng)[:, None]], axis=1)
        out.append(words)
        starts = [words, best[1]] if best else [words]
        redrawn = (redraw_columns(start, bound, again, rng) for start in starts for again in (False, True))
        out += [words for words in redrawn if words is not None]
    return out


def lexicodes(num_classes: int, length: int, least: int, bound: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Codes that take each next word (in natural, then in random order) far enough from all taken ones."""
    everything = np.arange(2**length)
    out: list[np.ndarray] = []
    for distance in range(least, bound + 1):
        for attempt in range(max(2, min(20, 4000 // num_classes))):
            order = everything if attempt == 0 else rng.permutation(everything)
            taken: list[int] = []
            while len(order) and len(taken) < num_classes:
                taken.append(int(order[0]))
                order = order[np.bitwise_count(order ^ order[0]) >= distance]
            if len(taken) == num_classes:
                bits = np.array(taken)[:, None] >> np.arange(length) & 1
                out.append((2 * bits - 1).astype(np.int8))
                break
        else:
            return out
    return out


def redraw_columns(words: np.ndarray, bound: int, repeats: bool, rng: np.random.Generator) -> np.ndarray | None:
    """Take columns out and put better ones in, as long as pairs at the least distance get fewer; None if they do not.

    Columns that repeat another one are put in only if `repeats`.
    """
    num_classes, length = words.shape
    budget = CELLS_DENSE // (num_classes * num_classes)
    sweeps = min(4, budget // (4 * length))

    def key(w: np.ndarray) -> tuple[int, int]:
        distances = row_distances(w)
        return int(distances.min()), -int((distances == distances.min()).sum())

    current, rank = words, key(words)
    for _ in range(sweeps):
        for column in rng.permutation(length):
            rest = np.delete(current, column, axis=1)
            new = dividing_column(rest, rng)
            if not repeats and np.abs(rest.T.astype(np.int32) @ new).max(initial=0) == num_classes:
                continue
            trial = np.insert(rest, column, new, axis=1)
            if (trial_rank := key(trial)) >= rank:
                current, rank = trial, trial_rank
        if rank[0] >= bound:
            break
    return current if rank > key(words) else None


def random_words(num_classes: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Some valid code: binary numbers in random order on enough bits, random columns beside them."""
    need = (num_classes - 1).bit_length()
    while True:
        numbers = rng.permutation(2**need)[:num_classes]
        base = (numbers[:, None] >> np.arange(need) & 1).astype(np.int8)
        rest = rng.integers(0, 2, size=(num_classes, length - need), dtype=np.int8)
        rest[0], rest[1] = rest[0], np.where(rest.min(0) == rest.max(0), 1 - rest[0], rest[1])
        bits = np.concatenate([base, rest], axis=1)
        if np.all(bits.min(0) != bits.max(0)):
            return (2 * bits - 1).astype(np.int8)


# Column separation


def separate_columns(candidate: Candidate, rng: np.random.Generator) -> np.ndarray:
    """Words after a local search over which pool word each row has; the least row distance never falls.

    A column of ones is held beside the code, so that no column may become constant.
    """
    words = candidate.words()
    num_classes, length = words.shape
    distance = int(row_distances(words).min())
    state = np.concatenate([words, np.ones((num_classes, 1), np.int8)], axis=1)
    product = gram(state.T)
    np.fill_diagonal(product, 0)
    penalty = penalty_table(num_classes, int(np.abs(product).max()))
    cost = int(penalty[np.abs(product)].sum())
    starts = np.cumsum([0, *(pool.shape[1] for pool in candidate.pools)])
    movable = [c for c, pool in enumerate(candidate.pools) if len(candidate.pools) > 1 or len(pool) > num_classes]
    block_of = np.repeat(np.arange(len(candidate.pools)), np.diff(starts))
    worst = np.flatnonzero(np.abs(product).max(axis=0) == np.abs(product).max())
    index = [i.copy() for i in candidate.index]
    for turn in range(int(np.clip(CELLS_ROWS // (length + 1) ** 2, 30, 1500)) if movable else 0):
        block, row = movable[rng.integers(len(movable))], int(rng.integers(num_classes))
        if turn % 2 and (column := worst[rng.integers(len(worst))]) < len(block_of) and block_of[column] in movable:
            block = int(block_of[column])  # every other move is made where columns are most alike
        new = int(rng.integers(len(candidate.pools[block])))
        holder = np.flatnonzero(index[block] == new)
        if len(holder) and (holder[0] == row or len(candidate.pools) == 1):
            continue
        rows = np.array([row, *holder])
        old_words = state[rows].astype(np.int32)
        new_words = old_words.copy()
        span = slice(starts[block], starts[block + 1])
        new_words[:, span] = candidate.pools[block][[new, index[block][row]][: len(rows)]]
        trial = product + new_words.T @ new_words - old_words.T @ old_words
        np.fill_diagonal(trial, 0)
        trial_cost = int(penalty[np.abs(trial)].sum())
        if trial_cost > cost:
            continue
        before = state[rows]
        state[rows] = new_words
        if nearest_to(state[:, :length], rows) < distance:
            state[rows] = before
            continue
        index[block][rows] = [new, index[block][row]][: len(rows)]
        product, cost = trial, trial_cost
        alike = np.abs(product)
        worst = np.flatnonzero(alike.max(axis=0) == alike.max())
    return np.asarray(state[:, :length])


def penalty_table(num_classes: int, largest: int) -> np.ndarray:
    """Penalty of a pair of columns by |inner product|: times four per step of two, zero far below the largest."""
    exponent = np.arange(num_classes + 1) - largest + 30
    table = np.where(exponent >= 0, np.left_shift(1, np.clip(exponent, 0, 38)), 0).astype(np.int64)
    table[num_classes] *= 64  # a repeated or constant column
    return np.asarray(table)


def nearest_to(words: np.ndarray, rows: np.ndarray) -> int:
    """Least distance between one of `rows` and any other row."""
    as_float = words.astype(np.float32)
    products = np.rint(as_float[rows] @ as_float.T).astype(np.int64)
    products[np.arange(len(rows)), rows] = -words.shape[1] - 2
    return int(words.shape[1] - products.max()) // 2

"""Text codebooks: class-name embeddings thresholded into bits, feature by feature (ECOCSeg's default codebook)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ecocseg import embeddings as shipped
from ecocseg.errors import InputError


def embeddings_for(names: tuple[str, ...], given: np.ndarray | str | os.PathLike[str] | None) -> np.ndarray:
    """Float64 [N, D] with one row per name, from the caller's array or file, or from the shipped table."""
    if given is None:
        return shipped.lookup(names).astype(np.float64)
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        array, source = read_embeddings(path, names), str(path)
    else:
        array, source = np.asarray(given), "embeddings"
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InputError(f"{source}: embeddings must be numbers [classes, features], not {array.dtype} {array.shape}")
    if len(array) != len(names):
        raise InputError(f"{source}: {len(array)} rows for {len(names)} classes; give one row per class, in order")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise InputError(f"{source}: the embedding of {names[bad]!r} is not finite")
    return array.astype(np.float64)


def read_embeddings(path: Path, names: tuple[str, ...]) -> np.ndarray:
    """Array [N, D] of a .npy file, or the only tensor of a .safetensors file (by name if metadata has `names`)."""
    if path.suffix not in (".npy", ".safetensors"):
        raise InputError(f"{path}: embeddings must be a .npy or .safetensors file")
    if not path.is_file():
        raise InputError(f"{path}: no such embeddings file; check the path")
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        table, stored_names = shipped.read_table(path)
    except Exception as error:
        message = f"{path}: cannot be read as embeddings ({error}); save one array [classes, features]"
        raise InputError(message) from None
    if stored_names is None:
        return table
    row_of = {shipped.plain(name): row for row, name in enumerate(stored_names)}
    missing = [name for name in names if shipped.plain(name) not in row_of]
    if missing:
        raise InputError(f"{path}: no embedding for {', '.join(map(repr, missing[:5]))}")
    return table[[row_of[shipped.plain(name)] for name in names]]


def threshold(features: np.ndarray, names: tuple[str, ...], length: int) -> np.ndarray:
    """Bits uint8 [N, length] from features [N, D].

    Rows are L2-normalised; features are taken in order of variance over classes, a bit is feature >= its mean, and a
    column counts only if it is neither constant nor equal or complementary to one taken. If rows are still equal, the
    last bits are replaced by the next candidates, as few as possible.
    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise InputError(f"text codebook: the embedding of {names[int(np.argmin(norms))]!r} is zero")
    columns = candidate_columns(features / norms)
    tellable = len(np.unique(columns, axis=0)) if columns.shape[1] else 1
    if tellable < len(names):
        raise InputError(
            f"text codebook: the embeddings tell only {tellable} of {len(names)} classes apart"
            f"{_alike(columns, names)}; use embeddings with more features, or kind max_min"
        )
    available = columns.shape[1]
    if length <= available:
        return distinct_rows(columns, length)
    if length > 2 ** (len(names) - 1) - 1:  # repeats cannot be helped: use each as evenly as possible
        return columns[:, np.arange(length) % available]
    raise InputError(
        f"text codebook: {features.shape[1]} features of {len(names)} classes give at most {available} different bits, "
        f"not {length}; use length {available} or less, embeddings with more features, or kind max_min"
    )


def candidate_columns(features: np.ndarray) -> np.ndarray:
    """All acceptable columns, uint8 [N, M], in order of the features' variance over classes."""
    order = np.argsort(-features.var(axis=0), kind="stable")
    bits = (features >= features.mean(axis=0)).astype(np.uint8)[:, order]
    seen: set[bytes] = set()
    taken = []
    for column in bits.T:
        canonical = (column ^ column[0]).tobytes()
        if column.min() != column.max() and canonical not in seen:
            seen.add(canonical)
            taken.append(column)
    return np.stack(taken, axis=1) if taken else np.zeros((len(bits), 0), dtype=np.uint8)


def distinct_rows(columns: np.ndarray, length: int) -> np.ndarray:
    """The first `length` columns, with as few of the last ones replaced as it takes to make the rows differ."""
    num_classes = len(columns)
    for replaced in range(length + 1):
        kept = list(range(length - replaced))
        for most in (False, True):  # the next candidate that helps, then the one that helps most
            chosen = kept + _dividing(columns, kept, range(length, columns.shape[1]), replaced, most)
            chosen += list(range(length - replaced, length))[: length - len(chosen)]
            if len(chosen) == length and _groups(columns[:, chosen]) == num_classes:
                return columns[:, chosen]
    enough = next(k for k in range(length + 1, columns.shape[1] + 1) if _possible(columns, k))
    raise InputError(
        f"text codebook: these embeddings do not tell {num_classes} classes apart in {length} bits; "
        f"use length {enough} or more, or kind max_min"
    )


def _possible(columns: np.ndarray, length: int) -> bool:
    picked = _dividing(columns, [], range(columns.shape[1]), length, most=True)
    return _groups(columns[:, picked]) == len(columns) or length == columns.shape[1]


def _groups(columns: np.ndarray) -> int:
    return len(np.unique(columns, axis=0)) if columns.shape[1] else 1


def _dividing(columns: np.ndarray, kept: list[int], following: range, limit: int, most: bool) -> list[int]:
    """Up to `limit` of the `following` columns, each of which tells more rows apart."""
    group = np.zeros(len(columns), dtype=np.int64)
    if kept:
        group = np.unique(columns[:, kept], axis=0, return_inverse=True)[1].reshape(-1)
    picked: list[int] = []
    rest = list(following)
    while len(picked) < limit and rest and group.max() + 1 < len(columns):
        counts = [len(np.unique(2 * group + columns[:, c])) for c in rest] if most else None
        if counts is not None:
            best = rest[int(np.argmax(counts))]
            rest.remove(best)
        else:
            best = rest.pop(0)
        refined = np.unique(2 * group + columns[:, best], return_inverse=True)[1].reshape(-1)
        if refined.max() > group.max():
            group = refined
            picked.append(best)
        elif most:
            break
    return picked


def _alike(columns: np.ndarray, names: tuple[str, ...]) -> str:
    first: dict[bytes, str] = {}
    for row, name in zip(columns, names, strict=True):
        other = first.setdefault(row.tobytes(), name)
        if other != name:
            return f" ({other!r} and {name!r} are alike)"
    return ""

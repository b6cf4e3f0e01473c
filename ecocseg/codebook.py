"""Codebooks: which K bits stand for each of N classes, how well they are separated, and how they are kept.

`max_min` builds the best separated code it can (see `ecocseg.codebook_search`), `text` thresholds class-name
embeddings, `random` repeats the search of ECOCSeg (Li et al., NeurIPS 2025), `one_hot` is the baseline. Codebooks are
frozen, know their separations and Plotkin's bound, and carry a hash of their bits, by which checkpoints and
pseudo-labels name them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ecocseg import codebook_random, codebook_search, codebook_text
from ecocseg.errors import InputError

MAX_CLASSES, MAX_LENGTH = 1000, 512
FORMAT, VERSION = "ecocseg-codebook", 1
KINDS = ("max_min", "text", "random", "one_hot", "custom")


@dataclass(frozen=True, eq=False)
class Codebook:
    """N codewords of K bits; row n is the codeword of class n.

    Raises `InputError` if two rows are equal, a column is constant, or N rows cannot be told apart by K bits.
    """

    matrix: np.ndarray
    """Bits, uint8 [N, K] of 0 and 1, read-only."""
    kind: str = "custom"
    """How the codewords were made: max_min, text, random, one_hot or custom."""
    seed: int | None = None
    """Seed they were made with; None where none is used."""
    class_names: tuple[str, ...] | None = None
    """Names of the N classes in row order, if known."""

    def __post_init__(self) -> None:
        given = np.asarray(self.matrix)
        if given.ndim != 2 or given.dtype.kind not in "biuf" or not np.isin(given, (0, 1)).all():
            raise InputError(f"codebook: matrix must be [classes, bits] of 0 and 1, got {given.dtype} {given.shape}")
        matrix = np.ascontiguousarray(given, dtype=np.uint8).copy()
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
        self._validate()

    def _validate(self) -> None:
        num_classes, length = self.matrix.shape
        _check_request(num_classes, length, most_classes=None, most_bits=None)
        if self.kind not in KINDS:
            raise InputError(f"codebook: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.class_names is not None and len(self.class_names) != num_classes:
            raise InputError(f"codebook: {len(self.class_names)} class names for {num_classes} rows")
        _, first, inverse = np.unique(self.matrix, axis=0, return_index=True, return_inverse=True)
        if len(first) < num_classes:
            twin = next(n for n in range(num_classes) if first[inverse[n]] != n)
            other = first[inverse[twin]]
            raise InputError(f"codebook: classes {other} and {twin} have the same codeword; rows must differ")
        constant = np.flatnonzero(self.matrix.min(axis=0) == self.matrix.max(axis=0))
        if len(constant):
            raise InputError(f"codebook: bit {constant[0]} is the same for all classes; leave constant bits out")

    @property
    def num_classes(self) -> int:
        """Number of classes N."""
        return int(self.matrix.shape[0])

    @property
    def num_bits(self) -> int:
        """Number of bits K of a codeword."""
        return int(self.matrix.shape[1])

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of N, K and the bits: equal for equal matrices, however they were made."""
        head = f"{self.num_classes}x{self.num_bits}:".encode()
        return hashlib.sha256(head + np.packbits(self.matrix, axis=1).tobytes()).hexdigest()

    @cached_property
    def row_distances(self) -> np.ndarray:
        """Hamming distances between codewords, int64 [N, N]."""
        signs = 2.0 * self.matrix - 1
        return np.rint((self.num_bits - signs @ signs.T) / 2).astype(np.int64)

    @cached_property
    def column_distances(self) -> np.ndarray:
        """Hamming distances between columns, int64 [K, K]."""
        signs = 2.0 * self.matrix.T - 1
        return np.rint((self.num_classes - signs @ signs.T) / 2).astype(np.int64)

    @cached_property
    def min_distance(self) -> int:
        """Least Hamming distance between two codewords, in bits; (min_distance - 1) // 2 wrong bits are corrected."""
        return int(_off_diagonal(self.row_distances).min())

    @cached_property
    def distance_bound(self) -> int:
        """Plotkin's bound: no N codewords of K bits have a larger least distance. It need not be reachable."""
        return codebook_search.plotkin(self.num_classes, self.num_bits)

    @cached_property
    def column_separation(self) -> int:
        """Least distance, in classes, of a column from another one or its complement; N // 2 if there is one column."""
        if self.num_bits == 1:
            return self.num_classes // 2
        between = _off_diagonal(self.column_distances)
        return int(min(between.min(), self.num_classes - between.max()))

    def describe(self) -> str:
        """One paragraph: size, origin, distances and what they mean."""
        origin = self.kind if self.seed is None else f"{self.kind}, seed {self.seed}"
        correct = (self.min_distance - 1) // 2
        columns = (
            "some bits repeat others (or their complements)"
            if self.column_separation == 0
            else f"any two bits, complements included, differ on at least {self.column_separation} classes"
        )
        return (
            f"Codebook of {self.num_classes} classes x {self.num_bits} bits ({origin}; hash {self.hash[:12]}): least "
            f"distance {self.min_distance} (no code of this size exceeds {self.distance_bound}, Plotkin), mean "
            f"{_off_diagonal(self.row_distances).mean():.1f}, so {correct} wrong bits are always corrected; {columns}; "
            f"on average {self.matrix.mean():.0%} of the bits are 1."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data (strings, ints, lists) that `from_dict` takes and JSON or a checkpoint can hold."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "seed": self.seed,
            "class_names": None if self.class_names is None else list(self.class_names),
            "hash": self.hash,
            "matrix": ["".join(map(str, row)) for row in self.matrix.tolist()],
        }

    @classmethod
    def from_dict(cls, data: Any, source: str = "codebook") -> Codebook:
        """Inverse of `to_dict`; `source` names the data in messages. Raises `InputError` if it is damaged."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"{source}: not a saved codebook; save one with Codebook.save")
        if data.get("version") != VERSION:
            raise InputError(f"{source}: format version {data.get('version')!r}, this program reads {VERSION}")
        rows, names, seed, kind = data.get("matrix"), data.get("class_names"), data.get("seed"), data.get("kind")
        well_formed = (
            isinstance(rows, list)
            and len({len(row) if isinstance(row, str) else -1 for row in rows}) == 1
            and all(isinstance(row, str) and row and not row.strip("01") for row in rows)
            and (names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names)))
            and (seed is None or isinstance(seed, int))
            and isinstance(kind, str)
        )
        if not well_formed:
            raise InputError(f"{source}: the codebook is damaged (matrix, kind, seed or class_names); save it anew")
        assert isinstance(rows, list) and isinstance(kind, str)
        matrix = np.array([[int(bit) for bit in row] for row in rows], dtype=np.uint8)
        try:
            book = cls(matrix, kind, seed, None if names is None else tuple(names))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        if book.hash != data.get("hash"):
            raise InputError(f"{source}: the bits do not match the stored hash (damaged or edited); save it anew")
        return book

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise InputError(f"cannot write codebook {target}: {error.strerror}; choose a writable path") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codebook:
        """Read what `save` wrote and check it against its hash. Raises `InputError` naming the file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read codebook {path}: {error.strerror}; check the path") from None
        except ValueError:  # not UTF-8, or not JSON
            raise InputError(f"{path}: not a saved codebook (no valid JSON); save one with Codebook.save") from None
        return cls.from_dict(data, source=str(path))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codebook):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return int(self.hash[:15], 16)

    def __reduce__(self) -> tuple[Any, ...]:
        return Codebook, (self.matrix, self.kind, self.seed, self.class_names)  # a copy is checked and read-only again


def max_min(num_classes: int, length: int, seed: int = 0) -> Codebook:
    """Codebook with large least row distance, then column separation: our class-agnostic default.

    num_classes 2 to 1000, length ceil(log2 N) to 512 bits; the same seed gives the same codebook everywhere.
    """
    _check_request(num_classes, length)
    _warn_of_repeats(num_classes, length)
    words = codebook_search.best_words(num_classes, length, _checked_seed(seed))
    return Codebook((words > 0).astype(np.uint8), "max_min", seed)


def text(
    class_names: Sequence[str], length: int, embeddings: np.ndarray | str | os.PathLike[str] | None = None
) -> Codebook:
    """Codebook from class-name embeddings: similar names get similar codewords (ECOCSeg's default).

    embeddings: array [N, D] in the order of the names, a .npy or .safetensors file of one, or None for the shipped ones
    (names beyond them need the extra `text`). Raises `InputError` if the features cannot give `length` bits.
    """
    names = tuple(class_names)
    if isinstance(class_names, str) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError("text codebook: class_names must be a list of non-empty names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"text codebook: class name {twice!r} occurs twice; names must differ")
    _check_request(len(names), length)
    features = codebook_text.embeddings_for(names, embeddings)
    matrix = codebook_text.threshold(features, names, length)
    _warn_of_repeats(len(names), length)
    return Codebook(matrix, "text", None, names)


def random(num_classes: int, length: int, seed: int = 0, draws: int = 100_000) -> Codebook:
    """ECOCSeg's max-min search: of `draws` random matrices the one with the largest d_min_r + d_min_c + (N - d_max_c).

    A second for 19 x 40; where 100,000 draws would take long, fewer are made and a warning tells how many.
    """
    _check_request(num_classes, length)
    if not isinstance(draws, int) or draws < 1:
        raise InputError(f"random codebook: draws={draws!r} must be a whole number of at least 1")
    _warn_of_repeats(num_classes, length)
    return Codebook(codebook_random.search(num_classes, length, _checked_seed(seed), draws), "random", seed)


def one_hot(num_classes: int) -> Codebook:
    """Identity: bit n is 1 for class n alone (softmax and argmax are its usual decoding)."""
    _check_request(num_classes, num_classes, most_classes=None, most_bits=None)
    return Codebook(np.eye(num_classes, dtype=np.uint8), "one_hot")


def codebook_table(pairs: Iterable[tuple[int, int]], seed: int = 0) -> list[dict[str, Any]]:
    """One row per (N, K): what `max_min` reaches beside Plotkin's bound, and its seconds."""
    rows = []
    for num_classes, length in pairs:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            book = max_min(num_classes, length, seed)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "classes": num_classes,
                "bits": length,
                "min_distance": book.min_distance,
                "bound": book.distance_bound,
                "column_separation": book.column_separation,
                "seconds": round(seconds, 3),
            }
        )
    return rows


def _off_diagonal(square: np.ndarray) -> np.ndarray:
    return square[~np.eye(len(square), dtype=bool)]


def _checked_seed(seed: int) -> int:
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"codebook seed {seed!r} must be a whole number of at least 0")
    return seed


def _check_request(
    num_classes: int, length: int, *, most_classes: int | None = MAX_CLASSES, most_bits: int | None = MAX_LENGTH
) -> None:
    if num_classes < 2:
        raise InputError(f"codebook: {num_classes} classes; at least 2 are needed")
    if most_classes is not None and num_classes > most_classes:
        raise InputError(f"codebook: {num_classes} classes; at most {most_classes} are supported")
    least = (num_classes - 1).bit_length()
    if length < least:
        bits = f"{least} bit" + "s" * (least > 1)
        raise InputError(f"codebook length {length} is too short: {num_classes} classes need at least {bits}")
    if most_bits is not None and length > most_bits:
        raise InputError(f"codebook length {length} is too long: use {least} to {most_bits}")


def _warn_of_repeats(num_classes: int, length: int) -> None:
    distinct = 2 ** (num_classes - 1) - 1
    if length > distinct:
        warnings.warn(
            f"{num_classes} classes have only {distinct} different bit{'s' * (distinct > 1)}; "
            f"a codebook of {length} bits repeats them and has column separation 0",
            stacklevel=3,
        )

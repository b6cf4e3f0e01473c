"""Work ahead: in order, bounded, and errors in their place."""

from __future__ import annotations

import pytest

from ecocseg.ahead import in_threads


@pytest.mark.parametrize("threads", [1, 3])
def test_order_is_kept_and_little_is_taken_ahead(threads: int) -> None:
    taken: list[int] = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    for number, made in enumerate(in_threads(lambda i: i * i, items(), threads)):
        assert made == number * number
        assert len(taken) <= number + 1 + 2 * threads
    assert number == 19


def test_an_error_comes_in_its_place() -> None:
    found = in_threads(lambda i: 6 // (3 - i), range(5), 2)
    assert [next(found) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(found)

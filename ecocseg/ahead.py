"""Work done ahead of the one who waits for it, in a few threads and never far ahead: what is read and decoded costs memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def in_threads(make: Callable[[Given], Made], items: Iterable[Given], threads: int) -> Iterator[Made]:
    """`make` of every item, in order; `threads` of them are under way at once and as many wait. What goes wrong with one is
    raised in its place."""
    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ecocseg-ahead")
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

"""Checkpoints written beside training: the loop hands over a copy in host memory, one thread checks, writes and prunes.

At most one is under way. Its error is raised where the loop next asks, with its own type; `close` gives one that nobody has
asked for, so that it is told when the run ends by another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ecocseg.checkpoint import Checkpoints, Snapshot
from ecocseg.finite import check_snapshot


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole, where it lies, and the seconds its writing took."""

    step: int
    url: str
    seconds: float


class Saver:
    """Writes checkpoints in turn, by a thread of its own if `beside`; `before` is done ahead of each."""

    def __init__(self, checkpoints: Checkpoints, keep: int, beside: bool, before: Callable[[], None]) -> None:
        self._checkpoints, self._keep, self._beside, self._before = checkpoints, keep, beside, before
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ecocseg-checkpoint")
        self._writing: Future[Saved] | None = None
        self.newest: int | None = None
        """Step of the newest checkpoint known to be whole."""

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; the one before must have been taken with `written(wait=True)`."""
        assert self._writing is None
        self._writing = self._pool.submit(self._write, snapshot, self.newest)
        if not self._beside:
            self._writing.exception()  # waits, and leaves the error to `written`

    def _write(self, snapshot: Snapshot, newest: int | None) -> Saved:
        began = time.perf_counter()
        check_snapshot(snapshot, newest)
        self._before()
        url = self._checkpoints.save(snapshot)
        self._checkpoints.prune(self._keep, self._checkpoints.url_of(snapshot.meta["best"]["step"]))
        return Saved(snapshot.step, url, time.perf_counter() - began)

    def written(self, wait: bool = False) -> Saved | None:
        """The checkpoint that has been written since it was last asked for.

        Raises:
            InputError, StorageUnavailable, FloatingPointError: that it was not, and why.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        saved = writing.result()
        self.newest = saved.step
        return saved

    def whole(self) -> int | None:
        """Step of the newest checkpoint that is whole; one under way is waited for, and still to be taken."""
        if self._writing is not None and self._writing.exception() is None:
            return self._writing.result().step
        return self.newest

    def close(self) -> BaseException | None:
        """Wait for what is being written; the error that came of it, if it has not been raised."""
        writing, self._writing = self._writing, None
        self._pool.shutdown()
        return None if writing is None else writing.exception()

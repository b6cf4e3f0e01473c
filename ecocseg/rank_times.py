"""Which worker holds the others up: the seconds each works by itself, waiting for data included and for the others not.

All workers take the same time over a step, because they wait for one another in its collectives. What differs is the time
from a step's start to the last forward pass, ahead of the backward pass in which gradients are averaged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RankTimes:
    """Sums up this worker's own seconds; on a GPU by events, read when `take` is called."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._cuda, self._clock = device.type == "cuda", clock
        self._seconds, self._began = 0.0, 0.0
        self._events: list[tuple[Any, Any]] = []
        self._open: Any = None

    def add(self, seconds: float) -> None:
        """Seconds spent on the host, waiting for data."""
        self._seconds += seconds

    def begin(self) -> None:
        self._began = self._clock()
        if self._cuda:
            self._open = torch.cuda.Event(enable_timing=True)
            self._open.record()

    def end(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((self._open, event))
        else:
            self._seconds += self._clock() - self._began

    def ending(self, part: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The part of a step whose forward pass is the last."""
        def timed() -> Tensor:
            loss = part()
            self.end()
            return loss

        return timed

    def take(self) -> float:
        """Seconds since it was last asked; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


def slowest(seconds: list[float]) -> dict[str, float]:
    """The worker that took longest by itself, and its time over the mean of all."""
    mean = sum(seconds) / len(seconds)
    return {"time/slowest_rank": float(seconds.index(max(seconds))), "time/slowest_over_mean": max(seconds) / max(mean, 1e-9)}

"""What a run is asked to do while it trains, agreed on by all workers at the same step, at log lines and between them.

Worker 0 asks the driver once a second, in a thread. Between log lines the answer goes round by an all-reduce of one number
on the host (gloo), begun at one step and looked at in the next: no worker waits for it, and no device for its worker.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ecocseg.engine import World

ASKS = ("", "save", "restart", "stop")
"""What a run may be asked, the stronger later: nothing, to save and go on, to save and begin again (with another number of
workers), to save and stop."""
POLL_SECONDS = 1.0


class Asking:
    """`ask` is called by worker 0 alone and answers with one of ASKS, or true for "stop"."""

    def __init__(self, world: World, ask: Callable[[], str | bool]) -> None:
        self.world, self.ask = world, ask
        self.given = ""
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._flying: tuple[Any, torch.Tensor] | None = None
        self._done = threading.Event()

    def start(self) -> None:
        """Begin to ask the driver, where log lines are too rare for that."""
        if self.world.rank == 0:
            threading.Thread(target=self._poll, daemon=True, name="ecocseg-asking").start()

    def close(self) -> None:
        self._done.set()

    def _poll(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            with contextlib.suppress(Exception):  # a driver that is gone ends the run by other ways
                self.take(self.ask())

    def take(self, answer: str | bool) -> None:
        """Keep what worker 0 was told until all have agreed on it."""
        told = "stop" if answer is True else answer or ""
        self.given = max(self.given, told, key=ASKS.index)

    def between(self) -> str:
        """What is agreed on at a step without a log line; to be called at each of them."""
        number = ASKS.index(self.given)
        if self._group is None:
            return self._settle(number)
        sent = torch.tensor([float(number)])
        before, self._flying = self._flying, (dist.all_reduce(sent, group=self._group, async_op=True), sent)
        if before is None:
            return ""
        before[0].wait()
        return self._settle(round(before[1].item()))

    def now(self, noticed: str) -> str:
        """What is agreed on at a log line, where workers wait for each other anyway; `noticed` is the same on all."""
        told = self.world.sum(torch.tensor(float(ASKS.index(self.given)), device=self.world.device)).item()
        return self._settle(max(round(told), ASKS.index(noticed)))

    def _settle(self, number: int) -> str:
        if number:
            if ASKS.index(self.given) <= number:
                self.given = ""
            if self._flying is not None:  # it may say the same again
                self._flying[0].wait()
                self._flying = None
        return ASKS[number]

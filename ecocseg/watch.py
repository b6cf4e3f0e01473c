"""Between the driver of a run and its workers: what they tell it, what it asks of them, and leaving in good order."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ecocseg.errors import InputError


class RunFailed(RuntimeError):
    """The run ended before its last step; the message says where and how to go on. `run_url` is its folder."""

    run_url = ""


class RunStopped(RunFailed):
    """Somebody asked for the end, by Ctrl-C or SIGTERM."""


class Board:
    """What workers tell the driver and the driver asks of workers; a Ray actor without resources, on the driver's node."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.asked = ""
        self.step = 0
        self.failure: dict[str, str] | None = None
        self.nodes: dict[int, str] = {}
        self.errors: list[dict[str, Any]] = []
        self.idle_since = time.monotonic()

    def post(self, message: dict[str, Any]) -> str:
        """Take a message; the answer to "progress", and to "poll", which says nothing, is what workers are asked to do (see
        `asking.ASKS`)."""
        if message["kind"] != "poll":
            self.messages.append(message)
        if message["kind"] not in ("progress", "poll"):
            return ""
        self.step = max(self.step, message.get("step", 0))
        asked = self.asked
        self.asked = asked if asked == "stop" else ""
        return asked

    def take(self) -> list[dict[str, Any]]:
        taken, self.messages = self.messages, []
        return taken

    def ask(self, what: str) -> None:
        if self.asked != "stop":
            self.asked = what

    def fail(self, kind: str, text: str) -> None:
        self.failure = self.failure or {"kind": kind, "text": text}

    def failed(self) -> dict[str, str] | None:
        return self.failure

    def over(self) -> bool:
        """Whether nothing more can be saved: the workers are done with, or there are none."""
        return self.failure is not None or not self.nodes

    def idle(self) -> float:
        """Seconds since there were workers; 0 while there are."""
        return 0.0 if self.nodes else time.monotonic() - self.idle_since

    def begin(self, rank: int, node: str) -> dict[str, str] | None:
        """A worker begins, on a node; the answer is why it need not."""
        self.nodes[rank] = node
        return self.failure

    def note(self, error: dict[str, Any]) -> None:
        """A worker's error that may pass: its rank, kind, text and where."""
        self.errors.append(error)

    def attempt(self) -> dict[str, Any]:
        """What was told since the last restart: nodes by rank, errors in order, the newest step, a failure for good. What was
        asked of those workers is not asked of the next."""
        self.ask("")
        nodes, self.nodes, self.idle_since = self.nodes, {}, time.monotonic()
        errors, self.errors = self.errors, []
        return {"nodes": nodes, "errors": errors, "step": self.step, "failure": self.failure}


def make_board() -> Any:
    """A board on this node: losing another must not lose it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()


class Vigil:
    """Says that no worker has its place, after 30 seconds without any and then every 10 minutes: who waits for a node that
    never comes should know what for."""

    FIRST, AGAIN, LOOK = 30.0, 600.0, 5.0

    def __init__(self, board: Any, lacking: Callable[[], str]) -> None:
        self.board, self.lacking = board, lacking
        self.looked = self.told = -math.inf

    def look(self) -> str | None:
        """What to tell now, if anything."""
        import ray

        now = time.monotonic()
        if now < self.looked + self.LOOK:
            return None
        self.looked, idle = now, ray.get(self.board.idle.remote())
        told_of_it = self.told > now - idle
        if idle < self.FIRST or (told_of_it and now < self.told + self.AGAIN):
            return None
        self.told = now
        return f"no worker is training for {idle:.0f} s: {self.lacking()}"


def watch(fit: Callable[[], Any], board: Any, display: Any, stop: threading.Event | None = None,
          vigil: Vigil | None = None) -> dict[str, Any]:
    """Run `fit` beside this thread, show what arrives, pass Ctrl-C, SIGTERM and `stop` on as a request to save and stop.

    After a signal it returns as soon as the workers have saved: who stops a job gives it seconds.
    """
    import ray

    error: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as caught:  # noqa: BLE001 - carried to the main thread
            error.append(caught)

    asked: list[float] = []
    signalled: list[float] = []
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda s, frame: _on_signal(signalled, board))
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    final: dict[str, Any] | None = None
    try:
        while True:
            alive = thread.is_alive()
            for message in ray.get(board.take.remote()):
                if message["kind"] == "final":
                    final = message
                if display is not None:
                    display.update(message)
            if display is not None and vigil is not None and (text := vigil.look()) is not None:
                display.update({"kind": "message", "text": text})
            if not alive or (signalled and ray.get(board.over.remote())):
                break
            if stop is not None and stop.is_set() and not asked:
                asked.append(time.monotonic())
                board.ask.remote("stop")
            thread.join(0.3)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    failure = ray.get(board.failed.remote())
    if final is not None:
        return final
    if failure is not None and failure["kind"] == "input":
        raise InputError(failure["text"])
    cause = failure["text"] if failure is not None else _cause(error, thread.is_alive())
    for_good = failure is not None and failure["kind"] != "lost"
    raise (RunStopped if asked or signalled else RunFailed)(cause) from (error[0] if error and not for_good else None)


def _on_signal(signalled: list[float], board: Any) -> None:
    """First: save and stop. Again: stop at once; a copy of the first, as `timeout` sends it, is not "again"."""
    signalled.append(time.monotonic())
    if signalled[-1] - signalled[0] < 2 and len(signalled) > 1:
        return
    if len(signalled) == 1:
        print("\nstopping: saving a checkpoint first (again to stop at once)", file=sys.stderr, flush=True)
        board.ask.remote("stop")
    else:
        os._exit(130)


def _cause(error: list[BaseException], waiting: bool) -> str:
    if waiting:
        return "stopped while no worker was training; go on with --resume"
    if not error:
        return "the workers ended without a result; go on with --resume"
    failures = getattr(error[0], "worker_failures", None) or {}
    lines = [f"worker {rank}: {str(what).strip().splitlines()[-1]}" for rank, what in failures.items()]
    return "; ".join(lines) or f"{type(error[0]).__name__}: {error[0]}"

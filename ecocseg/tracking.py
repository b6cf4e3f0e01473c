"""What a run leaves to look at: `metrics.jsonl`, TensorBoard, pictures (and trackers.py); and the one progress display."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from PIL import Image
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ecocseg.metrics import EvalResult

METRICS_FILE = "metrics.jsonl"


class Sink:
    """Where a run's records go. Each kind takes what it has a place for."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """A record of plain numbers."""

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """A uint8 picture [H, W, 3]."""

    def table(self, step: int, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table whose first column is text."""

    def close(self, finished: bool) -> None:
        """No more is to come; `finished` when the run reached its last step."""


class FileSink(Sink):
    """`metrics.jsonl` and `panels/<name>/step_<step>.png` in the run's folder."""

    def __init__(self, directory: Path, start_step: int) -> None:
        self.directory = directory
        _drop_from(directory / METRICS_FILE, start_step)
        self._file: TextIO = open(directory / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 (until close)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """A NaN or infinity becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()  # a killed run keeps its curve

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        path = self.path(step, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture_HWC).save(path)

    def path(self, step: int, name: str) -> Path:
        return self.directory / "panels" / name / f"step_{step:08d}.png"

    def close(self, finished: bool) -> None:
        self._file.close()


class TensorBoardSink(Sink):
    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step or None)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        self._writer.add_image(name, picture_HWC, step, dataformats="HWC")

    def table(self, step: int, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def close(self, finished: bool) -> None:
        self._writer.close()


class Tracker:
    """Hands one run's scalars, pictures and tables to its sinks, and each record on to a console.

    Args:
        directory: local folder, made if missing; holds `metrics.jsonl`, `tensorboard/` and `panels/`.
        total_steps: number of optimizer steps of the whole run, for the time left.
        start_step: first step that will be logged from now on. What an earlier process logged at or after it (steps
            done again after a resume) is dropped, so that every curve has one value per step.
        console: called with every record plus `total`, `rate` (steps/s) and `eta` (s).
        tensorboard: also write TensorBoard files.
        sinks: where the records go besides (see trackers.py).
    """

    def __init__(
        self,
        directory: str | Path,
        total_steps: int,
        start_step: int = 0,
        console: Callable[[dict[str, Any]], None] | None = None,
        *,
        tensorboard: bool = True,
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.total_steps, self.step = total_steps, start_step
        self._console = console
        self._pace = _Pace(total_steps, start_step, clock)
        self._files = FileSink(self.directory, start_step)
        self._sinks: list[Sink] = [self._files, *sinks]
        if tensorboard:
            self._sinks.append(TensorBoardSink(self.directory, start_step))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one record of plain numbers."""
        values = {name: float(value) for name, value in scalars.items()}
        self.step = step
        for sink in self._sinks:
            sink.log(step, values)
        if self._console is not None:
            self._console({"step": step, "total": self.total_steps, **self._pace(step), **values})

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> Path:
        """Write a uint8 picture [H, W, 3]; returns its path in the run's folder."""
        picture_HWC = np.asarray(picture_HWC)
        for sink in self._sinks:
            sink.image(step, name, picture_HWC)
        return self._files.path(step, name)

    def table(self, step: int, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table whose first column is text; `None` is an empty cell."""
        for sink in self._sinks:
            sink.table(step, name, header, rows)

    def close(self) -> None:
        """Flush and close all sinks; safe to call twice."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close(self.step >= self.total_steps)


def score_table(by_model: Mapping[str, EvalResult], class_names: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of an evaluation: a class a row, then the means, in percent; None where there is no value."""
    results = list(by_model.values())
    by_volume = all(result.dice is not None for result in results)
    each = [result.dice if by_volume and result.dice is not None else result.iou for result in results]
    rows: list[list[Any]] = [[name, *(float(values[i]) for values in each)] for i, name in enumerate(class_names)]
    figures = [result.figures() for result in results]
    rows += [[name, *(figure[name] for figure in figures)] for name in figures[0]]
    percent = [[name, *(None if math.isnan(value) else round(100 * value, 2) for value in values)] for name, *values in rows]
    return ["Dice [%]" if by_volume else "IoU [%]", *by_model], percent


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """Records of a run's `metrics.jsonl`, in order; a last line cut off by a kill is left out."""
    path = Path(directory) / METRICS_FILE
    return parse_metrics(path.read_text(encoding="utf-8")) if path.exists() else []


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """Records of the text of a `metrics.jsonl`."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def _drop_from(path: Path, start_step: int) -> None:
    """Rewrite the file without records at or after `start_step`, by rename, so that a kill here loses nothing."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] < start_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


class _Pace:
    """Steps per second now, and seconds left at the pace since the start (evaluations included)."""

    def __init__(self, total: int, start_step: int, clock: Callable[[], float]) -> None:
        self._total, self._clock = total, clock
        self._first = self._last = (start_step, clock())
        self._rate: float | None = None

    def __call__(self, step: int) -> dict[str, float]:
        now = self._clock()
        steps, seconds = step - self._last[0], now - self._last[1]
        if steps > 0 and seconds > 0:
            latest = steps / seconds
            self._rate = latest if self._rate is None else 0.7 * self._rate + 0.3 * latest
            self._last = (step, now)
        done = step - self._first[0]
        if self._rate is None or done <= 0:
            return {}
        return {"rate": self._rate, "eta": max(0, self._total - step) * (now - self._first[1]) / done}


class ProgressDisplay:
    """The run's one progress display, for the process whose output a person reads.

    `update` takes plain records, any subset of: `step`, `total`, `rate` (steps/s), `eta` (s), `phase` (text), `loss`
    and `loss/<part>`, `confident_share`, `corrected_bits`, `data_wait_share`, `miou`, `dice` (fractions), the last five with
    any `prefix/` and scores also as `miou/<which>`; `time/steps_per_second` takes the place of `rate`. Other keys are
    not shown. A value stays until its next one comes. A record of `kind` `message` is printed as its `text`,
    `checkpoint` as its `url`; `final` is left to the caller. On a terminal it is a live panel; otherwise one line per
    `interval` seconds or 10 % of the run, whichever comes first, and always at an evaluation, a new phase and the end.
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = stream or sys.stdout
        is_live = stream.isatty() if live is None else live
        # plain lines are read by files and pipes, where wrapping would break them
        self._out = Console(file=stream, force_terminal=is_live or None, width=None if is_live else 10_000)
        self._live = Live(console=self._out, auto_refresh=False, transient=True) if is_live else None
        if self._live is not None:
            self._live.start()
        self._interval, self._clock = interval, clock
        self._state: dict[str, Any] = {}
        self._shown: tuple[float, float] | None = None  # clock and share of the run at the last plain line

    def restart(self, phase: str) -> None:
        """Forget the values of the run before; the next lines begin with the name of the new one."""
        self._state, self._shown = {"phase": phase}, None

    def update(self, record: Mapping[str, Any]) -> None:
        """Take in a record and show it when it is time to."""
        kind = record.get("kind")
        if kind in ("message", "checkpoint"):
            self.print(str(record["text"]) if kind == "message" else f"saved {record['url']}")
            return
        if kind == "final":
            return
        new_phase = "phase" in record and record["phase"] != self._state.get("phase")
        evaluated = any(not _SCORES.keys().isdisjoint(name.split("/")) for name in record)
        self._state.update(record)
        if self._live is not None:
            if evaluated:  # stays in the scrollback
                self._print(self._line())
            self._live.update(self._panel(), refresh=True)
        elif new_phase or evaluated or self._is_due():
            self._shown = (self._clock(), self._share())
            self._print(self._line())

    def print(self, text: str) -> None:
        """Print a line or more that stays, above the live panel if there is one."""
        self._print(text)

    def print_table(self, text: str, title: str = "") -> None:
        """Print a ready-made text table (`metrics.table`) that stays."""
        self._print(f"\n{title}\n{text}\n" if title else f"\n{text}\n")

    def close(self) -> None:
        """Take the live panel away, leaving its last state as a plain line; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._state:
                self._print(self._line())

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, text: str) -> None:
        self._out.print(text, markup=False, highlight=False, soft_wrap=True)
        self._out.file.flush()

    def _share(self) -> float:
        return self._state.get("step", 0) / max(1, self._state.get("total", 1))

    def _is_due(self) -> bool:
        if self._shown is None or self._share() >= 1.0 > self._shown[1]:
            return True
        return self._clock() - self._shown[0] >= self._interval or self._share() - self._shown[1] > 0.1 - 1e-9

    def _line(self) -> str:
        return "  ".join([*_progress_parts(self._state), *_metric_parts(self._state)])

    def _panel(self) -> Group:
        top = Table.grid(padding=(0, 2))
        share = min(1.0, self._share())
        top.add_row(ProgressBar(total=1.0, completed=share, width=30), Text("  ".join(_progress_parts(self._state))))
        return Group(top, Text("  ".join(_metric_parts(self._state)), style="dim"))


def _progress_parts(state: Mapping[str, Any]) -> list[str]:
    parts = [str(state["phase"])] if state.get("phase") else []
    if "step" in state and state.get("total"):
        parts.append(f"step {int(state['step'])}/{int(state['total'])} ({100 * state['step'] / state['total']:.0f} %)")
    elif "step" in state:
        parts.append(f"step {int(state['step'])}")
    if rate := state.get("time/steps_per_second") or state.get("rate"):
        parts.append(f"{rate:.2f} steps/s" if rate >= 0.1 else f"{1 / rate:.1f} s/step")
    if state.get("eta") is not None and math.isfinite(state["eta"]):
        parts.append(f"eta {_duration(state['eta'])}")
    return parts


_SHARES = {"confident_share": "confident", "corrected_bits": "bits corrected", "data_wait_share": "waiting for data"}

_SCORES = {"miou": "mIoU", "dice": "Dice"}


def _metric_parts(state: Mapping[str, Any]) -> list[str]:
    """Losses first, then shares, then mIoU, each group in the order in which it came."""
    losses, shares, scores = [], [], []
    for name, value in state.items():
        if not isinstance(value, int | float):
            continue
        path = name.split("/")
        if path[0] == "loss":
            losses.append((len(path), f"{' '.join(path[1:]).replace('_', ' ') or 'loss'} {value:.3f}"))
        elif path[-1] in _SHARES:
            shares.append(f"{_SHARES[path[-1]]} {100 * value:.1f} %")
        elif found := [part for part in path if part in _SCORES]:
            which = " ".join(part for part in path if part not in _SCORES)
            scores.append(f"{_SCORES[found[0]]} {which + ' ' if which else ''}{100 * value:.1f}")
    return [text for _, text in sorted(losses, key=lambda pair: pair[0])] + shares + scores


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

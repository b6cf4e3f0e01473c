"""What a sweep found: the record of its trials, their ranking, and the table, CSV and best.yaml made of it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ecocseg.config import RunConfig, with_values
from ecocseg.storage import Storage, join

STATES = ("done", "stopped", "running", "lost", "failed")
"""In the order of ranking: trained to the last step, ended early by the scheduler, under way, not known any more, failed."""


@dataclass
class Trial:
    """One trial: its values, its latest metrics, and the first objective along its steps."""

    name: str
    values: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    state: str = "running"
    ended: float | None = None
    """Time of its last result, in seconds since 1970."""
    error: str | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """More to show than is compared."""


@dataclass
class Record:
    """A sweep as its `results.json` has it."""

    name: str
    description: str
    recipe: str
    objectives: dict[str, str]
    scales: dict[str, str]
    """Kind of each searched key's domain: choice, uniform, loguniform or int."""
    trials: list[Trial] = field(default_factory=list)

    def find(self, name: str) -> Trial | None:
        return next((trial for trial in self.trials if trial.name == name), None)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        plain = json.loads(data)
        return cls(**{**plain, "trials": [Trial(**{**trial, "curve": [(int(s), v) for s, v in trial["curve"]]})
                                          for trial in plain["trials"]]})

    @classmethod
    def read(cls, sweep_url: str, storage: Storage) -> Record | None:
        url = join(sweep_url, "results.json")
        return cls.from_json(storage.read_bytes(url)) if storage.exists(url) else None


def compared(record: Record, trial: Trial) -> list[float]:
    """The objectives, all to be made large; what is missing or not a number is worst."""
    found = [(trial.metrics.get(name), way) for name, way in record.objectives.items()]
    return [-math.inf if value is None or not math.isfinite(value) else value if way == "max" else -value
            for value, way in found]


def ranked(record: Record) -> list[Trial]:
    """Trials trained to the end first, then by the objectives in their order, later ones deciding between equals. Scores of
    trials that were stopped early are of fewer steps, so these never come before whole ones."""
    return sorted(record.trials, key=lambda t: (STATES.index(t.state), [-value for value in compared(record, t)]))


def best(record: Record) -> Trial | None:
    """The first of the ranking, if it has been evaluated at all."""
    top = [trial for trial in ranked(record) if compared(record, trial)[0] > -math.inf and trial.state != "failed"]
    return top[0] if top else None


def pareto(record: Record) -> set[str]:
    """Names of the whole trials that no other whole one beats: at least as good in all objectives, better in one."""
    done = [(trial.name, compared(record, trial)) for trial in record.trials if trial.state == "done"]
    return {name for name, mine in done
            if not any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for _, other in done)}


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or as many parts as tell it from the others."""
    short = {}
    for name in names:
        parts = name.split(".")
        sizes = (n for n in range(1, len(parts) + 1)
                 if sum(("." + other).endswith("." + ".".join(parts[-n:])) for other in names) == 1)
        short[name] = ".".join(parts[-next(sizes, len(parts)):])
    return short


def shown(value: Any) -> str:
    """A value as people read it: four digits are enough."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows(record: Record) -> list[dict[str, Any]]:
    """The ranking as a table, a row per trial: place, name, state, values, objectives, and on the Pareto front or not."""
    front = pareto(record) if len(record.objectives) > 1 else set()
    found = []
    for place, trial in enumerate(ranked(record), 1):
        row: dict[str, Any] = {"place": place, "trial": trial.name, "state": trial.state,
                               **{key: trial.values.get(key) for key in record.scales},
                               **{name: trial.metrics.get(name) for name in record.objectives}, **trial.details}
        if trial.step:
            row["step"] = trial.step
        if len(record.objectives) > 1:
            row["pareto"] = "yes" if trial.name in front else ""
        row["error"] = trial.error or ""
        found.append(row)
    return found


def columns(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of any row; `error` last, and only if there is one."""
    names = [name for name in dict.fromkeys(name for row in table for name in row) if name != "error"]
    return [*names, *(["error"] if any(row["error"] for row in table) else [])]


def text_table(record: Record, most: int = 20) -> str:
    """The best `most` trials for a terminal, and in how many words the others are left out."""
    table = rows(record)
    names = columns(table)
    short = short_names(names)
    lines = [[short[name] for name in names]]
    lines += [[shown(row.get(name)) if name != "error" else str(row["error"])[:60] for name in names] for row in table[:most]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if len(table) > most:
        text.append(f"({len(table) - most} more in results.csv)")
    return "\n".join(text)


def csv_text(record: Record) -> str:
    """All trials in the order of ranking, values in full."""
    table = rows(record)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns(table), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def best_yaml(record: Record, base: RunConfig) -> str | None:
    """The recipe with the best trial's values, as `--config` takes it; None when no trial has a result."""
    trial = best(record)
    if trial is None:
        return None
    config = with_values(base, trial.values).updated(run={"name": None})
    said = ", ".join(f"{name} {shown(trial.metrics.get(name))}" for name in record.objectives)
    lines = [f"# best of {len(record.trials)} trial(s) of sweep {record.name} on recipe {record.recipe}: {trial.name}"
             + (f", {trial.state} at step {trial.step}" if trial.step else "") + f"; {said}"]
    lines += [f"#   {key}={shown(value)}" for key, value in trial.values.items()]
    return "\n".join(lines) + "\n" + config.to_yaml()

"""Tables from the result files of runs: several seeds of several variants, what did not finish, curves of a metric."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ecocseg.storage import Storage, join
from ecocseg.tracking import METRICS_FILE, parse_metrics

BASELINE = "one-hot"
CHAIN = ("teacher", "round1", "round2")
"""Folders of ST++'s runs in that of the whole, in their order (see stpp.py)."""


@dataclass(frozen=True)
class Run:
    """What a run's folder says: `last` and `best` score in % by "<evaluation set> <model>", empty if it did not finish."""

    variant: str
    seed: int | None
    last: dict[str, float]
    best: dict[str, float]
    metrics: list[dict[str, Any]]
    stage: str = ""
    """Which run of ST++'s chain the metrics are of."""

    @property
    def steps(self) -> int:
        return max((int(record["step"]) for record in self.metrics), default=0)


def read_runs(url: str, storage: Storage | None = None) -> list[Run]:
    """The runs in a folder, or the one that it is, by name; a run's folder is named VARIANT-seedSEED."""
    storage = storage or Storage()
    folders = [join(url, name) for name in storage.list_dirs(url)]
    found = [_read_run(folder, storage) for folder in (url, *folders) if storage.exists(join(folder, "config.yaml"))]
    return sorted(found, key=lambda run: (run.variant, run.seed or 0))


def _read_run(url: str, storage: Storage) -> Run:
    name = url.rstrip("/").rpartition("/")[2]
    match = re.fullmatch(r"(.+)-seed(\d+)", name)
    variant, seed = (match[1], int(match[2])) if match else (name, None)
    stage, metrics = "", []
    for folder in ("", *CHAIN):  # of ST++ the last of its runs that has begun
        metrics_url = join(url, folder, METRICS_FILE) if folder else join(url, METRICS_FILE)
        if storage.exists(metrics_url):
            stage, metrics = folder, parse_metrics(storage.read_bytes(metrics_url).decode())
    if not storage.exists(join(url, "result.json")):
        return Run(variant, seed, {}, {}, metrics, stage)
    last = final_scores(json.loads(storage.read_bytes(join(url, "result.json")))["results"])
    best = dict(last)
    for record in metrics:
        for key, value in record.items():
            *place, kind = key.split("/")
            if len(place) == 2 and kind in ("miou", "dice") and isinstance(value, int | float):
                column = " ".join(place)
                if kind == "dice" or f"{'/'.join(place)}/dice" not in record:
                    best[column] = max(best.get(column, 0.0), 100 * value)
    return Run(variant, seed, last, best, metrics, stage)


def final_scores(results: dict[str, Any]) -> dict[str, float]:
    """Scores in % by "<evaluation set> <model>" of a run's results."""
    return {f"{name} {which}": 100 * found["score"] for name, by_model in results.items() for which, found in by_model.items()}


def scores_table(runs: Sequence[Run], kind: str = "last", baseline: str = BASELINE) -> str:
    """Markdown table by variant: mean, sample deviation and every seed; then, on the first evaluation set, each variant minus
    the baseline seed by seed. Runs that did not finish are named below."""
    done = [run for run in runs if run.last]
    columns = list(dict.fromkeys(column for run in done for column in run.last))
    scores: dict[str, dict[str, dict[int | None, float]]] = {}
    for run in done:
        for column, value in (run.last if kind == "last" else run.best).items():
            scores.setdefault(run.variant, {}).setdefault(column, {})[run.seed] = value
    which = "last checkpoint" if kind == "last" else "best evaluation"
    lines = [f"score in %, {which}: mean ± sample deviation (each seed)", "",
             "| variant | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(_cell(list(by.get(column, {}).values())) for column in columns) + " |"
              for name, by in scores.items()]
    for column in [c for c in columns if c.split()[0] == columns[0].split()[0]]:  # those of the first evaluation set
        lines += _differences(scores, column, baseline)
    lost = [f"- {run.variant}, seed {run.seed}: ended at step {run.steps}"
            + (f" of {run.stage}" if run.stage else "") for run in runs if not run.last]
    return "\n".join(lines + (["", "did not finish:", *lost] if lost else []))


def _differences(scores: dict[str, dict[str, dict[int | None, float]]], column: str, baseline: str) -> list[str]:
    base = scores.get(baseline, {}).get(column, {})
    lines = []
    for name, by in scores.items():
        values = [value - base[seed] for seed, value in by.get(column, {}).items() if seed in base]
        if name != baseline and values:
            lines.append(f"- {name}: {', '.join(f'{value:+.1f}' for value in values)} (mean {statistics.mean(values):+.1f})")
    return ["", f"minus {baseline}, {column}, seed by seed:", *lines] if lines else []


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"


def curve_table(runs: Sequence[Run], key: str, points: int = 6) -> str:
    """Markdown table of a logged metric over the steps, a row per variant: the mean over seeds at `points` steps."""
    steps = sorted({int(record["step"]) for run in runs for record in run.metrics if key in record})
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(1, points - 1))] for i in range(points)}) if steps else []
    lines = [f"{key}, mean over seeds", "", "| step | " + " | ".join(map(str, chosen)) + " |", "|---|" + "---|" * len(chosen)]
    for variant in dict.fromkeys(run.variant for run in runs):
        of = {step: [record[key] for run in runs if run.variant == variant for record in run.metrics
                     if record["step"] == step and record.get(key) is not None] for step in chosen}
        if any(of.values()):
            lines.append(f"| {variant} | " + " | ".join(f"{statistics.mean(v):.3f}" if v else "" for v in of.values()) + " |")
    return "\n".join(lines)

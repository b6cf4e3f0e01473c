"""A sweep over codebooks alone: each is built, nothing is trained, and the ranking is by separation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import numpy as np

from ecocseg.checkpoint import build_storage
from ecocseg.codebook import Codebook
from ecocseg.config import RunConfig, with_values
from ecocseg.errors import InputError
from ecocseg.sweep import Domain, Sweep, build_codebook, points
from ecocseg.sweep_page import write_results
from ecocseg.sweep_report import Record, Trial


def rank_codebooks(sweep: Sweep, base: RunConfig, space: Mapping[str, Domain], sweep_url: str) -> Record:
    """Build every codebook of the sweep once and write the results; one that cannot be made is a failed trial.

    Raises:
        InputError: when an objective is none of `separation`'s figures.
    """
    record = Record(sweep_url.rpartition("/")[2], sweep.description, base.recipe, sweep.goals,
                    {key: domain.kind for key, domain in space.items()})
    distinct = {json.dumps(values): values for values in points(sweep, space) or ()}
    for number, values in enumerate(distinct.values(), 1):
        trial = Trial(f"codebook-{number:0{len(str(len(distinct)))}d}", values)
        try:
            figures = separation(build_codebook(with_values(base, values)))
            trial.metrics, trial.state = figures, "done"
        except InputError as error:
            figures, trial.state, trial.error = {}, "failed", str(error)
        missing = [name for name in record.objectives if figures and name not in figures]
        if missing:
            raise InputError(f"objectives.{missing[0]}: is no figure of a codebook; there are {', '.join(figures)}")
        trial.details = {name: value for name, value in figures.items() if name not in record.objectives}
        trial.ended = time.time()
        record.trials.append(trial)
    write_results(record, base, sweep_url, build_storage(base))
    return record


def separation(book: Codebook) -> dict[str, float]:
    """What tells good codebooks from bad ones without training: `bits` K, least row distance `min_distance` and its share
    `of_bound` of Plotkin's bound, wrong bits that are always `corrected`, `mean_distance` over pairs of rows, and
    `column_separation`, the least distance of a bit from another or its complement."""
    between = book.row_distances[~np.eye(book.num_classes, dtype=bool)]
    return {"of_bound": round(book.min_distance / book.distance_bound, 4), "column_separation": book.column_separation,
            "bits": book.num_bits, "min_distance": book.min_distance, "bound": book.distance_bound,
            "corrected": (book.min_distance - 1) // 2, "mean_distance": round(float(between.mean()), 2)}

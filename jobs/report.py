"""Tables from the result files of finished and unfinished runs.

Examples:
  python jobs/report.py runs/demo                              mean and deviation over seeds, differences to one-hot
  python jobs/report.py runs/demo --curve pseudo/weight        a logged metric over the steps
  python jobs/report.py coding.json step.json                  tables of what jobs/benchmark.py wrote with --json
  python jobs/report.py s3://bucket/runs/coco --best           best instead of last evaluation (published SSL figures)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed

from ecocseg.errors import InputError, run_main
from ecocseg.report import BASELINE, curve_table, read_runs, scores_table
from ecocseg.report_costs import costs_table
from ecocseg.storage_options import add_storage_arguments, storage_of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+",
                        help="folders of runs named VARIANT-seedSEED, or results of a benchmark (.json); local or s3://")
    parser.add_argument("--best", action="store_true", help="best evaluation of a run instead of its last")
    parser.add_argument("--baseline", default=BASELINE, help=f"variant that others are compared with, default {BASELINE}")
    parser.add_argument("--curve", metavar="KEY", help="show this metric over the steps, e.g. pseudo/weight")
    add_storage_arguments(parser)
    options = parser.parse_args(arguments)
    storage = storage_of(options)
    if all(folder.endswith(".json") for folder in options.folders):
        for url in options.folders:
            print(costs_table(json.loads(storage.read_bytes(url))) + "\n")
        return 0
    runs = [run for folder in options.folders for run in read_runs(folder, storage)]
    if not runs:
        raise InputError(f"{', '.join(options.folders)}: there is no run; give the folder that holds the runs' folders")
    if options.curve:
        logged = sorted({key for run in runs for record in run.metrics for key in record} - {"step"})
        if options.curve not in logged:
            raise InputError(f"--curve {options.curve}: not logged; there are {', '.join(logged)}")
        print(curve_table(runs, options.curve))
    else:
        print(scores_table(runs, "best" if options.best else "last", options.baseline))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

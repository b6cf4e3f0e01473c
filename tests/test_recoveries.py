"""The tests of faults bite: with the recovery taken out of a copy of the code, the fault's own test fails.

    python -m pytest -m slow tests/test_recoveries.py -s

Each row is a line of code, what stands in its place, and the test that must fail by it; in the unchanged copy all of them pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("ecocseg", "jobs", "tests", "tune", "cluster", "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.slow


class Recovery(NamedTuple):
    fault: str
    file: str
    code: str
    instead: str
    test: str
    ray: bool = False
    """Whole runs on Ray: minutes."""


CONTINUES = "a_killed_worker_is_replaced_then_sigterm_saves_and_a_new_process_ends_the_run_bit_for_bit"
RECOVERIES = [
    Recovery("a worker killed: not tried again", "launch.py", "max_failures=launch.max_failures,", "max_failures=0,",
             f"test_ray.py::test_{CONTINUES}", ray=True),
    Recovery("SIGTERM: nobody hears it", "watch.py", 'board.ask.remote("stop")\n    else:', "pass\n    else:",
             f"test_ray.py::test_{CONTINUES}", ray=True),
    Recovery("a node killed: taken for an error of the run's own", "restarts.py",
             'gone = lost_nodes(told["nodes"].values()) if failures else', "gone = [] if failures else",
             "test_restarts.py::test_lost_nodes_have_a_budget_of_their_own"),
    Recovery("a node comes or goes: the restart that was asked for counts", "restarts.py",
             "isinstance(raised_by_worker(failure), Restart)", "False",
             "test_restarts.py::test_asked_for_restarts_count_towards_nothing"),
    Recovery("a writer killed: half a checkpoint counts", "checkpoint.py",
             'complete = [name for name in names if self.storage.exists(join(self.url, name, "complete.json"))]',
             "complete = names", "test_faults.py::test_a_checkpoint_whose_writer_was_killed_is_passed_over"),
    Recovery("a writer killed: its remains stay", "checkpoint.py", "            self.storage.delete(folder)\n        listing",
             "        listing", "test_faults.py::test_a_checkpoint_whose_writer_was_killed_is_passed_over"),
    Recovery("a bucket refuses writes: tried once", "s3.py", "for number in range(self.retries + 1):",
             "for number in range(1):", "test_faults.py::test_a_bucket_that_refuses_writes_for_a_while_is_waited_out"),
    Recovery("a bucket is away: an error of writing is swallowed", "saving.py", "        saved = writing.result()\n",
             "        if writing.exception() is not None:\n            return None\n        saved = writing.result()\n",
             "test_faults.py::test_what_went_wrong_with_a_checkpoint_ends_the_run_as_what_it_is"),
    Recovery("a bucket is away when another error comes: not told", "loop.py",
             'self._say(f"the last checkpoint was not written: {unsaid}")', "pass",
             "test_faults.py::test_an_error_of_writing_is_told_when_the_run_ends_by_another"),
    Recovery("disk full: part of a checkpoint stays", "checkpoint.py", "self.storage.soon().delete(folder)", "pass",
             "test_faults.py::test_a_full_disk_is_named_and_older_checkpoints_stay"),
    Recovery("disk full: no remedy", "storage.py", "in NO_ROOM:\n        return", "in ():\n        return",
             "test_faults.py::test_a_full_disk_is_named_and_older_checkpoints_stay"),
    Recovery("newest checkpoint damaged: not noticed", "checkpoint.py",
             'if hashlib.sha256(data).hexdigest() != listing[name]["sha256"]:', "if False:",
             "test_faults.py::test_a_damaged_newest_checkpoint_is_passed_over_and_said"),
    Recovery("a step changes what is being saved", "checkpoint.py", '.to("cpu", copy=True)', '.to("cpu")',
             "test_faults.py::test_training_goes_on_while_a_checkpoint_is_written_of_the_step_it_was_asked_at"),
    Recovery("NaN, stop: the loss is not looked at", "loop.py", "        self._check_finite(scalars)\n", "",
             "test_faults.py::test_a_bad_loss_ends_the_run_and_says_where"),
    Recovery("NaN, stop: such weights are saved", "saving.py", "check_snapshot(snapshot, newest)", "pass",
             "test_faults.py::test_weights_that_are_not_finite_are_never_saved"),
    Recovery("NaN, skip: the step is taken", "engine.py", "elif self.skipped is None or not self.skipped.item():", "elif True:",
             "test_faults.py::test_a_bad_step_is_left_out_and_changes_nothing"),
    Recovery("NaN, skip: batch norm keeps it", "loop.py", "self.buffers.put_back(self.engine.skipped)", "pass",
             "test_faults.py::test_a_bad_step_is_left_out_and_changes_nothing"),
    Recovery("NaN, skip: for ever", "finite.py", "if self.in_a_row >= self.most:", "if False:",
             "test_faults.py::test_too_many_bad_steps_in_a_row_end_the_run"),
    Recovery("NaN, skip: the fused optimiser is not told", "engine.py", "self.optimizer.found_inf = self.skipped", "pass",
             "test_faults.py::test_the_fused_optimiser_leaves_a_step_out_without_asking_the_host"),
    Recovery("a slow worker: its wait for data is not counted", "loop.py",
             "self.rank_times.add(time.perf_counter() - asked)", "pass",
             "test_faults.py::test_a_slow_worker_is_named_and_changes_nothing"),
    Recovery("reading killed: given up", "data/reading.py", "                self._begin_again(items)\n",
             "                raise\n", "test_faults.py::test_reading_begins_again_where_it_was"),
    Recovery("a source hangs: waited for without end", "data/pipeline.py",
             "        raise RuntimeError(self._late(stage(), self.timeout_s))\n", "        return take(60)\n",
             "test_pipeline.py::test_the_watchdog_names_the_stage"),
]


def copy_of_the_code(folder: Path) -> Path:
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-x", "-m", "", "-p", "no:cacheprovider", *tests], cwd=folder,
                          env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize("on_ray", [False, True], ids=["in a process", "on Ray"])
def test_they_pass_in_an_unchanged_copy(tmp_path: Path, on_ray: bool) -> None:
    done = run_tests(copy_of_the_code(tmp_path), *sorted({f"tests/{r.test}" for r in RECOVERIES if r.ray == on_ray}))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("taken_out", RECOVERIES, ids=lambda recovery: recovery.fault)
def test_without_the_recovery_the_test_of_the_fault_fails(taken_out: Recovery, tmp_path: Path) -> None:
    file = copy_of_the_code(tmp_path) / "ecocseg" / taken_out.file
    before = file.read_text()
    assert before.count(taken_out.code) == 1, f"{taken_out.file} has changed: {before.count(taken_out.code)} such lines"
    file.write_text(before.replace(taken_out.code, taken_out.instead))
    done = run_tests(tmp_path, f"tests/{taken_out.test}")
    print(f"{taken_out.fault}: {done.stdout.splitlines()[-1]}")
    assert done.returncode == 1 and " error" not in done.stdout.splitlines()[-1], done.stdout

"""Trials of a sweep, without Ray: what one tells Tune, what is recorded, and what a sweep knows after it was killed."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from ray.tune.search import BasicVariantGenerator

from ecocseg import checkpoint, config, launch, sweep
from ecocseg.errors import InputError
from ecocseg.storage import Storage
from ecocseg.sweep_report import Record, Trial
from ecocseg.sweep_trials import Asha, Recorder, SweepTrial, Watcher, adopt, clip, searcher

SPACE = {"coding.bce_weight": sweep.Domain("uniform", (0.5, 4.0))}


class Direct(SweepTrial):
    """A trial called here and not by Tune."""

    trial_id = "x"  # type: ignore[assignment]

    def __init__(self) -> None:
        """Without Tune's own."""


def begun(monkeypatch: pytest.MonkeyPatch, base: config.RunConfig, train: Any) -> Direct:
    monkeypatch.setattr(launch, "train", train)
    trial = Direct()
    goals = {"miou": "max", "step_seconds": "min"}
    trial.setup({"coding.bce_weight": 2.5}, base=base.model_dump(mode="json"), objectives=goals)
    return trial


def evaluated(step: int, miou: float) -> list[dict[str, Any]]:
    """What a run says at an evaluation, in its order."""
    saved = {"kind": "checkpoint", "url": ""}
    return [{"kind": "progress", "step": step, "time/steps_per_second": 4.0}, saved | {"step": step - 1},
            {"kind": "progress", "step": step, "val/student/miou": miou}, saved | {"step": step}]


def test_a_trial_reports_each_saved_evaluation_and_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(one: config.RunConfig, resume: str, watcher: Watcher, stop: threading.Event) -> launch.RunResult:
        assert (one.coding.bce_weight, one.run.name, resume) == (2.5, "trial-x", "auto")
        watcher.restart("x")
        for message in [*evaluated(4, 0.25), *evaluated(8, 0.5), *evaluated(10, 0.7)]:
            watcher.update(message)
        figures = {"confusion": [[3, 1], [0, 4]], "calibration": torch.zeros(15, 3).tolist()}
        return launch.RunResult("", 10, {"val": {"student": figures}}, [], {})

    trial = begun(monkeypatch, tiny_config(tmp_path, tmp_path), train)
    assert trial.step() == {"step": 4, "miou": 0.25, "step_seconds": 0.25}
    assert trial.step() == {"step": 8, "miou": 0.5, "step_seconds": 0.25}
    last = trial.step()  # step 10 is the last: told once, when the run has ended
    assert (last["step"], last["done"]) == (10, True) and last["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    trial.cleanup()


def test_a_trial_that_fails_by_itself_is_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(*_: Any) -> None:
        raise launch.RunFailed("the loss is nan at step 3")

    result = begun(monkeypatch, tiny_config(tmp_path, tmp_path), train).step()
    assert result["done"] and result["failed"] == "the loss is nan at step 3" and result["miou"] != result["miou"]


def test_a_trial_that_was_lost_is_begun_again_by_tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(*_: Any) -> None:
        raise launch.RunFailed("worker 0: gone") from OSError()

    with pytest.raises(launch.RunFailed, match="worker 0: gone"):
        begun(monkeypatch, tiny_config(tmp_path, tmp_path), train).step()


def test_ending_a_trial_asks_its_run_to_save_and_waits_for_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = []

    def train(one: config.RunConfig, resume: str, watcher: Watcher, stop: threading.Event) -> None:
        for message in evaluated(4, 0.25):
            watcher.update(message)
        assert stop.wait(20)
        time.sleep(0.2)
        ended.append(True)
        raise launch.RunStopped("saved")

    trial = begun(monkeypatch, tiny_config(tmp_path, tmp_path), train)
    trial.step()
    assert not ended
    trial.cleanup()
    assert ended


def test_an_objective_that_is_not_logged_is_named(tmp_path: Path) -> None:
    watcher = Watcher(tiny_config(tmp_path, tmp_path), {"mioux": "max"}, threading.Event())
    watcher.note({"val/student/miou": 0.5, "step": 1})
    with pytest.raises(InputError, match="objectives.mioux: is not logged; there are miou, step, val/student/miou"):
        watcher.result(4, watcher.latest)


def test_a_run_without_an_objective_is_stopped_in_good_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(one: config.RunConfig, resume: str, watcher: Watcher, stop: threading.Event) -> None:
        for message in evaluated(4, 0.25):
            watcher.update(message | {"time/steps_per_second": None})
        assert stop.wait(5)
        raise launch.RunStopped("saved")

    failed = begun(monkeypatch, tiny_config(tmp_path, tmp_path), train).step()["failed"]
    assert failed.startswith("objectives.step_seconds: is not logged")


def test_a_trial_gone_on_with_counts_what_was_logged_before(tmp_path: Path) -> None:
    watcher = Watcher(tiny_config(tmp_path, tmp_path), {"step_seconds": "min"}, threading.Event())
    logged = {"time/steps_per_second": 2.0, "val/student/miou": 0.1}
    watcher.read("".join(json.dumps({"step": step, **logged}) + "\n" for step in (1, 2)))
    watcher.update({"kind": "checkpoint", "step": 2, "url": ""})  # no new evaluation
    assert watcher.results.empty() and watcher.result(2, watcher.latest) == {"step": 2, "step_seconds": 0.5}


def test_an_evaluation_is_told_with_its_own_figures_when_a_later_one_came_before_its_checkpoint(tmp_path: Path) -> None:
    watcher = Watcher(tiny_config(tmp_path, tmp_path, train__steps=9), {"val/student/miou": "max"}, threading.Event())
    for step in (2, 4):
        watcher.update({"kind": "progress", "step": step, "val/student/miou": step / 10})
    for step in (1, 2, 4):
        watcher.update({"kind": "checkpoint", "step": step, "url": ""})
    told = [watcher.results.get_nowait() for _ in range(watcher.results.qsize())]
    assert told == [{"step": 2, "val/student/miou": 0.2}, {"step": 4, "val/student/miou": 0.4}]


def snapshot(step: int) -> checkpoint.Snapshot:
    return checkpoint.Snapshot(step, {"w": torch.full((2,), float(step))}, None, {}, {"teacher_updates": 0})


def test_a_copied_trial_goes_on_from_the_others_newest_checkpoint_in_a_folder_of_its_own(tmp_path: Path) -> None:
    theirs = checkpoint.Checkpoints(str(tmp_path / "trial-y"), Storage())
    theirs.save(snapshot(4))
    theirs.save(snapshot(8))
    trial = Direct()
    trial.setup({}, base=tiny_config(tmp_path, tmp_path).model_dump(mode="json"), objectives={})
    assert trial.save_checkpoint("")["run"] == "trial-x"
    named = {"trial": "y", "run": "trial-y", "id": "0123"}
    trial.load_checkpoint(named)
    assert trial.run_name == "trial-x-0123"
    own = checkpoint.Checkpoints(str(tmp_path / "trial-x-0123"), Storage())
    found = own.newest()
    assert found is not None and found[0].step == 8 and found[0].student["w"].tolist() == [8.0, 8.0]
    theirs.save(snapshot(12))
    trial.load_checkpoint(named)  # a killed sweep asks again, and does not lose what was trained meanwhile
    assert len(own.complete()) == 1
    trial.load_checkpoint({"trial": "x", "run": "trial-x-0123", "id": "4567"})
    assert trial.run_name == "trial-x-0123"
    with pytest.raises(InputError, match="trial-z has no checkpoint to go on from"):
        adopt(str(tmp_path / "trial-z"), str(tmp_path / "trial-x-9"), Storage())


def test_population_based_training_stays_in_the_ranges() -> None:
    assert clip(SPACE, {"coding.bce_weight": 4.4, "other": 9}) == {"coding.bce_weight": 4.0, "other": 9}


def tune_trial(name: str) -> Any:
    return SimpleNamespace(trial_id=name, config={"coding.bce_weight": 1.0}, get_error=lambda: "Traceback\n  OSError: gone\n")


def recorder(folder: Path, data: Path) -> Recorder:
    spec = sweep.Sweep(space={"coding.bce_weight": [1]})
    found = Recorder(spec, SPACE, tiny_config(data, folder), str(folder))
    found.setup()
    return found


def test_what_happens_is_recorded_and_survives_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keeper, trials = recorder(tmp_path, tmp_path), [tune_trial(name) for name in "abc"]
    keeper.on_step_begin(0, [])
    for trial in trials:
        keeper.on_trial_start(1, trials, trial)
    for step, value in ((4, 0.2), (8, 0.3), (4, 0.2)):  # step 4 again, after a lost worker
        keeper.on_trial_result(1, trials, trials[0], {"timestamp": 5, "step": step, "miou": value})
    keeper.on_trial_result(1, trials, trials[0], {"timestamp": 6, "step": 10, "miou": 0.4, "done": True})
    keeper.on_trial_complete(1, trials, trials[0])
    keeper.on_trial_result(1, trials, trials[1], {"timestamp": 7, "step": 4, "miou": 0.1})
    keeper.on_trial_complete(1, trials, trials[1])
    keeper.on_trial_result(1, trials, trials[2], {"timestamp": 8, "step": 0, "miou": float("nan"), "failed": "no memory"})
    keeper.on_trial_complete(1, trials, trials[2])
    again = recorder(tmp_path, tmp_path)
    found = {trial.name: trial for trial in again.record.trials}
    assert [found[f"trial-{name}"].state for name in "abc"] == ["done", "stopped", "failed"]
    assert found["trial-a"].curve == [(4, 0.2), (10, 0.4)] and found["trial-c"].error == "no memory"
    assert "trial-b stopped at step 4" in capsys.readouterr().out
    again.on_trial_error(2, trials, trials[1])
    assert again.record.trials[1].error == "OSError: gone; --resume tries again"
    again.on_trial_start(2, trials, trials[1])
    assert (again.record.trials[1].state, again.record.trials[1].error) == ("running", None)
    again.on_step_begin(0, trials[:2])  # Tune knows two of them
    assert {trial.name for trial in again.record.trials} == {"trial-a", "trial-b"}
    assert (tmp_path / "index.html").exists() and config.load(None, str(tmp_path / "best.yaml")).coding.bce_weight == 1.0


def test_halving_knows_after_a_restart_what_trials_had_reached(tmp_path: Path) -> None:
    curves = {"a": [(2, 0.5), (4, 0.6)], "b": [(2, 0.4)]}
    old = Record("s", "", "tiny", {"miou": "max"}, {"coding.bce_weight": "uniform"},
                 [Trial(f"trial-{name}", {}, {}, curve[-1][0], "running", None, None, curve) for name, curve in curves.items()])

    def decisions() -> list[str]:
        halving = Asha(str(tmp_path), Storage(), time_attr="step", metric="miou", mode="max", max_t=16, grace_period=2,
                       reduction_factor=2)
        new = [tune_trial(name) for name in "abc"]
        for trial in new:
            halving.on_trial_add(None, trial)
        return [halving.on_trial_result(None, new[2], {"step": step, "miou": miou}) for step, miou in ((2, 0.45), (4, 0.55))]

    assert decisions() == ["CONTINUE", "CONTINUE"]  # the first to come passes
    (tmp_path / "results.json").write_bytes(old.to_json())
    assert decisions() == ["CONTINUE", "STOP"]  # 0.45 is the median of step 2; at step 4, `a` had more


def test_no_more_trials_are_begun_than_were_planned() -> None:
    spec = sweep.Sweep(space={"k": [1, 2, 3]}, search=sweep.SearchConfig(algorithm="grid"))
    search = searcher(spec, sweep.domains(spec), 2)
    assert isinstance(search, BasicVariantGenerator) and search.max_concurrent == 2  # Tune's own limit is for searchers alone


def test_without_optuna_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    spec = sweep.Sweep(space={"optim.lr": {"uniform": [0.1, 0.2]}})
    with pytest.raises(InputError, match=r"pip install 'ecocseg\[sweep\]', or use search.algorithm=random"):
        searcher(spec, sweep.domains(spec), 1)

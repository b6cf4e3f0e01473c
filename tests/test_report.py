"""Tables from run folders, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import load_job, tiny_plain, write_tiny

from ecocseg.cli import main as train
from ecocseg.errors import run_main

VALUES = {("source only", 0): (0.01, None), ("source only", 1): (0.03, None), ("one-hot", 0): (0.02, 0.03),
          ("one-hot", 1): (0.03, 0.04), ("ECOC", 0): (0.025, 0.03), ("ECOC", 1): (0.05, 0.05)}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for (variant, seed), (student, teacher) in VALUES.items():
        folder = tmp_path / f"{variant}-seed{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text("{}")
        by_model = {"student": {"score": student}} | ({} if teacher is None else {"teacher": {"score": teacher}})
        (folder / "result.json").write_text(json.dumps({"results": {"t": by_model, "s": {"student": {"score": 0.5}}}}))
        records = [{"step": step, "pseudo/weight": step * (seed + 1) / 100, "t/student/miou": 0.04}
                   for step in range(10, 60, 10)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 60, "cut')
    lost = tmp_path / "ECOC-seed2"
    lost.mkdir()
    (lost / "config.yaml").write_text("{}")
    (lost / "metrics.jsonl").write_text('{"step": 7}\n')
    return tmp_path


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert load_job("report").main(list(arguments)) == 0
    return capsys.readouterr().out


def test_scores_give_mean_deviation_differences_and_what_was_lost(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(capsys, str(runs))
    assert "| source only | 2.0 ± 1.4 (1.0, 3.0) |" in text  # sample deviation: sqrt(2)
    student, teacher = text.split("minus one-hot, ")[1:]  # and nothing of the second evaluation set
    assert student.startswith("t student") and "- source only: -1.0, +0.0 (mean -0.5)" in student
    assert "- ECOC: +0.5, +2.0 (mean +1.2)" in student
    assert teacher.startswith("t teacher") and "- ECOC: +0.0, +1.0 (mean +0.5)" in teacher and "source only" not in teacher
    assert text.rstrip().endswith("did not finish:\n- ECOC, seed 2: ended at step 7")
    assert "| one-hot | 4.0 ± 0.0 (4.0, 4.0) |" in report(capsys, str(runs), "--best")
    assert "minus ECOC, t student" in report(capsys, str(runs), "--baseline", "ECOC")


def test_a_curve_is_the_mean_over_seeds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "| one-hot | 0.150 | 0.300 | 0.450 | 0.600 | 0.750 |" in report(capsys, str(runs), "--curve", "pseudo/weight")


def test_a_chain_of_runs_is_read_by_its_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ST++: the curve lies in the folder of its last run, the result in that of the whole."""
    for seed, done in ((0, True), (1, False)):
        whole = tmp_path / f"ST++-seed{seed}"
        for folder, scores in (("teacher", [0.99]), ("round1", [0.98]), ("round2", [0.7, 0.5])):
            if folder == "round2" and not done:
                continue
            (whole / folder).mkdir(parents=True)
            (whole / folder / "metrics.jsonl").write_text("".join(
                json.dumps({"step": 9 + n, "val/student/miou": score}) + "\n" for n, score in enumerate(scores)))
        (whole / "config.yaml").write_text("{}")
        if done:
            (whole / "result.json").write_text(json.dumps({"results": {"val": {"student": {"score": 0.5}}}}))
    assert "| ST++ | 50.0 |" in report(capsys, str(tmp_path))
    text = report(capsys, str(tmp_path), "--best")
    assert "| ST++ | 70.0 |" in text and text.rstrip().endswith("- ST++, seed 1: ended at step 9 of round1")


def test_what_is_not_there_is_said(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_job("report").main
    assert run_main(lambda: main([str(runs), "--curve", "pseudo/wait"])) == 2
    assert "--curve pseudo/wait: not logged; there are pseudo/weight" in capsys.readouterr().err
    assert run_main(lambda: main([str(tmp_path / "nowhere")])) == 2
    assert "there is no run" in capsys.readouterr().err


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_plain(write_tiny(tmp_path / "data"), tmp_path / "runs")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(plain))
    folder = tmp_path / "runs/t/tiny-seed0"
    folder.mkdir(parents=True)

    def again(*arguments: str) -> int:
        return run_main(lambda: train("", "demo", ["--config", str(path), "--seeds", "0", "run.name=t", *arguments]))

    from ecocseg.config import load
    from ecocseg.launch import with_absolute_paths

    (folder / "config.yaml").write_text(with_absolute_paths(load(None, str(path), ["train.seed=0"])).to_yaml())
    (folder / "result.json").write_text(json.dumps(
        {"step": 3, "results": {"target": {"student": {"score": 0.25}}}, "classes": []}))
    assert again("launch.max_failures=7") == 0 and "25.0" in capsys.readouterr().out
    assert again("coding.reliability=0.5") == 2
    assert "holds a run with other settings (coding.reliability)" in capsys.readouterr().err

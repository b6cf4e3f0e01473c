"""The formulas of `jobs/benchmark.py plan` against what they stand for, and measured figures in the place of assumed ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ecocseg.config import load
from ecocseg.errors import InputError

JOBS = Path(__file__).resolve().parents[1] / "jobs"


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    sys.path.insert(0, str(JOBS))
    import benchmark_plan

    return benchmark_plan


@pytest.fixture(scope="module")
def command() -> ModuleType:
    sys.path.insert(0, str(JOBS))
    import benchmark

    return benchmark


def values(plan: ModuleType) -> dict[str, float]:
    return {name: value for name, (value, _, _) in plan.ASSUMPTIONS.items()}


@pytest.mark.parametrize(("save", "between"), [(10.0, 3600.0), (60.0, 86400.0), (600.0, 7200.0)])
def test_the_interval_between_checkpoints_loses_the_least(plan: ModuleType, save: float, between: float) -> None:
    def lost(interval: float) -> float:
        return plan.lost_share(interval, save, between, 180.0)

    best = min(range(1, 4 * int(between)), key=lost)
    assert abs(plan.young(save, between) - best) <= 1
    assert plan.daly(save, between) == pytest.approx(plan.young(save, between), rel=0.5)
    assert plan.daly(8000.0, 3600.0) == 3600.0


def test_every_assumption_has_a_source_and_is_used(plan: ModuleType) -> None:
    text = Path(plan.__file__).read_text()
    for name, (value, what, source) in plan.ASSUMPTIONS.items():
        assert value > 0 and what and source
        assert f'a["{name}"]' in text or f"a['{name}']" in text, name


def test_bytes_on_the_wire_by_ring(plan: ModuleType) -> None:
    for parameters, workers in ((1000, 2), (1000, 8)):
        passed = 0.0  # an all-reduce by hand: W - 1 turns of a W-th of the bytes, twice
        for _ in range(2 * (workers - 1)):
            passed += 4 * parameters / workers
        assert plan.wire_bytes("torch", parameters, workers) == pytest.approx(passed)
    assert plan.wire_bytes("zero2", 1000, 1) == 0
    found = plan.traffic(1e6, "zero0", 64, values(plan))
    assert found["across"] == pytest.approx(2 * 7 / 8 * 4e6) and plan.traffic(1e6, "zero0", 8, values(plan))["across"] == 0


def test_memory_falls_with_the_stage_and_the_gpus(plan: ModuleType) -> None:
    assert plan.memory(1e6, 0, 8) == 20e6
    assert plan.memory(1e6, 0, 8) > plan.memory(1e6, 1, 8) > plan.memory(1e6, 2, 8) > plan.memory(1e6, 2, 64) > 8e6


def test_what_is_strained_most_comes_first_and_moves_with_its_setting(plan: ModuleType) -> None:
    config, a = load("unimatch_v2_coco_1_32"), values(plan)
    worst = plan.limits(config, a, 8, 1_000_000_000, 97e6)
    assert [ratio for ratio, _, _ in worst] == sorted((ratio for ratio, _, _ in worst), reverse=True)
    assert worst[0][1] == "manifest" and worst[0][0] > 1 and "--shard-mb" in worst[0][2]
    wider = {**a, "row_group_rows": 512.0, "shard_mb": 4096.0}
    assert {what: ratio for ratio, what, _ in plan.limits(config, wider, 8, 1_000_000_000, 97e6)}[worst[0][1]] < 1
    slow = {**a, "images_per_core": 0.5}
    assert plan.limits(config, slow, 8, 118_287, 97e6)[0][1] == "CPU cores"
    small = load("demo")
    assert plan.limits(small, {**a, "network": 1e6, "inside": 1e7}, 64, 118_287, 1e6)[0][1] == "network"


def test_the_page_takes_measured_figures(plan: ModuleType, command: ModuleType, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    ingest, scaling = tmp_path / "ingest.json", tmp_path / "scaling.json"
    ingest.write_text(json.dumps({"arguments": {"threads": 2}, "rows": [
        {"loader": "bare", "images_per_second": 999.0}, {"loader": "threads", "images_per_second": 500.0}]}))
    scaling.write_text(json.dumps({"arguments": {}, "rows": [
        {"engine": "zero1", "workers": 2, "bytes_sent": 220.0, "bytes_computed": 200.0}]}))
    args = command.parse(["plan", "--ingest", str(ingest), "--scaling", str(scaling), "--assume", "spot_hours=100"])
    rows: list[dict[str, Any]] = plan.plan_table(args)
    text = capsys.readouterr().out
    assert "`images_per_core` 250 " in text and "zero1: 1.10" in text and "`spot_hours` 100 " in text
    assert [row["gpus"] for row in rows if row["kind"] == "gpus"] == [8, 64, 512]
    assert len([row for row in rows if row["kind"] == "limit"]) == 9
    assert json.loads(json.dumps(rows)) is not None
    for wrong, says in ((["--assume", "speed=1"], "no assumption 'speed'"), (["--assume", "upload=fast"], "no number"),
                        (["--ingest", str(tmp_path / "none")], "no file that")):
        with pytest.raises(InputError, match=says):
            plan.plan_table(command.parse(["plan", *wrong]))

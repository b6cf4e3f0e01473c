"""Each method's smoke variant as a user starts it: Ray Train under the recipe's own engine, fed by Ray Data, in one Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecocseg import cli
from ecocseg.cluster import start_ray
from ecocseg.config import load
from ecocseg.smoke import STEPS, smoke
from ecocseg.tracking import ProgressDisplay, read_metrics

RUNS = {"mic_gta2cityscapes": "ecoc", "fixmatch_voc_1_16_r50": "one_hot", "unimatch_voc_1_16": "ecoc",
        "unimatch_v2_voc_92": "one_hot", "stpp_voc_1_16_r50": "ecoc"}
"""A recipe of each method that no other test runs on Ray, and its coding."""


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    import ray

    start_ray()
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNS)
def test_a_method_trains_on_ray(recipe: str, one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(recipe, overrides=[f"coding.kind={RUNS[recipe]}", "run.directory=runs", "run.name=smoke"])
    config = smoke(config, "data")
    assert config.data.loader == "ray"
    result = cli.train(config, None, ProgressDisplay())
    assert result.step == STEPS and 0 <= result.miou() <= 1
    assert Path(result.run_url, "result.json").exists()
    run = Path(result.run_url, "round2" if config.method.kind == "stpp" else "")
    records = [record for record in read_metrics(run) if "loss/labeled" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    losses = {key for key in records[-1] if key.startswith("loss/")}
    assert len(losses) > 1 or config.method.kind == "stpp"
    assert all(math.isfinite(record[key]) for record in records for key in losses)
    assert (run / f"checkpoints/step_{STEPS:08d}/complete.json").exists()

"""ST++ from end to end: which run learns what, from whose labels, and that a chain that ended early goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

from ecocseg import batching, checkpoint, cli, labelling, launch, loop, runfiles, stpp
from ecocseg.config import RunConfig, load, validate
from ecocseg.data.pseudo import OPTION
from ecocseg.data.shards import Manifest, iter_rows, read_manifest
from ecocseg.engine import World
from ecocseg.errors import InputError
from ecocseg.smoke import smoke
from ecocseg.tracking import ProgressDisplay

POOL = 24


@dataclass
class Done:
    """What was trained and labelled, in order."""

    stages: list[RunConfig] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    fails: str = ""
    """Name of a stage that is lost."""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, labelling_by_one_thread: None) -> Done:
    """Runs in this process instead of Ray Train's."""
    seen = Done()

    def train(config: RunConfig, resume: str | None = None, display: Any = None) -> launch.RunResult:
        config, url = launch.choose_run(launch.with_absolute_paths(config), resume)
        launch.preflight(config, url)
        runfiles.write(config, url)
        if seen.fails and url.endswith(seen.fails):
            raise launch.RunFailed("lost")
        seen.stages.append(config)
        final = loop.run_worker(config, url, World(), lambda message: False, launch.tracker_factory(config, url))
        Path(url, "result.json").write_text(json.dumps(final))
        return launch.RunResult(url, final["step"], final["results"], final["classes"], final)

    def label_shard(shard: Any, labeler: Any, place: Any, device: Any) -> Any:
        seen.shards.append(place.destination)
        return by_model(shard, labeler, place, device)

    by_model = labelling.label_shard
    monkeypatch.setattr(labelling, "label_shard", label_shard)
    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(launch, "cluster_size", lambda: (2.0, 0))
    return seen


def chain(config: RunConfig) -> launch.RunResult:
    return cli.finished_or_train(config, ProgressDisplay())


def stpp_config(tiny: Path, root: Path, kind: str, scales: tuple[float, ...] = (1.0,)) -> RunConfig:
    return tiny_config(tiny, root, coding__kind=kind, method__kind="stpp", method__teacher_steps=6,
                       method__weighting="by_coding", method__label_scales=list(scales), train__steps=4,
                       train__checkpoint_every=0, train__panels_every=0)


def ids(manifest: Manifest) -> list[str]:
    return [row["image_id"] for row in iter_rows(manifest)]


def weights(manifest: Manifest) -> list[float]:
    return [row["weight"] for row in iter_rows(manifest, columns=("weight",))]


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
def test_each_run_learns_from_the_labels_of_the_one_before(kind: str, tiny: Path, tmp_path: Path, done: Done) -> None:
    scales = (0.5, 1.0) if kind == "one_hot" else (1.0,)
    result = chain(stpp_config(tiny, tmp_path, kind, scales))
    run = tmp_path / "run"
    assert result.run_url == str(run) and json.loads((run / "result.json").read_text())["results"] == result.results
    labels = {name: read_manifest(str(run / url)) for name, url in
              {"all": "labels", "stable": "labels/stable", "rest": "labels/rest", "second": "labels/second"}.items()}

    told = [(c.run.name, c.method.kind, c.method.pseudo_labels, c.train.steps, c.train.labeled_batch, c.streams)
            for c in done.stages]
    assert told == [("run/teacher", "supervised", False, 6, 8, ("labeled",)),
                    ("run/round1", "supervised", True, 2, 4, ("labeled", "unlabeled")),
                    ("run/round2", "supervised", True, 4, 4, ("labeled", "unlabeled"))]
    assert [c.data.unlabeled for c in done.stages[1:]] == [labels["stable"].url, labels["second"].url]

    stability = {row["image_id"]: row["stability"] for row in iter_rows(labels["all"], columns=("image_id", "stability"))}
    best = sorted(stability, key=lambda name: -stability[name])[:POOL // 2]
    assert len(stability) == POOL and set(ids(labels["stable"])) == set(best)
    assert set(ids(labels["rest"])) == set(stability) - set(best)
    assert ids(labels["second"]) == ids(labels["rest"]) + ids(labels["stable"])
    teacher, student = labels["all"].options[OPTION], labels["second"].options[OPTION]
    assert (teacher["step"], sorted(teacher["stability_steps"]), student["step"]) == (6, [2, 4], 2)
    assert labels["second"].options["with"][OPTION] == teacher and student["weights"] != teacher["weights"]
    assert teacher["prediction"]["scales"] == list(scales) and teacher["prediction"]["flip"]
    assert (set(weights(labels["second"])) == {1.0}) == (kind == "one_hot")  # published without a weight

    records = [json.loads(line) for line in (run / "round2/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss/pseudo"] for record in records if "loss/pseudo" in record]
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_a_chain_goes_on_after_any_end_and_is_not_run_twice(tiny: Path, tmp_path: Path, done: Done,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    config = stpp_config(tiny, tmp_path, "ecoc")
    done.fails = "round1"
    with pytest.raises(launch.RunFailed):
        chain(config)
    assert len(done.stages) == 1 and done.shards == [str(tmp_path / "run/labels")]
    with pytest.raises(InputError, match="already holds checkpoints; go on with --resume"):
        launch.choose_run(config, None)
    unnamed = validate(config.model_dump(mode="json") | {"run": {"directory": str(tmp_path)}, "recipe": "tiny"})
    (tmp_path / "run").rename(tmp_path / "tiny-20260101-000000")
    assert launch.choose_run(unnamed, "yes")[1].endswith("tiny-20260101-000000")
    (tmp_path / "tiny-20260101-000000").rename(tmp_path / "run")

    done.fails = "round2"
    with pytest.raises(launch.RunFailed):
        chain(config)
    assert [stage.run.name for stage in done.stages] == ["run/teacher", "run/round1"]
    assert done.shards == [str(tmp_path / "run/labels"), str(tmp_path / "run/labels/second")]
    done.fails = ""
    chain(config)
    assert len(done.stages) == 3 and len(done.shards) == 2
    monkeypatch.setattr(checkpoint, "read", lambda *args: pytest.fail("nothing is left to do"))
    chain(config)
    assert len(done.stages) == 3 and len(done.shards) == 2
    with pytest.raises(InputError, match=r"other settings \(method.cutout_probability\)"):
        chain(config.updated(method={"cutout_probability": 0.0}))


@pytest.mark.parametrize("kind", [pytest.param("one_hot", marks=pytest.mark.slow), "ecoc"])
def test_the_smoke_variant_of_a_published_recipe_runs(kind: str, tmp_path: Path, done: Done) -> None:
    config = smoke(load("stpp_voc_1_16"), str(tmp_path / "toy")).updated(
        coding={"kind": kind}, engine={"kind": "torch", "threads": 1}, data={"loader": "torch"},
        tracking={"tensorboard": False}, run={"directory": str(tmp_path), "name": "run"})
    (by_model,) = chain(config).results.values()
    assert 0 <= by_model["student"]["miou"] <= 1 and [c.train.steps for c in done.stages] == [4, 2, 4]


@pytest.mark.parametrize(("rule", "factor"), [("fixed", 1), ("linear", 2), ("sqrt", 2**0.5)])
def test_teacher_and_students_follow_one_rule_of_the_learning_rate(rule: str, factor: float) -> None:
    batches = ["train.labeled_batch=16", "train.unlabeled_batch=16", "run.name=x"]
    config = load("stpp_voc_1_16", overrides=[*batches, f"optim.lr_rule={rule}"])
    teacher, student = stpp.teacher_stage(config), stpp.student_stage(config, "round1", "labels")
    assert teacher.train.labeled_batch == 32 and student.train.labeled_batch == 16
    assert teacher.lr_factor == student.lr_factor == pytest.approx(factor)
    assert "0.001 for 16 labelled images a step, this run 32" in batching.lr_line(teacher)
    as_published = stpp.teacher_stage(load("stpp_voc_1_16", overrides=["run.name=x", f"optim.lr_rule={rule}"]))
    assert as_published.lr_factor == 1 and batching.lr_line(as_published) == "learning rate 0.001"


def test_weights_of_another_kind_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="method.weighting: pixel needs labels made while learning"):
        tiny_config(tiny, tmp_path, method__kind="stpp", method__weighting="pixel")

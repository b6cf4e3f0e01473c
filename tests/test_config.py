"""Recipes load, bad keys are named with a remedy, and what is printed can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ecocseg.config import RunConfig, help_text, keys, load, recipe_names, validate
from ecocseg.errors import InputError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_round_trips(name: str) -> None:
    config = load(name)
    assert config.recipe == name and config.description
    assert validate(yaml.safe_load(config.to_yaml())) == config


def test_overrides_replace_nested_values_and_read_numbers_as_people_write_them() -> None:
    config = load("demo", overrides=["optim.lr=1e-4", "coding.codebook.length=16", "data.crop=[64, 96]", "coding.kind=one_hot"])
    assert config.optim.lr == 1e-4 and config.coding.codebook.length == 16
    assert config.data.crop == (64, 96) and config.coding.kind == "one_hot"


@pytest.mark.parametrize(("overrides", "says"), [
    (["train.stepz=3"], ["train.stepz", "did you mean 'train.steps'"]),
    (["coding.relability=0.9"], ["did you mean 'coding.reliability'"]),
    (["reliability=0.9"], ["did you mean 'coding.reliability'"]),
    (["trian.steps=3"], ["trian.steps", "did you mean 'train.steps'"]),
    (["stepps=3"], ["did you mean 'train.steps'"]),
    (["coding.codebok.length=40"], ["coding.codebok.length", "did you mean 'coding.codebook.length'"]),
    (["trian={}"], ["did you mean 'train'"]),
    (["train.steps=many"], ["train.steps", "'many'"]),
    (["coding.reliability=1.5"], ["coding.reliability", "1.5"]),
    (["engine.zero_stage=3"], ["engine.zero_stage", "use 0, 1 or 2"]),
    (["train.steps"], ["not key=value"]),
    (["train.steps.more=1"], ["train.steps.more"]),
    (["method.feature_distance=0.1"], ["model.pretrained"]),
    (["optim.warmup_steps=350"], ["optim.warmup_steps", "train.steps"]),
    (["method.ignore_bottom=128"], ["data.crop"]),
    (["train.seed=-1"], ["train.seed", "-1"]),
    (["data.std=[0.2,0,0.2]"], ["data.std.1", "greater than 0"]),
    (["data.scale=[0,0]"], ["data.scale.0", "greater than 0"]),
    (["data.scale=[2,1]"], ["data.scale", "smaller number first"]),
    (["data.resize_labeled=[-1,5]"], ["data.resize_labeled.0", "-1"]),
    (["eval.scales=[]"], ["eval.scales", "at least 1"]),
    (["eval.scored_classes=[-1]"], ["eval.scored_classes.0", "-1"]),
])
def test_bad_values_are_named_with_the_remedy(overrides: list[str], says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load("demo", overrides=overrides)
    for words in says:
        assert words in str(caught.value)


def test_names_that_look_like_numbers_stay_names() -> None:
    config = load("demo", overrides=["run.name=20260101", "model.pretrained=1_16", "optim.lr=1e-4"])
    assert (config.run.name, config.model.pretrained, config.optim.lr) == ("20260101", "1_16", 1e-4)
    assert load("demo", overrides=["data.classes=null"]).data.classes is None


def test_an_unknown_base_is_named_with_the_file_that_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: dem\n")
    with pytest.raises(InputError, match=r"mine.yaml: base: .*'dem'; did you mean 'demo'"):
        load(file=str(tmp_path / "mine.yaml"))


def test_types_are_shown_without_their_bounds() -> None:
    shown = {key: kind for key, kind, *_ in keys()}
    assert shown["data.crop"] == "tuple[int, int]" and shown["eval.scored_classes"] == "tuple[int, ...] | None"


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(InputError, match="3 problems") as caught:
        load("demo", overrides=["train.stepz=3", "train.seed=x", "coding.temperature=-1"])
    assert all(key in str(caught.value) for key in ("train.stepz", "train.seed", "coding.temperature"))


def test_unknown_recipe_suggests_the_right_one() -> None:
    with pytest.raises(InputError, match="did you mean 'daformer_gta2cityscapes'"):
        load("daformer_gta2cityscape")


def test_a_file_may_build_on_a_shipped_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: demo\ndescription: mine\ntrain: {steps: 77}\n")
    config = load(file=str(tmp_path / "mine.yaml"))
    assert config.recipe == "mine" and config.train.steps == 77
    assert config.train.labeled_batch == load("demo").train.labeled_batch
    with pytest.raises(InputError, match="cannot read"):
        load(file=str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not YAML"):
        load(file=str(tmp_path / "bad.yaml"))


def test_every_key_has_a_meaning_and_help_lists_it() -> None:
    text = help_text()
    for key, _, _, meaning in keys():
        assert meaning, key
        assert f"  {key}: " in text


def test_config_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        load("demo").train.steps = 3  # type: ignore[misc]
    assert isinstance(load("demo").updated(train={"steps": 3}), RunConfig)

"""Every recipe: it is checked without data, its model has the published size, its smoke variant trains."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ecocseg import checkpoint, cli, launch, loop
from ecocseg.config import RunConfig, load, recipe_names
from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.sources import toy
from ecocseg.engine import World
from ecocseg.errors import InputError
from ecocseg.smoke import SMALL, smoke

PUBLISHED_MILLIONS = {
    ("mit_b5", "daformer", 19): 85.16,
    ("resnet101s", "deeplabv3plus", 21): 59.5, ("resnet50s", "deeplabv3plus", 21): 40.5,
    ("xception65", "deeplabv3plus", 81): 54.7,
    ("vit_small_patch14_dinov2.lvd142m", "dpt", 21): 24.8, ("vit_base_patch14_dinov2.lvd142m", "dpt", 21): 97.5,
    ("resnet50s", "pspnet", 2): 46.7, ("unet", "unet", 4): 1.8,
}
"""(encoder, head, one-hot outputs): million parameters, where the paper or the method's own gives them."""


@functools.cache
def checked(model: str, coding: str, classes: str) -> str:
    """The dry run's lines on classes, coding and model, given their configurations as JSON: many recipes share them."""
    config = load("demo").updated(model=json.loads(model), coding=json.loads(coding))
    lines = cli.task_lines(config, CLASS_LISTS[classes], forward=False)
    return "\n".join(line for line in lines if line.startswith(("classes", "coding", "model")))


@functools.cache
def one_hot_millions(model: str, outputs: int) -> float:
    """Million parameters of a model, given its configuration as JSON: many recipes share it."""
    config = load("demo").updated(model=json.loads(model)).model
    with torch.device("meta"):
        built = checkpoint.build_model(config, outputs, pretrained=False)
    return sum(parameter.numel() for parameter in built.parameters()) / 1e6


def task_text(config: RunConfig) -> str:
    plain = config.model_dump(mode="json")
    return checked(json.dumps(plain["model"]), json.dumps(plain["coding"]), str(config.data.classes))


def unique_smoke_runs() -> list[str]:
    """One recipe of each kind that differs in more than sizes, URLs and texts."""
    first: dict[str, str] = {}
    configs = {name: load(name) for name in recipe_names()}
    for name, config in sorted(configs.items(), key=lambda item: CLASS_LISTS[str(item[1].data.classes)].num_classes):
        method, model = config.method, config.model
        if method.kind == "stpp":  # a chain of runs: see test_stpp.py
            continue
        encoder = next((small for start, small in SMALL.items() if model.encoder.startswith(start)), model.encoder)
        key = json.dumps([method.kind, model.head, encoder, config.data.sampling, config.optim.kind,
                          method.feature_distance > 0, method.masked_images,
                          method.dice])
        first.setdefault(key, name)
    return sorted(first.values())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_whole(name: str) -> None:
    config = load(name)
    text = task_text(config)
    millions = re.search(r"(\d+\.\d+) M parameters", text)
    assert millions is not None and float(millions[1]) > 0.5
    assert config.description and config.data.labeled and config.data.eval
    assert config.coding.kind == "ecoc"
    if config.published is not None:
        assert config.coding.codebook.kind == "text"
    outputs = CLASS_LISTS[str(config.data.classes)].num_classes
    published = PUBLISHED_MILLIONS.get((config.model.encoder, config.model.head, outputs))
    if published is not None:
        # sources give one decimal
        size = one_hot_millions(config.model.model_dump_json(), outputs)
        assert size == pytest.approx(published, rel=0.005, abs=0.05 if published < 10 else None)


def test_the_dry_run_says_what_was_checked() -> None:
    for name in ("demo", "unimatch_v2_voc_1464"):
        text = cli.dry_run_without_data(load(name))
        assert task_text(load(name)) in text and "images a step" in text


def smoke_runs() -> list[Any]:
    """Each with ECOC, and the first of a method with one-hot too; the others with one-hot are slow."""
    names, methods, found = unique_smoke_runs(), set(), []
    for name in names:
        kind = load(name).method.kind
        found += [(name, "ecoc"), pytest.param(name, "one_hot", marks=[pytest.mark.slow] if kind in methods else [])]
        methods.add(kind)
    return found


@pytest.mark.parametrize(("name", "coding"), smoke_runs())
def test_a_smoke_variant_trains(name: str, coding: str, tmp_path: Path) -> None:
    """Real steps of the recipe's method through the worker's loop, to its evaluation."""
    config = smoke(load(name), str(tmp_path / "toy")).updated(
        coding={"kind": coding}, engine={"kind": "torch", "threads": 1}, data={"loader": "torch"},
        tracking={"tensorboard": False}, run={"directory": str(tmp_path), "name": "run"})
    url = str(tmp_path / "run")
    launch.preflight(config, url)
    started = parameters(config)
    result = run(config, url)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [r["loss/labeled"] for r in records if "loss/labeled" in r]
    assert len(losses) == config.train.steps and all(0 < value < 1e3 for value in losses)
    (by_model,) = result["results"].values()
    assert 0 <= by_model["student"]["miou"] <= 1
    assert started == result["model"]


def run(config: RunConfig, url: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return loop.run_worker(config, url, World(), lambda message: False, launch.tracker_factory(config, url))


def parameters(config: RunConfig) -> str:
    """The model's line as the dry run has it: what is trained is what was checked."""
    text = cli.dry_run_without_data(config)
    size = re.search(r"model .* ([\d.]+ M parameters)", text)
    outputs = re.search(r"in (\d+) bits|one-hot, (\d+)", text)
    assert size is not None and outputs is not None
    return f"{config.model.encoder} + {config.model.head}, {size[1]}, {outputs[1] or outputs[2]} outputs"


def test_classes_must_be_those_of_the_recipe(tmp_path: Path) -> None:
    config = smoke(load("demo"), str(tmp_path))
    toy.prepare(str(tmp_path / "voc"), CLASS_LISTS["voc"])
    urls = {part: str(tmp_path / "voc" / part) for part in toy.PARTS}
    other = config.updated(data=urls | {"eval": {"target": urls["eval"]}})
    with pytest.raises(InputError, match="data.classes: the recipe is for 'demo' .11 classes."):
        launch.preflight(other, str(tmp_path / "run"))

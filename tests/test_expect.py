"""What recipes are said to take: passes as real steps make them, operations by hand, the table that lies beside the recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from ecocseg import cli, expect, loop
from ecocseg.config import load, recipe_names
from ecocseg.engine import World
from ecocseg.methods import METHODS
from ecocseg.models.segmenter import Segmenter


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"stpp"}))  # which is a chain of supervised runs
def test_passes_are_those_of_a_real_step(method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"model__dropout": 0.0} if method == "unimatch_v2" else {}
    config = tiny_config(tiny, tmp_path, method__kind=method, train__steps=1, train__labeled_batch=3,
                         train__unlabeled_batch=6, engine__kind="torch", optim__warmup_steps=0, **changes)
    seen = {True: 0, False: 0}
    encode = Segmenter.encode

    def counting(self: Segmenter, image: torch.Tensor) -> list[torch.Tensor]:
        seen[torch.is_grad_enabled()] += len(image) * (image.device.type != "meta")  # the estimate of memory looks there
        return encode(self, image)

    monkeypatch.setattr(loop.Session, "_evaluate", lambda self, record=True: {})
    monkeypatch.setattr(Segmenter, "encode", counting)
    loop.run_worker(config, str(tmp_path / "run"), World(), lambda message: False)
    assert (seen[True], seen[False]) == METHODS[method].images_per_step(3, 6 if config.needs_unlabeled else 0)


def test_operations_of_a_step_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("demo")
    monkeypatch.setattr(expect, "_forward_operations", expect._forward_operations.__wrapped__)  # leave nothing in its cache
    monkeypatch.setattr(expect.checkpoint, "build_model", lambda *_, **__: torch.nn.Conv2d(3, 7, 5, padding=2, bias=False))
    height, width = config.data.crop
    image = 2 * 7 * 3 * 5 * 5 * height * width  # a multiplication and an addition
    assert expect.step_operations(config) == image * (3 * (8 + 8) + 8)
    assert expect.step_operations(config.updated(method={"kind": "supervised"})) == image * 3 * 8


def test_the_frozen_encoder_of_the_feature_distance_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expect, "_forward_operations", lambda *_: 1.0)
    with_distance = load("daformer_gta2cityscapes")
    assert expect.step_operations(with_distance) == 3 * (2 + 2) + 2 + 2
    assert expect.step_operations(with_distance.updated(method={"feature_distance": 0.0})) == 3 * (2 + 2) + 2


def test_published_hours_are_near_the_estimates_of_their_recipes() -> None:
    """Of all GPUs together, within a third: DAFormer on one GPU, UniMatch at 513 on two."""
    hours = {name: takes["hours"] * takes["gpus"] for name, takes in expect.stored().items()}
    assert hours["daformer_gta2cityscapes"] == pytest.approx(13.7, rel=0.33)
    assert all(hours[f"unimatch_voc_{split}"] == pytest.approx(2 * 16.8, rel=0.33) for split in ("1_16", "1_8", "1_4"))


def test_the_list_says_which_cost_is_published_and_which_estimated() -> None:
    parts = re.split(r"\n(?=\w[^ ]*: )", cli.list_recipes())[1:]  # the first is a title
    blocks = {block.split(":")[0]: block for block in parts}
    assert sorted(blocks) == recipe_names()
    assert {name for name, block in blocks.items() if "  published  1" in block and " GB " in block} == {
        "daformer_gta2cityscapes", "unimatch_voc_1_16", "unimatch_voc_1_8", "unimatch_voc_1_4"}
    assert "13.7 h and 9.8 GB without ECOC, 16.2 h and 12.8 GB with, on one GPU" in blocks["daformer_gta2cityscapes"]
    assert all("  estimated  " in block for block in blocks.values()) and "of 3.3 TFLOP/s" in blocks["mic_gta2cityscapes"]


@pytest.mark.parametrize("name", ["demo", "unimatch_acdc_7", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "daformer_gta2cityscapes", "unimatch_levir_cd_5"))])
def test_the_table_is_that_of_the_recipes(name: str) -> None:
    stored = expect.stored()
    assert sorted(stored) == recipe_names()
    assert expect.expect(load(name)) == stored[name]

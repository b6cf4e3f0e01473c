"""What recipes are said to take: passes as real steps make them, operations by hand, the table that lies beside the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from ecocseg import expect, loop
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


def test_the_table_is_that_of_the_recipes() -> None:
    stored = expect.stored()
    assert sorted(stored) == recipe_names()
    for name in ("demo", "unimatch_acdc_7", "unimatch_levir_cd_5"):
        assert expect.expect(load(name)) == stored[name]

"""What a step is said to take: against the arithmetic of a model written out by hand, and against a real backward pass."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import nn

from ecocseg import batching, checkpoint, loop, memory
from ecocseg.config import RunConfig, load
from ecocseg.engine import World
from ecocseg.errors import InputError


def config(folder: Path, **changes: object) -> RunConfig:
    return tiny_config(folder / "data", folder, **changes)


def model_of(config: RunConfig) -> nn.Module:
    return checkpoint.build_model(config.model, 7, pretrained=False)


def test_saved_bytes_of_a_network_written_out_by_hand() -> None:
    """A convolution keeps its input, an in-place ReLU its result, a second convolution that same tensor."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    assert memory.saved_bytes(net, 2, (16, 24)) == 4 * 2 * 16 * 24 * (3 + 8)


def test_saved_bytes_are_those_of_a_real_forward_pass(tmp_path: Path) -> None:
    model = model_of(config(tmp_path)).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(2, 3, 64, 96))
    real = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    assert memory.saved_bytes(model.to("meta"), 2, (64, 96)) == pytest.approx(real, rel=0.02)


def test_what_is_kept_by_engine_optimiser_and_method(tmp_path: Path) -> None:
    plain = config(tmp_path)
    model = model_of(plain)
    weights = 4 * sum(p.numel() for p in model.parameters())
    whole = memory.estimate(plain, model, 1, 1)
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * weights, weights, 2 * weights)  # student and teacher
    assert whole.snapshot == 4 * weights and "checkpoint takes 0.0 GB of host memory" in whole.describe()
    assert next(model.parameters()).device.type == "cpu"
    alone = memory.estimate(config(tmp_path, method__kind="supervised", optim__kind="sgd"), model, 1, 1)
    assert (alone.weights, alone.optimizer, alone.snapshot) == (weights, weights, 2 * weights)
    sharded = memory.estimate(config(tmp_path, engine__kind="deepspeed", engine__zero_stage=1), model, 4, 1)
    assert sharded.optimizer == 3 * weights // 4
    halves = memory.estimate(plain, model, 1, 2)
    assert (whole.images, halves.images) == (4, 2) and halves.activations * 2 == pytest.approx(whole.activations, abs=4)
    narrow = memory.estimate(config(tmp_path, engine__precision="bf16"), model, 1, 1)
    assert narrow.activations < whole.activations


@pytest.mark.parametrize(("method", "images"), [
    ("supervised", 4), ("self_training", 4), ("fixmatch", 8), ("unimatch", 16), ("unimatch_v2", 8)])
def test_images_in_the_largest_graph(tmp_path: Path, method: str, images: int) -> None:
    changed = config(tmp_path, method__kind=method)
    assert memory.estimate(changed, model_of(changed), 1, 1).images == images


def test_a_step_that_does_not_fit_is_refused_with_numbers_and_remedies(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**6)
    plain = config(tmp_path)
    with pytest.raises(InputError, match=r"(?s)memory: .* of 4 image.*this device has 0.0 GB.*train.micro_batch=2.*data.crop"):
        memory.check(plain, model_of(plain), World(), 1)
    assert memory.check(config(tmp_path, launch__check_memory=False), model_of(plain), World(), 1) is not None
    text = memory.refusal(load("mic_gta2cityscapes"), memory.Estimate(1, 1, 1, 10**11, 2), 10**10, 1, 1)
    assert "activation_checkpointing=true" in text and "engine.precision=bf16" in text and "100.0 GB" in text


@pytest.mark.parametrize(("recipe", "changes", "workers", "offered"), [
    ("daformer_gta2cityscapes", [], 1, [1]), ("daformer_gta2cityscapes", [], 2, []),
    ("unimatch_v2_voc_92", [], 1, [8, 4, 2]),  # pairs of images stay together
    ("unimatch_v2_voc_92", [], 8, []),
    ("unimatch_coco_1_512", [], 8, []),  # one image on each GPU already
    ("unimatch_coco_1_512", [], 4, [1]),  # batch norm over all workers
    ("fixmatch_voc_1_16", [], 1, [4, 2]),  # an image's pooled value is normalised over a batch
    ("unimatch_voc_1_16", [], 1, [4, 2, 1]),  # no pass has fewer than two images
    ("stpp_voc_1_16", [], 1, [4, 2]), ("unimatch_voc_1_16", ["method.kind=supervised"], 1, [4, 2]),
    ("unimatch_voc_1_16", ["method.kind=unimatch_v2"], 1, [4, 2])])
def test_the_smaller_micro_batches_that_are_offered_are_accepted(recipe: str, changes: list[str], workers: int,
                                                                 offered: list[int]) -> None:
    """One after another, until none is left to offer."""
    plain, found = load(recipe, overrides=changes), []
    while len(found) < 9:
        number = batching.micro_batches(plain, workers)
        text = memory.refusal(plain, memory.Estimate(1, 1, 1, 10**11, 2), 10**10, workers, number)
        match = re.search(r"train.micro_batch=(\d+)", text)
        if match is None:
            break
        found.append(int(match[1]))
        plain = plain.updated(train={"micro_batch": found[-1]})
        assert batching.micro_batches(plain, workers) > number
    assert found == offered


def test_too_few_images_for_a_pooled_head_are_refused_before_the_first_step() -> None:
    plain = load("unimatch_voc_1_16", overrides=["method.kind=fixmatch", "engine.sync_batch_norm=false"])
    assert batching.micro_batches(plain, 4) == 1
    with pytest.raises(InputError, match="model.head: deeplabv3plus normalises .* 8 worker.s. share"):
        batching.micro_batches(plain, 8)
    with pytest.raises(InputError, match="train.micro_batch: 1 cannot be reached.*leaves model.head=deeplabv3plus two images"):
        batching.micro_batches(plain.updated(train={"micro_batch": 1}), 4)
    assert batching.micro_batches(plain.updated(engine={"sync_batch_norm": True}), 8) == 1


def test_a_model_that_cannot_be_estimated_is_said_to_be(tmp_path: Path, tiny: Path) -> None:
    def refusing(*_: object) -> None:
        raise NotImplementedError

    plain = tiny_config(tiny, tmp_path, launch__check_memory=True)
    model = model_of(plain)
    model.forward = refusing  # type: ignore[method-assign]
    assert memory.check(plain, model, World(), 1) is None
    session = loop.Session(plain, str(tmp_path / "run"), World(), lambda message: False)
    assert "memory about" in session.batch_line()
    session.memory = None
    assert "memory not estimated" in session.batch_line()
    session.close()


def test_a_weight_for_each_share_of_the_batch_is_said() -> None:
    recipe = load("daformer_gta2cityscapes")
    assert batching.batch_weight_line(recipe, 1) == "" != batching.batch_weight_line(recipe, 2)
    assert "each 1 image(s) taken at once, not for all 2" in batching.batch_weight_line(recipe, 2)
    assert batching.batch_weight_line(recipe.updated(method={"weighting": "image"}), 2) == ""


def test_the_learning_rate_follows_the_batch_by_the_rule(tmp_path: Path) -> None:
    recipe = load("daformer_gta2cityscapes")
    assert recipe.optim.lr_batch == recipe.train.labeled_batch == 2 and recipe.lr_factor == 1
    assert batching.lr_line(recipe) == "learning rate 6e-05"
    for rule, factor in (("fixed", 1.0), ("linear", 4.0), ("sqrt", 2.0)):
        changed = load("daformer_gta2cityscapes", overrides=["train.labeled_batch=8", f"optim.lr_rule={rule}"])
        said = batching.lr_line(changed)
        assert changed.lr_factor == factor and f"{6e-5 * factor:.3g}" in said
        assert "6e-05 for 2 labelled images a step, this run 8" in said and rule in said
    (tmp_path / "again.yaml").write_text(changed.to_yaml())
    assert load(file=str(tmp_path / "again.yaml")).lr_factor == 2  # a run's own configuration keeps the recipe's batch

"""Gradients and steps of every engine equal plain torch on the whole batch; optimiser state survives a change of workers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ecocseg.config import EngineConfig, OptimConfig
from ecocseg.engine import World, build_engine, schedule

OPTIM = OptimConfig(lr=0.05, warmup_steps=0, gradient_clipping=0.0)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 5, 1))


def make_batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 6, 6, generator=generator), torch.randn(4, 3, 6, 6, generator=generator))
            for _ in range(steps)]


def losses(forward: Any, first: Tensor, second: Tensor) -> list[Any]:
    """Two parts as in self-training: different images, different losses, one model."""
    return [lambda: forward(first).square().mean(), lambda: 0.3 * forward(second).sin().mean()]


def reference(steps: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The same steps in the most obvious torch: whole batch, losses summed, one backward call."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    gradients = []
    for first, second in make_batches(steps):
        optimizer.zero_grad()
        sum(part() for part in losses(model, first, second)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return gradients, {name: p.detach().clone() for name, p in model.named_parameters()}


def take_steps(engine: Any, world: World, batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    share = 4 // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    gradients = []
    for first, second in batches:
        parts = losses(engine, first[mine], second[mine])
        for number, part in enumerate(parts):
            engine.run_part(part, 1.0, last=number == len(parts) - 1)
        gradients.append(engine.gradients())
        engine.step()
    return gradients


def train(engine_config: EngineConfig, world: World, steps: int, start: Any = None) -> dict[str, Any]:
    """Train from scratch, or go on from `start`, up to `steps` steps."""
    model = make_model()
    if start is not None:
        model.load_state_dict(start["model"])
    groups = [{"params": list(model[0].parameters()), "weight_decay": 0.0},
              {"params": list(model[1:].parameters()), "weight_decay": 0.0}]
    engine = build_engine(model, groups, OPTIM, engine_config, world, 4 // world.size)
    if start is not None:
        engine.load_optimizer_state({  # as files are read: with keys in another order on each worker
            name: dict(sorted(state.items(), reverse=world.rank > 0)) for name, state in start["optimizer"].items()})
    first = 0 if start is None else start["step"]
    gradients = take_steps(engine, world, make_batches(steps)[first:])
    return {"gradients": gradients, "model": copy.deepcopy(model.state_dict()), "optimizer": engine.optimizer_state(),
            "step": steps}


def train_past_a_bad_step(engine_config: EngineConfig, world: World, bad: int | None) -> dict[str, Any]:
    """Three steps, of which the one at `bad` has a gradient on the last worker that is not a number; None: without it."""
    model = make_model()
    engine = build_engine(model, [{"params": list(model.parameters())}], OPTIM, engine_config, world, 4 // world.size, True)
    share, skipped = 4 // world.size, []
    for number, (first, second) in enumerate(make_batches(3)):
        if number == 1 and bad is None:
            continue
        mine = slice(world.rank * share, (world.rank + 1) * share)
        spoil = float("nan") if number == bad and world.rank == world.size - 1 else 1.0
        parts = losses(engine, first[mine], second[mine])
        engine.run_part(parts[0], 1.0, last=False)
        engine.run_part(lambda part=parts[1], spoil=spoil: part() * spoil, 1.0, last=True)
        engine.step()
        assert engine.skipped is not None
        skipped.append(float(engine.skipped))
    return {"model": copy.deepcopy(model.state_dict()), "optimizer": engine.optimizer_state(), "skipped": skipped}


def worker(rank: int, size: int, starts: dict[str, Any], path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.init", rank=rank, world_size=size)
    world, results = World(rank, size), {}
    for name, engine_config in ENGINES.items():
        if name in starts:
            results[name] = {"alone": train(engine_config, world, 4, start=starts[name])}
            continue
        half = train(engine_config, world, 2)
        results[name] = {"whole": train(engine_config, world, 4), "half": half,
                         "again": train(engine_config, world, 4, start=half),
                         "past": train_past_a_bad_step(engine_config, world, 1),
                         "without": train_past_a_bad_step(engine_config, world, None)}
    if rank == 0:
        torch.save(results, path)
    dist.barrier()
    dist.destroy_process_group()


def spawn(tmp_path: Any, size: int, starts: dict[str, Any]) -> dict[str, Any]:
    path = str(tmp_path / f"{size}.pt")
    mp.spawn(worker, args=(size, starts, path), nprocs=size)  # type: ignore[attr-defined]
    return torch.load(path, weights_only=True)


ENGINES = {"torch": EngineConfig(kind="torch")} | {
    f"zero{stage}": EngineConfig(kind="deepspeed", zero_stage=stage) for stage in (0, 1, 2)}


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: Any) -> dict[str, Any]:
    return spawn(tmp_path_factory.mktemp("two"), 2, {})


@pytest.fixture(scope="module")
def one_worker(two_workers: dict[str, Any], tmp_path_factory: Any) -> dict[str, Any]:
    return spawn(tmp_path_factory.mktemp("one"), 1, {name: got["half"] for name, got in two_workers.items()})


@pytest.mark.parametrize("name", ENGINES)
def test_two_workers_give_the_gradients_of_plain_torch(name: str, two_workers: dict[str, Any]) -> None:
    gradients, weights = reference(4)
    got = two_workers[name]["whole"]
    for want, have in zip(gradients, got["gradients"], strict=True):
        assert want.keys() == have.keys()
        for key in want:
            torch.testing.assert_close(have[key].reshape(want[key].shape), want[key], atol=1e-5, rtol=1e-5)
    for key in weights:
        torch.testing.assert_close(got["model"][key], weights[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_saved_state_goes_on_bit_for_bit_on_two_workers_and_closely_on_one(
        name: str, two_workers: dict[str, Any], one_worker: dict[str, Any]) -> None:
    whole, again, alone = two_workers[name]["whole"], two_workers[name]["again"], one_worker[name]["alone"]
    for key in whole["model"]:
        assert torch.equal(again["model"][key], whole["model"][key]), key
        torch.testing.assert_close(alone["model"][key], whole["model"][key], atol=1e-5, rtol=1e-5)
    assert whole["optimizer"].keys() == dict(make_model().named_parameters()).keys()
    for key, state in whole["optimizer"].items():
        for entry, value in state.items():
            assert torch.equal(again["optimizer"][key][entry], value), (key, entry)


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_that_is_bad_on_one_worker_is_left_out_on_all(name: str, two_workers: dict[str, Any]) -> None:
    past, without = two_workers[name]["past"], two_workers[name]["without"]
    assert past["skipped"] == [0, 1, 0] and without["skipped"] == [0, 0]
    assert all(torch.equal(past["model"][key], value) for key, value in without["model"].items())
    for key, state in without["optimizer"].items():
        assert all(torch.equal(past["optimizer"][key][entry], value) for entry, value in state.items()), key


def test_schedule_rises_then_falls_to_zero() -> None:
    optim = OptimConfig(warmup_steps=10, schedule="poly", power=1.0)
    factors = [schedule(optim, 100, step) for step in range(101)]
    assert factors[0] < 0.11 and abs(factors[9] - 0.91) < 1e-9 and factors[50] == 0.5 and factors[100] == 0.0
    assert max(factors) == factors[9] == 0.91

"""Between two log lines the host never waits for the device: traced on a CPU, and by torch's own check on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from host_syncs import HostSyncs

from ecocseg import loop
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.config import RunConfig
from ecocseg.data.pipeline import Batch
from ecocseg.engine import World
from ecocseg.target import Target

CASES: dict[str, dict[str, Any]] = {
    "supervised": {"method__kind": "supervised", "method__average": "valid", "method__ohem_threshold": 0.7,
                   "optim__gradient_clipping": 1.0},
    "self_training": {"optim__gradient_clipping": 1.0, "train__micro_batch": 1},
    "mic": {"method__kind": "mic", "method__masked_images": "source_and_target", "method__mask_block": 8},
    "hrda": {"model__head": "hrda", "model__encoder": "resnet18", "data__crop": [64, 64]},
    "fixmatch": {"method__kind": "fixmatch", "method__weighting": "by_coding"},
    "unimatch": {"method__kind": "unimatch", "method__weighting": "pixel", "method__dice": True},
    "unimatch_v2": {"method__kind": "unimatch_v2", "method__grey_probability": 0.5},
}


def as_kernel(function: Any, syncs: HostSyncs) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with syncs.paused():
            result = function(*args, **kwargs)
        syncs.of_device(vars(result) if isinstance(result, Target) else result)
        return result

    return call


@pytest.fixture
def host_syncs(monkeypatch: pytest.MonkeyPatch) -> HostSyncs:
    syncs = HostSyncs()
    for coding, name in product((EcocCoding, OneHotCoding), ("pseudo_label", "loss")):  # on a GPU kernels, with tests of theirs
        monkeypatch.setattr(coding, name, as_kernel(getattr(coding, name), syncs))
    move = Batch.to

    def moved(batch: Batch, device: torch.device) -> Batch:
        on_device = move(batch, device)
        syncs.of_device([on_device.image, on_device.labels, on_device.valid, on_device.changes, on_device.weight])
        return on_device

    monkeypatch.setattr(Batch, "to", moved)
    return syncs


def open_session(config: RunConfig, world: World) -> tuple[loop.Session, dict[str, Iterator[Any]]]:
    """A session that has taken a step: tables are made and copied once."""
    session = loop.Session(config, f"{config.run.directory}/run", world, lambda message: False)
    session.start(None)
    batches = {name: iter(stream) for name, stream in session.streams.items()}
    take_step(session, batches)
    return session, batches


def take_step(session: loop.Session, batches: dict[str, Iterator[Any]]) -> None:
    session._train_step(batches)
    session.step += 1


def small(case: str, coding: str, tiny: Path, tmp_path: Path, **changes: Any) -> RunConfig:
    return tiny_config(tiny, tmp_path, **{"coding__kind": coding, "train__panels_every": 0, "data__crop": [32, 64],
                                          "train__labeled_batch": 2, "train__unlabeled_batch": 2, **CASES[case], **changes})


def traced_steps(config: RunConfig, syncs: HostSyncs, steps: int = 1) -> list[str]:
    session, batches = open_session(config, World())
    models = [session.model] + ([session.teacher.module] if session.teacher else [])
    syncs.of_device([tensor for model in models for tensor in (*model.parameters(), *model.buffers())])
    with syncs:
        for _ in range(steps):
            take_step(session, batches)
    assert syncs.on_device(session.history[-1]["loss/labeled"])  # else nothing was followed
    session.close()
    return syncs.found


@pytest.mark.parametrize(("case", "coding"), [*((case, "ecoc") for case in CASES), ("self_training", "one_hot"),
                                              ("fixmatch", "one_hot")])
def test_a_step_never_waits_for_the_device(case: str, coding: str, tiny: Path, tmp_path: Path, host_syncs: HostSyncs) -> None:
    assert traced_steps(small(case, coding, tiny, tmp_path), host_syncs) == []


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DeepSpeed keeps the first group it meets."""
    folder = tmp_path_factory.mktemp("group")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.usefixtures("group_of_one")
def test_with_deepspeed_only_deepspeed_itself_waits(stage: int, tiny: Path, tmp_path: Path, host_syncs: HostSyncs) -> None:
    """`-s` shows where and how often in a step of two parts."""
    config = small("self_training", "ecoc", tiny, tmp_path, engine__kind="deepspeed", engine__zero_stage=stage,
                   train__micro_batch=None, optim__gradient_clipping=1.0)
    found = traced_steps(config, host_syncs)
    counts = Counter(line.split("site-packages/")[-1] for line in found)
    print(f"\nZeRO {stage}: {len(found)} waits a step", *(f"{number} x {line}" for line, number in counts.items()), sep="\n  ")
    assert all("/deepspeed/" in line for line in found)


def test_what_waits_is_found() -> None:
    weight, image = torch.rand(4), torch.rand(3, 4)
    syncs = HostSyncs([weight])
    with syncs:
        result = image * weight
        waits = [lambda: result.sum().item(), lambda: result.tolist(), lambda: result[result > 0.5],
                 lambda: result.nonzero(), lambda: float(result[0, 0]), lambda: bool((result > 0).any()),
                 lambda: result.cpu(), lambda: torch.tensor([1.0], device=result.device), lambda: image.to(result.device),
                 lambda: result.unique(), lambda: result.masked_select(result > 0.5)]
        for number, wait in enumerate(waits):
            before = len(syncs.found)
            wait()
            assert len(syncs.found) > before, number
        before = len(syncs.found)
        image.sum().item(), image.tolist(), image[image > 0.5], torch.where(result > 0.5, result, 0), result[:, [0, 1]]
        assert len(syncs.found) == before and "test_syncs.py" in syncs.found[0]


@pytest.mark.gpu
@pytest.mark.parametrize("coding", ["ecoc", "one_hot"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_never_waits_for_the_gpu(case: str, coding: str, tiny: Path, tmp_path: Path) -> None:
    config = small(case, coding, tiny, tmp_path, launch__gpu=True)
    session, batches = open_session(config, World(device=torch.device("cuda", 0)))
    take_step(session, batches)  # twice: the teacher's first update comes with the second step
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            take_step(session, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        session.close()

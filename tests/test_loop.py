"""The loop on one worker without Ray: exact resume, checkpoints that are whole or not there, and learning at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import damage_rows, tiny_config, write_tiny

from ecocseg import batching, checkpoint, launch, loop
from ecocseg.checkpoint import Checkpoints
from ecocseg.config import RunConfig, load
from ecocseg.data.classes import ClassList
from ecocseg.engine import World
from ecocseg.errors import InputError
from ecocseg.methods import SelfTraining
from ecocseg.storage import Storage


def train(config: RunConfig, stop_at: int | None = None) -> dict[str, Any]:
    """Run in this process; asked to stop after the record of a step, if given."""
    url = f"{config.run.directory}/{config.run.name}"

    def report(message: dict[str, Any]) -> bool:
        return stop_at is not None and message.get("step", -1) >= stop_at

    return loop.run_worker(config, url, World(), report, launch.tracker_factory(config, url))


def losses(run: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if "loss/labeled" in r]
    assert len(steps) == len(set(steps))  # a resumed curve has no step twice
    return {r["step"]: {k: v for k, v in r.items() if k.startswith(("loss", "terms", "pseudo", "gradient"))}
            for r in records if "loss/labeled" in r}


def newest(run: Path) -> checkpoint.Snapshot:
    found = Checkpoints(str(run), Storage()).newest()
    assert found is not None
    return found[0]


@pytest.mark.parametrize("changes", [
    {}, {"coding__kind": "one_hot", "engine__channels_last": True}, {"method__kind": "supervised"},
    {"optim__kind": "sgd", "train__micro_batch": 2},
    {"method__kind": "unimatch_v2", "method__average": "valid", "model__dropout": 0.0}])
def test_ten_steps_equal_five_a_new_start_and_five(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = tiny_config(tiny, tmp_path / "a", **changes)
    train(whole)
    halves = tiny_config(tiny, tmp_path / "b", **changes)
    with pytest.raises(loop.Stopped):
        train(halves, stop_at=5)
    train(halves)
    a, b = losses(tmp_path / "a/run"), losses(tmp_path / "b/run")
    assert list(a) == list(range(1, 11)) and a == b  # bit for bit
    first, second = newest(tmp_path / "a/run"), newest(tmp_path / "b/run")
    assert first.step == second.step == 10 and first.meta["teacher_updates"] == second.meta["teacher_updates"]
    for mine, theirs in ((first.student, second.student), (first.teacher or {}, second.teacher or {})):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert first.optimizer.keys() == second.optimizer.keys()


@pytest.mark.parametrize("mix_classes", ["batch", "image"])
def test_every_micro_batch_knows_the_classes_of_the_whole_batch(tiny: Path, tmp_path: Path, mix_classes: str,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both workers (the other one is made up here: it has class 77) and all micro-batches."""
    seen: list[Any] = []
    parts = SelfTraining.parts

    def noting(self: SelfTraining, given: Any) -> Any:
        seen.append((set(given.labeled.labels.unique().tolist()), given.mix_classes))
        return parts(self, given)

    def summed(self: World, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + (torch.arange(257) == 1 + 77) if tensor.shape == (257,) else tensor

    monkeypatch.setattr(SelfTraining, "parts", noting)
    monkeypatch.setattr(World, "sum", summed)
    train(tiny_config(tiny, tmp_path, train__micro_batch=1, train__steps=2, train__checkpoint_every=0, optim__warmup_steps=0,
                      method__mix_classes=mix_classes, data__crop=[16, 48], data__max_class_share=1.0))
    assert len(seen) == 8
    for step in (seen[:4], seen[4:]):
        if mix_classes == "image":
            assert all(given is None for _, given in step)
        else:
            union = set().union(*(own for own, _ in step))
            assert any(own != union for own, _ in step)
            assert all(set(given.nonzero().flatten().tolist()) == union | {77} for _, given in step)


def test_damaged_rows_are_listed_in_the_run_and_too_many_end_it(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data")
    damage_rows(str(data / "target"), {3: {"image": b"no image"}})
    config = tiny_config(data, tmp_path / "runs", data__damage_limit=0.05)
    train(config)
    (line,) = (tmp_path / "runs/run/damaged-unlabeled.tsv").read_text().splitlines()
    assert line.startswith("shard-00000.parquet\t3\t") and "target-103" in line
    with pytest.raises(InputError, match="(?s)1 damaged row.*damage_limit.*row 3: .*target-103"):
        train(tiny_config(data, tmp_path / "other"))
    (line,) = (tmp_path / "other/run/damaged-unlabeled.tsv").read_text().splitlines()
    assert line.startswith("shard-00000.parquet\t3\t") and "target-103" in line


def test_damage_met_before_a_restart_stays_in_the_list_and_counts(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data")
    damage_rows(str(data / "target"), {3: {"image": b"no image"}})
    listed = tmp_path / "runs/run/damaged-unlabeled.tsv"
    listed.parent.mkdir(parents=True)
    before = "shard-00000.parquet\t5\tmet before\n"
    listed.write_text(before + "shard-00009.parquet\t5\tof another set\n")
    train(tiny_config(data, tmp_path / "runs", data__damage_limit=0.1))
    first, second = listed.read_text().splitlines(keepends=True)
    assert "target-103" in first and second == before
    other = tmp_path / "other/run/damaged-unlabeled.tsv"
    other.parent.mkdir(parents=True)
    other.write_text(before)
    with pytest.raises(InputError, match="(?s)2 damaged row.*row 3: .*row 5: met before"):
        train(tiny_config(data, tmp_path / "other", data__damage_limit=0.05))


def test_bf16_trains_evaluates_and_is_near_fp32(tiny: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        config = tiny_config(tiny, tmp_path / precision, train__steps=3, train__panels_every=3,
                             engine__precision=precision)
        assert 0 <= train(config)["results"]["val"]["student"]["miou"] <= 1
        found[precision] = [step["loss/labeled"] for step in losses(tmp_path / precision / "run").values()]
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.05)
    assert all(value.dtype == torch.float32 for value in newest(tmp_path / "bf16/run").student.values()
               if value.is_floating_point())


@pytest.mark.parametrize("kind", ["unimatch_v2", "self_training"])
def test_the_last_student_is_in_the_teacher_that_is_saved_of_unimatch_v2_alone(tiny: Path, tmp_path: Path, kind: str) -> None:
    """With a decay of 0 the teacher is the student it last saw."""
    train(tiny_config(tiny, tmp_path, method__kind=kind, method__ema_decay=0.0, train__steps=3, train__checkpoint_every=0,
                      optim__warmup_steps=0, model__dropout=0.0))
    saved = newest(tmp_path / "run")
    assert saved.meta["teacher_updates"] == (3 if kind == "unimatch_v2" else 2)
    same = [torch.equal(saved.student[key], value) for key, value in (saved.teacher or {}).items()]
    assert all(same) == (kind == "unimatch_v2")


def test_seeds_differ_and_repeat(tiny: Path, tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_config(tiny, tmp_path / name, train__seed=seed, train__steps=4))
        runs[name] = losses(tmp_path / name / "run")
    assert runs["a"] == runs["b"] != runs["c"]


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, tmp_path, train__keep_checkpoints=2)
    train(config)
    folder = tmp_path / "run/checkpoints"
    data = bytearray((folder / "step_00000010/student.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "step_00000010/student.safetensors").write_bytes(bytes(data))
    found = Checkpoints(str(tmp_path / "run"), Storage()).newest()
    assert found is not None and found[0].step == 5
    assert "step_00000010" in found[1][0] and "student.safetensors" in found[1][0]


def test_half_written_checkpoint_does_not_count(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, tmp_path, train__keep_checkpoints=2)
    train(config)
    (tmp_path / "run/checkpoints/step_00000010/complete.json").unlink()
    assert newest(tmp_path / "run").step == 5


@pytest.mark.parametrize("checkpoint_every", [2, 0])
def test_best_and_last_are_kept(tiny: Path, tmp_path: Path, checkpoint_every: int) -> None:
    train(tiny_config(tiny, tmp_path, train__eval_every=2, train__checkpoint_every=checkpoint_every,
                      train__keep_checkpoints=1, optim__lr=0.02))
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    best = newest(tmp_path / "run").meta["best"]
    scores = {record["step"]: record["val/student/miou"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
              if "val/student/miou" in (record := json.loads(line))}
    assert list(scores) == [2, 4, 6, 8, 10] and best["step"] == max(scores, key=lambda step: scores[step])
    assert names == sorted({"step_00000010", f"step_{best['step']:08d}"})


def test_checkpoint_of_another_codebook_or_class_list_is_refused(tiny: Path, tmp_path: Path) -> None:
    train(tiny_config(tiny, tmp_path, train__steps=4))
    with pytest.raises(InputError, match="another codebook"):
        train(tiny_config(tiny, tmp_path, coding__codebook={"kind": "max_min", "length": 7, "seed": 5}))
    other = ClassList("other", ("earth", "block", "stripe", "sky"), ((0, 0, 0),) * 4)
    write_tiny(tmp_path / "data", other)
    with pytest.raises(InputError, match="trained on the classes of 'tiny'"):
        train(tiny_config(tmp_path / "data", tmp_path))


def test_loading_for_inference_gives_the_trained_model(tiny: Path, tmp_path: Path) -> None:
    final = train(tiny_config(tiny, tmp_path))
    from ecocseg.data.shards import iter_rows, read_manifest
    from ecocseg.evaluate import evaluate, samples_of_rows

    for which in ("student", "teacher"):
        loaded = checkpoint.load_for_inference(str(tmp_path / "run"), which)
        samples = samples_of_rows(iter_rows(read_manifest(str(tiny / "val"))))
        result = evaluate({"m": loaded.model}, loaded.coding, samples, loaded.spec, normalize=loaded.normalize, device="cpu")
        assert result["m"].to_dict() == final["results"]["val"][which]
    with pytest.raises(InputError, match="neither a checkpoint nor a run"):
        checkpoint.load_for_inference(str(tmp_path / "nothing"))


@pytest.mark.parametrize("kind", ["ecoc", pytest.param("one_hot", marks=pytest.mark.slow)])
def test_a_small_network_learns_the_tiny_scenes(tiny: Path, tmp_path: Path, kind: str) -> None:
    final = train(tiny_config(tiny, tmp_path, coding__kind=kind, train__steps=120, train__log_every=40, train__panels_every=0,
                              train__checkpoint_every=0, optim__lr=0.006, coding__temperature=0.1, coding__distance_weight=0.0,
                              coding__contrast_weight=1.0, method__mix_classes="image",
                              data__eval={"val": str(tiny / "source")}))
    # a constant prediction has less than 0.2; how far above it this ends depends on how a processor rounds (0.298 seen)
    assert final["results"]["val"]["student"]["miou"] > 0.25


def test_nan_loss_stops_the_run(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="optim.lr"):
        train(tiny_config(tiny, tmp_path, optim__lr=1e30, optim__kind="sgd", optim__warmup_steps=0))


def test_pictures_are_written(tiny: Path, tmp_path: Path) -> None:
    train(tiny_config(tiny, tmp_path, train__steps=5))
    assert list((tmp_path / "run/panels").rglob("*.png"))


@pytest.mark.parametrize(("changes", "workers", "want"), [
    ({}, 1, 1), ({"train__micro_batch": 1}, 1, 4), ({"train__micro_batch": 1}, 2, 2), ({"train__micro_batch": 3}, 1, 2)])
def test_micro_batches_follow_from_the_limit(tiny: Path, tmp_path: Path, changes: dict[str, Any], workers: int,
                                             want: int) -> None:
    assert batching.micro_batches(tiny_config(tiny, tmp_path, **changes), workers) == want


def test_workers_must_share_the_batch(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="launch.workers of 1, 2, 4"):
        batching.micro_batches(tiny_config(tiny, tmp_path), 3)


def test_resources_leave_ingest_its_share_or_are_refused(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, tmp_path, data__loader="ray", launch__workers=2)
    plan = launch.plan_resources(config, 2, 0)
    assert plan.workers * plan.cpus_per_worker + plan.ingest_cpus <= 2 and plan.cpus_per_worker > 0
    for changes, cpus, gpus, says in (
            ({"launch__workers": 4}, 2, 0, "cluster has 2"), ({"launch__gpu": True}, 2, 0, "no GPU"),
            ({"launch__workers": 4}, 64, 2, "cluster has 2"), ({"launch__cpus_per_worker": 2.0}, 2, 0, "exceed")):
        with pytest.raises(InputError, match=says):
            launch.plan_resources(tiny_config(tiny, tmp_path, data__loader="ray", **changes), cpus, gpus)
    assert launch.plan_resources(tiny_config(tiny, tmp_path, launch__workers=None), 64, 4).workers == 4


@pytest.mark.parametrize(("recipe", "gpus", "workers"), [
    ("daformer_gta2cityscapes", 8, 2), ("mic_gta2cityscapes", 3, 2), ("daformer_gta2cityscapes", 1, 1),
    ("unimatch_v2_ade20k_1_16", 8, 4), ("unimatch_voc_1_16", 6, 4), ("unimatch_acdc_1", 6, 6), ("unimatch_acdc_1", 8, 6),
    ("unimatch_v2_voc_92", 16, 8), ("unimatch_coco_1_512", 8, 8)])
def test_unless_told_otherwise_as_many_gpus_train_as_can_share_the_batch(recipe: str, gpus: int, workers: int) -> None:
    config = load(recipe)
    for plan in (launch.plan_resources(config, 200, gpus), launch.plan_on_nodes(config, [(200.0, gpus)])):
        assert (plan.workers, plan.idle_gpus) == (workers, gpus - workers)
        assert (f"{gpus - workers} more GPU(s) stay idle" in plan.describe()) == (gpus > workers)
    if gpus > workers:  # what was asked for is refused
        with pytest.raises(InputError, match=f"by {gpus} workers|{gpus} worker.s. get"):
            launch.plan_resources(config.updated(launch={"workers": gpus}), 200, gpus)

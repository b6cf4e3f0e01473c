"""Faults tried, each with what brings a run through it. Every test says which lines to take out to see it fail.

Fast ones run in this process. Those that need Ray, several processes or half a minute are marked slow. Elsewhere: a worker
killed (test_ray.py), SIGTERM (test_ray.py), a source that hangs (test_pipeline.py), requests that fail (test_bucket.py).
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from conftest import tiny_config, tiny_plain
from faulty_s3 import FaultyS3
from safetensors.torch import load, save
from torch import Tensor

from ecocseg import checkpoint, launch, loop, streams
from ecocseg.checkpoint import Checkpoints
from ecocseg.config import RunConfig
from ecocseg.data.pipeline import Stream
from ecocseg.data.reading import read_rows
from ecocseg.data.shards import read_manifest
from ecocseg.engine import World, build_engine
from ecocseg.errors import InputError, StorageUnavailable
from ecocseg.rank_times import RankTimes, slowest
from ecocseg.storage import Storage, join
from ecocseg.tensor_file import TensorFile
from ecocseg.tracking import parse_metrics

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"train__steps": 8, "train__checkpoint_every": 3, "train__panels_every": 0, "method__kind": "supervised",
         "data__eval": {}}
"""Checkpoints of steps 3, 6 and 8, of which the last two are kept."""


class Run:
    """A run in this process. `said` is what it told; `on` is called with its messages and may stop it."""

    def __init__(self, data: Path, folder: Path | str, **changes: Any) -> None:
        self.config: RunConfig = tiny_config(data, Path("runs"), **SHORT | changes).updated(run={"directory": str(folder)})
        self.url, self.said = join(str(folder), "run"), list[str]()

    def train(self, on: Callable[[dict[str, Any]], Any] = lambda message: None) -> dict[str, Any]:
        def report(message: dict[str, Any]) -> bool:
            self.said.append(str(message.get("text", "")))
            return bool(on(message))

        return loop.run_worker(self.config, self.url, World(), report, launch.tracker_factory(self.config, self.url))

    @property
    def storage(self) -> Storage:
        return checkpoint.build_storage(self.config)

    def records(self) -> list[dict[str, Any]]:
        return parse_metrics(self.storage.read_bytes(join(self.url, "metrics.jsonl")).decode())

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss/labeled"] for record in self.records() if "loss/labeled" in record}

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return [int(url[-8:]) for url in Checkpoints(self.url, self.storage).complete()]

    def snapshot(self, step: int) -> checkpoint.Snapshot:
        return checkpoint.read(Checkpoints(self.url, self.storage).url_of(step), self.storage)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with nothing going wrong, which waits for storage at each checkpoint."""
    run = Run(tiny, tmp_path_factory.mktemp("whole"), train__async_checkpoints=False, train__keep_checkpoints=9)
    run.train()
    assert run.saved() == [3, 6, 8] and list(run.losses()) == list(range(1, 9))
    return run


def same(one: checkpoint.Snapshot, other: checkpoint.Snapshot) -> bool:
    """Whether weights and optimiser are the same, bit for bit."""
    pairs = [(one.student, other.student), *((one.optimizer[name], other.optimizer[name]) for name in other.optimizer)]
    return one.optimizer.keys() == other.optimizer.keys() and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b) for a, b in pairs)


# Checkpoints written beside training


def test_the_file_put_together_piece_by_piece_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecocseg.tensor_file.PIECE_BYTES", 7)
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5), "n": torch.tensor(7), "none": torch.empty(0, 3),
               "half": torch.randn(7).half(), "flag": torch.ones(3, dtype=torch.bool), "brain": torch.randn(5).bfloat16()}
    file = TensorFile(tensors)
    content = file.read(0, len(file))
    assert content == b"".join(file.pieces()) == save(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in load(content).items())
    assert b"".join(file.read(first, 13) for first in range(0, len(file), 13)) == content


def held_back(monkeypatch: pytest.MonkeyPatch, step: int) -> threading.Event:
    """Writing the weights of a step's checkpoint waits until the event is set."""
    go, write = threading.Event(), Storage.write_bytes

    def slow(self: Storage, url: str, data: Any) -> None:
        if url.endswith(f"step_{step:08d}/student.safetensors"):
            assert go.wait(60), "training did not go on while its checkpoint was written"
        write(self, url, data)

    monkeypatch.setattr(Storage, "write_bytes", slow)
    return go


def test_training_goes_on_while_a_checkpoint_is_written_of_the_step_it_was_asked_at(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Run) -> None:
    """Fails with train.async_checkpoints=false, and without `copy=True` in `checkpoint.cpu_state`."""
    go, run = held_back(monkeypatch, 3), Run(tiny, tmp_path, train__keep_checkpoints=9)
    run.train(lambda message: go.set() if message["kind"] == "progress" and message["step"] == 5 else None)
    assert run.losses() == whole.losses() and run.saved() == [3, 6, 8]
    assert all(same(run.snapshot(step), whole.snapshot(step)) for step in (3, 6, 8))
    records = {record["step"]: record for record in run.records() if "loss/labeled" in record}
    assert {"time/checkpoint_wait", "time/checkpoint_copy"} <= records[4].keys() and "time/checkpoint_copy" not in records[5]
    assert records[7]["time/checkpoint_write"] > 0  # of step 3's, which step 6's had to wait for at the latest


def broken(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    """Writing the optimiser's state of a step's checkpoint fails."""
    write = Storage.write_bytes

    def fail(self: Storage, url: str, data: Any) -> None:
        if url.endswith(f"step_{step:08d}/optimizer.safetensors"):
            raise error
        write(self, url, data)

    monkeypatch.setattr(Storage, "write_bytes", fail)


@pytest.mark.parametrize("kind", [StorageUnavailable, InputError])
def test_what_went_wrong_with_a_checkpoint_ends_the_run_as_what_it_is(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Run, kind: type[Exception]) -> None:
    """Fails when `Session._note_saved` does not ask `Saver.written`, or that does not give the error on."""
    run = Run(tiny, tmp_path)
    with monkeypatch.context() as patch:
        broken(patch, 6, kind("no"))
        with pytest.raises(kind, match="^no$"):
            run.train()
    assert run.saved() == [3]
    run.train()
    assert "going on from step 3 on 1 worker(s)" in run.said and run.losses() == whole.losses()


def test_an_error_of_writing_is_told_when_the_run_ends_by_another(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails without `self._say` in `Session.close`."""
    broken(monkeypatch, 3, StorageUnavailable("the bucket is away"))

    def die(message: dict[str, Any]) -> None:
        if message.get("step") == 3:
            monkeypatch.setattr("ecocseg.loop.Session._note_saved", lambda *_, **__: None)
        if message.get("step") == 4:
            raise RuntimeError("another end")

    run = Run(tiny, tmp_path)
    with pytest.raises(RuntimeError, match="another end"):
        run.train(die)
    assert run.said[-1] == "the last checkpoint was not written: the bucket is away"


# Storage


def test_a_checkpoint_whose_writer_was_killed_is_passed_over(tiny: Path, tmp_path: Path, whole: Run) -> None:
    """SIGKILL in the middle of a file. Fails when `complete.json` is written first, or `Checkpoints.complete` does not ask
    for it; and, for the part of a file, without the `delete(folder)` in `Checkpoints._write`."""
    run = Run(tiny, tmp_path)

    class Cut(TensorFile):
        def pieces(self) -> Iterator[memoryview]:
            for piece in super().pieces():
                yield piece[:len(piece) // 2]
                os.write(end, b".")
                signal.pause()

    with pytest.raises(loop.Stopped):
        run.train(lambda message: message.get("step") == 3)
    start, end = os.pipe()
    child = os.fork()
    if child == 0:  # nothing but writing: threads of the parent are not here
        checkpoint.TensorFile = Cut  # type: ignore[misc]
        Checkpoints(run.url, Storage()).save(whole.snapshot(6))
        os._exit(1)
    assert os.read(start, 1) == b"."
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    folder = Path(run.url, "checkpoints/step_00000006")
    assert [path.suffix for path in folder.glob("student*")] == [".part"] and run.saved() == [3]
    run.train()
    assert "going on from step 3 on 1 worker(s)" in run.said
    assert [text for text in run.said if "step_00000006 is not complete; its writing was cut off" in text]
    assert run.losses() == whole.losses() and run.saved() == [6, 8] and not list(folder.glob("*.part"))


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tiny: Path, tmp_path: Path, whole: Run) -> None:
    """Fails without the comparison of checksums in `checkpoint._files`, or with train.keep_checkpoints=1."""
    run = Run(tiny, tmp_path)
    run.train()
    path = Path(run.url, "checkpoints/step_00000008/optimizer.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run.train()
    assert "going on from step 6 on 1 worker(s)" in run.said
    assert [text for text in run.said if text.startswith("passed over: ") and "step_00000008 is damaged" in text]
    assert run.losses() == whole.losses() and same(run.snapshot(8), whole.snapshot(8))


def test_a_full_disk_is_named_and_older_checkpoints_stay(tiny: Path, tmp_path: Path, whole: Run) -> None:
    """Files end at a size, as on a full disk. Fails without the deletion in `Checkpoints.save` (what was written of it stays),
    that in `storage._new_file` (a half file), or ENOSPC and its kin in `storage.reason` (the remedy)."""
    run, limits = Run(tiny, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(message: dict[str, Any]) -> None:
        if message["kind"] == "checkpoint":
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))

    try:
        with pytest.raises(InputError, match=rf"cannot write {run.url}/checkpoints/step_0000000\d/.*free some space.*--resume"):
            run.train(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.saved() == [3] and [path.name for path in Path(run.url, "checkpoints").iterdir()] == ["step_00000003"]
    run.train()
    assert run.losses() == whole.losses() and run.saved() == [6, 8]


def test_a_bucket_that_refuses_writes_for_a_while_is_waited_out(
        server: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, whole: Run) -> None:
    """Writes are refused from the first checkpoint on until the upload has been refused six times, with training going on.
    Fails without the loop in `S3.persist`."""
    monkeypatch.setattr("ecocseg.s3.FIRST_PAUSE", 0.02)
    with FaultyS3(server, share=0) as faulty:
        run = Run(tiny, "s3://bucket/test/runs")
        run.config = run.config.updated(storage={"endpoint": faulty.url})

        def refuse(message: dict[str, Any]) -> None:
            if message.get("step") == 2:
                faulty.refuse_writes = 6

        run.train(refuse)
        assert faulty.faults["slow_down"] == 6 and faulty.refuse_writes == 0
        assert run.losses() == whole.losses() and run.saved() == [6, 8]


@pytest.mark.slow
def test_a_bucket_that_refuses_writes_for_30_seconds_is_waited_out(server: str, tiny: Path, whole: Run) -> None:
    """The same in real time, with storage.* as it comes. Fails with storage.retries=0."""
    with FaultyS3(server, share=0) as faulty:
        run = Run(tiny, "s3://bucket/test/runs")
        run.config = run.config.updated(storage={"endpoint": faulty.url})
        over = threading.Timer(30, lambda: setattr(faulty, "refuse_writes", 0))

        def refuse(message: dict[str, Any]) -> None:
            if message.get("step") == 2:
                faulty.refuse_writes = float("inf")
                over.start()

        began = time.monotonic()
        run.train(refuse)
        print(f"{faulty.faults['slow_down']} writes refused; the run took {time.monotonic() - began:.0f} s")
        over.join()
        assert faulty.faults["slow_down"] >= 5 and run.losses() == whole.losses() and run.saved() == [6, 8]


@pytest.mark.slow
def test_a_command_on_a_full_disk_ends_with_code_2_and_goes_on_when_there_is_room(tiny: Path, tmp_path: Path) -> None:
    """A disk of 5 MB, of which a checkpoint takes 3.4. Fails when `InputError` is no end to retries in `worker_main`: the run
    would fail three times more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        plain = tiny_plain(tiny, disk, **SHORT | {"train__keep_checkpoints": 9})
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain))
        command = [sys.executable, str(ROOT / "jobs/train_uda.py"), "--config", str(tmp_path / "c.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        print(done.stderr)
        assert done.returncode == 2 and "No space left on device; free some space" in done.stderr, done
        assert f"{disk}/run/checkpoints/step_" in done.stderr and "going on from" not in done.stdout
        left = Checkpoints(str(disk / "run"), Storage()).complete()
        assert left and len(left) == len(list((disk / "run/checkpoints").iterdir())) < 3
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0 and f"going on from step {int(left[-1][-8:])}" in done.stdout, done
    finally:
        subprocess.run(["umount", str(disk)])


# Numbers that are not finite


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> Callable[[dict[str, Any]], None]:
    """The model sees NaN at some steps (counted from 1); give the function the run's messages. Log lines come every step."""
    now, build = {"step": 1}, checkpoint.build_model

    def spoil(model: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0] * float("nan"), *given[1:]) if model.training and now["step"] in steps else given

    def build_poisoned(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        model.register_forward_pre_hook(spoil)
        return model

    def count(message: dict[str, Any]) -> None:
        if message["kind"] == "progress":
            now["step"] = message["step"] + 1

    monkeypatch.setattr(checkpoint, "build_model", build_poisoned)
    return count


@pytest.mark.parametrize("kind", ["supervised", "self_training"])
def test_a_bad_step_is_left_out_and_changes_nothing(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Fails without `skipped` in `Engine.step` (weights), or `buffers.put_back` in the loop (batch norm's statistics)."""
    run = Run(tiny, tmp_path, train__on_nan="skip", train__checkpoint_every=1, train__keep_checkpoints=9, method__kind=kind)
    run.train(poisoned(monkeypatch, {4}))
    before, after = run.snapshot(3), run.snapshot(4)
    counts = {name for name in before.student if name.endswith("num_batches_tracked")}
    assert same(*(checkpoint.Snapshot(0, {k: v for k, v in s.student.items() if k not in counts}, None, s.optimizer, {})
                  for s in (before, after)))
    records = {record["step"]: record for record in run.records() if "loss/labeled" in record}
    assert list(records) == list(range(1, 9)) and records[4]["loss/labeled"] is None
    assert {step: record["skipped_steps"] for step, record in records.items()} == {s: float(s == 4) for s in range(1, 9)}
    assert all(records[step]["loss/labeled"] is not None for step in records if step != 4)
    assert "1 of 1 steps up to step 4 left out: their gradient was not finite" in run.said


def test_too_many_bad_steps_in_a_row_end_the_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails without the `raise` in `SkipCount.update`: the run would go on for ever without learning."""
    run = Run(tiny, tmp_path, train__on_nan="skip", train__max_skipped=3)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 6.*checkpoint is of step 3, from before"):
        run.train(poisoned(monkeypatch, {2, 4, 5, 6, 7}))
    assert run.saved() == [3]


def test_a_bad_loss_ends_the_run_and_says_where(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails without `Session._check_finite`."""
    run = Run(tiny, tmp_path)
    with pytest.raises(FloatingPointError, match=r"loss was not finite at step 5 \(of steps 5 to 5\).*of step 3, from b"):
        run.train(poisoned(monkeypatch, {5}))
    assert run.saved() == [3]


def test_weights_that_are_not_finite_are_never_saved(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 6 comes before the log line that would tell. Fails without `check_snapshot` in `Saver._write`."""
    run = Run(tiny, tmp_path, train__log_every=8)
    train_step = loop.Session._train_step

    def spoil(session: loop.Session, batches: Any) -> None:
        train_step(session, batches)
        if session.step == 4:
            next(iter(session.model.parameters())).data[0] = float("inf")

    monkeypatch.setattr(loop.Session, "_train_step", spoil)
    with pytest.raises(FloatingPointError, match="weight '.*' is not finite at step 6, which is not saved.*of step 3, from b"):
        run.train()
    assert run.saved() == [3]


def test_the_fused_optimiser_leaves_a_step_out_without_asking_the_host() -> None:
    """What a GPU does, here on the CPU. Fails without `found_inf` in `Engine.step`, or without moving step counters to where
    the fused form wants them in `load_optimizer_state`."""
    from ecocseg.config import EngineConfig, OptimConfig

    def engine() -> Any:
        torch.manual_seed(0)
        model, optim = torch.nn.Linear(3, 2), OptimConfig(lr=0.1, warmup_steps=0)
        built = build_engine(model, [{"params": list(model.parameters())}], optim, EngineConfig(kind="torch"), World(), 1, True)
        built.optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        return built

    def step(engine: Any, factor: float) -> float:
        engine.run_part(lambda: engine(torch.ones(1, 3)).square().sum() * factor, 1.0, True)
        engine.step()
        return float(engine.skipped)

    whole, spoilt = engine(), engine()
    assert [step(whole, factor) for factor in (1.0, 2.0)] == [0, 0]
    assert [step(spoilt, factor) for factor in (1.0, float("nan"))] == [0, 1]
    spoilt.load_optimizer_state(spoilt.optimizer_state())
    assert [step(spoilt, factor) for factor in (float("inf"), 2.0)] == [1, 0]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), spoilt.model.parameters(), strict=True))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(
        whole.optimizer_state().values(), spoilt.optimizer_state().values(), strict=True) for key in a)


# A worker slower than the others


def test_own_seconds_leave_out_what_comes_after_the_last_forward_pass() -> None:
    now = [0.0]

    def part(seconds: float) -> Tensor:
        now[0] += seconds
        return torch.zeros(())

    times = RankTimes(torch.device("cpu"), lambda: now[0])
    times.add(2.0)
    times.begin()
    part(3.0)
    times.ending(lambda: part(4.0))()
    part(100.0)  # the backward pass, in which the others are waited for
    assert times.take() == 9.0 and times.take() == 0.0
    assert slowest([1.0, 4.0, 1.0]) == {"time/slowest_rank": 1.0, "time/slowest_over_mean": 2.0}


def slow_worker(rank: int, data: str, folder: str) -> None:
    """One of two workers; the second waits a second for each of its batches when the folder's name says so."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.init", rank=rank, world_size=2)
    run = Run(Path(data), folder, train__steps=4, train__log_every=2, train__checkpoint_every=0)
    take = Stream.__next__

    def late(stream: Stream) -> Any:
        time.sleep(1.0 if rank == 1 and folder.endswith("slow") else 0.0)
        return take(stream)

    Stream.__next__ = late  # type: ignore[method-assign]
    tracker = launch.tracker_factory(run.config, run.url)
    loop.run_worker(run.config, run.url, World(rank, 2), lambda message: False, tracker)
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_slow_worker_is_named_and_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    """Fails without `rank_times.add` in the loop (it is not seen), or `time/slowest_rank` in the record."""
    runs = {}
    for name in ("even", "slow"):
        mp.spawn(slow_worker, args=(str(tiny), str(tmp_path / name)), nprocs=2)  # type: ignore[attr-defined]
        runs[name] = Run(tiny, tmp_path / name)
    assert runs["slow"].losses() == runs["even"].losses()
    for record in runs["slow"].records():
        if "loss/labeled" in record:
            assert record["time/slowest_rank"] == 1 and record["time/slowest_over_mean"] > 1.2


# Ray: what reads for a worker is lost


def ids(config: RunConfig, manifest: Any, steps: int, before: Callable[[int], None] = lambda step: None) -> list[list[str]]:
    """Image ids of a stream's first steps; a function is called before each."""
    with streams.open_stream(config, "unlabeled", manifest, World(), 0, 1) as stream:
        found = []
        for step in range(steps):
            before(step)
            found.append([image_id for batch in next(stream) for image_id in batch.image_ids])
        return found


@pytest.mark.parametrize("deaths", [{3, 9, 10, 17}, {5, 6, 7, 8, 9}])
def test_reading_begins_again_where_it_was(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: set[int]) -> None:
    """In place of Ray: answers that come when they are asked for, of which some say that the actor is lost. Fails without
    `_begin_again` in `RaySource`; four losses with nothing read in between are given on."""
    import ray
    from ray.exceptions import RayActorError

    manifest, storage, asked, killed = read_manifest(str(tiny / "target")), Storage(), [0], list[Any]()

    class Actor:
        def __getattr__(self, name: str) -> Any:  # .options(...), .execute, .remote(requests, num_bytes)
            return self if name in ("execute", "options") else object.__getattribute__(self, name)

        def __call__(self, **options: Any) -> Any:
            return self

        def remote(self, *given: Any) -> Any:
            return iter(given[0]) if isinstance(given[0], list) else Actor()

    def get(request: Any) -> Any:
        asked[0] += 1
        if asked[0] in deaths:
            raise RayActorError()
        return read_rows(request, manifest, storage, ("image_id", "image"))

    monkeypatch.setattr("ecocseg.data.reading.ITEM_USES", 16)  # many small reads
    monkeypatch.setattr(ray, "remote", lambda kind: Actor())
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))
    through_ray = tiny_config(tiny, tmp_path, data__loader="ray")
    if len(deaths) == 5:
        with pytest.raises(RayActorError):
            ids(through_ray, manifest, 80)
        return
    assert ids(through_ray, manifest, 80) == ids(tiny_config(tiny, tmp_path), manifest, 80)
    assert len(killed) == 4 and asked[0] > 17


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["actor", "tasks"])
def test_a_stream_goes_on_when_what_reads_for_it_is_killed(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """SIGKILL of the ingest actor, with all that it has read and not given on in the object store (its objects die with their
    owner), or of the processes of its tasks. Fails without `_begin_again` in `RaySource`; tasks are Ray's own to repeat."""
    import ray

    monkeypatch.setattr("ecocseg.data.reading.ITEM_USES", 16)  # many small reads
    manifest = read_manifest(str(tiny / "target"))

    def kill() -> None:
        word = "Ingest" if lost == "actor" else "_read_block"
        for process in psutil.process_iter(["cmdline", "ppid"]):
            title = " ".join(process.info["cmdline"] or [])
            ours = any(parent.pid == os.getpid() for parent in process.parents())
            if ours and (word in title or (lost == "tasks" and title.startswith("ray::MapBatches"))):
                process.kill()
                killed.append(title)

    killed: list[str] = []
    want = ids(tiny_config(tiny, tmp_path), manifest, 40)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    try:
        config = tiny_config(tiny, tmp_path, data__loader="ray", data__prefetch_mb=1)
        assert ids(config, manifest, 40, lambda step: kill() if step in (8, 24) else None) == want
    finally:
        ray.shutdown()
    assert killed or lost == "tasks"  # a task may be between two reads

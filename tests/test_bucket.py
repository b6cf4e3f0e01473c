"""A bucket behind a network and a server that fail: what is read and written is the same, and a run goes on from it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import scene, tiny_config, tiny_plain
from faulty_s3 import FAULTS, FaultyS3

from ecocseg import launch, loop, streams
from ecocseg.checkpoint import Checkpoints, Snapshot
from ecocseg.data.shards import check_files, iter_rows, read_manifest
from ecocseg.engine import World
from ecocseg.errors import InputError, StorageUnavailable
from ecocseg.storage import Storage, join

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def new_tries_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecocseg.s3.FIRST_PAUSE", 0.01)


def patient(url: str) -> Storage:
    return Storage(endpoint=url, timeout=0.5, retries=12)


def impatient(url: str) -> Storage:
    return Storage(endpoint=url, timeout=0.3, retries=0)


@pytest.mark.parametrize("kind", FAULTS)
def test_files_are_the_same_whatever_goes_wrong(
        server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1000)
    monkeypatch.setattr("ecocseg.s3.PART_BYTES", 50_000)
    monkeypatch.setattr("ecocseg.s3.PIECE_BYTES", 70_000)
    sizes = (0, 10, 50_000, 130_001, 200_000)
    files = {f"{size}/x.bin": np.random.default_rng(size).bytes(size) for size in sizes}
    with FaultyS3(server, share=0.2, seed=3, kinds=(kind,)) as faulty:
        storage, root = patient(faulty.url), "s3://bucket/test/files"
        for name, data in files.items():
            storage.write_bytes(join(root, name), data)
        assert storage.list_files(root, recursive=True) == sorted(files)
        assert storage.list_dirs(root) == sorted(map(str, sizes))
        assert {name: storage.read_bytes(join(root, name)) for name in files} == files
        assert {name: storage.size(join(root, name)) for name in files} == {name: len(data) for name, data in files.items()}
        storage.download_dir(root, str(tmp_path / "back"))
        storage.upload_dir(str(tmp_path / "back"), "s3://bucket/test/again")
        storage.delete(root)
        assert storage.list_files(root, recursive=True) == [] and not storage.exists(root)
        assert faulty.faults[kind] >= 5 and set(faulty.faults) == {kind}
    clean = Storage(endpoint=f"http://{server}")
    assert {name: clean.read_bytes(f"s3://bucket/test/again/{name}") for name in files} == files


def test_shards_are_read_whole_each_row_once(server: str, tiny: Path) -> None:
    Storage(endpoint=f"http://{server}").upload_dir(str(tiny), "s3://bucket/test/tiny")
    rows: dict[str, list[Any]] = {}
    with FaultyS3(server, share=0.1, seed=1) as faulty:
        storage = patient(faulty.url)
        for _ in range(8):  # until every kind of fault has been met
            for name in ("source", "target", "val"):
                manifest = read_manifest(f"s3://bucket/test/tiny/{name}", storage)
                assert manifest.hash == read_manifest(str(tiny / name)).hash
                check_files(manifest, storage, checksums=True)
                rows[name] = [row for rank in range(2) for row in iter_rows(manifest, rank, 2, storage=storage)]
        assert set(faulty.faults) == set(FAULTS) and faulty.faults.total() < 0.2 * faulty.requests
    for name, found in rows.items():
        want = list(iter_rows(read_manifest(str(tiny / name))))
        assert sorted(found, key=lambda row: row["image_id"]) == sorted(want, key=lambda row: row["image_id"])


def test_streams_give_each_row_once_a_pass_in_the_same_order(server: str, tiny: Path, tmp_path: Path) -> None:
    Storage(endpoint=f"http://{server}").upload_dir(str(tiny), "s3://bucket/test/tiny")

    def ids(source: str, endpoint: str | None, world: int) -> list[list[str]]:
        """Image ids of six passes over the 24 target images, step by step."""
        config = tiny_config(tiny, tmp_path).updated(storage={"endpoint": endpoint, "timeout": 1.0})
        manifest = read_manifest(source, launch.checkpoint.build_storage(config))
        steps: list[list[str]] = [[] for _ in range(36)]
        for rank in range(world):
            with streams.open_stream(config, "unlabeled", manifest, World(rank, world, torch.device("cpu")), 0, 1) as stream:
                for step in steps:
                    step += [image_id for batch in next(stream) for image_id in batch.image_ids]
        return steps

    want = ids(str(tiny / "target"), None, 1)
    for first in range(0, 36, 6):
        assert len({image_id for step in want[first:first + 6] for image_id in step}) == 24
    with FaultyS3(server, share=0.2, seed=2) as faulty:
        assert ids("s3://bucket/test/tiny/target", faulty.url, 2) == want
        assert set(faulty.faults) == set(FAULTS)


def snapshot(step: int) -> Snapshot:
    weights = {"w": torch.full((20_000,), float(step))}
    return Snapshot(step, weights, None, {"w": {"m": weights["w"] / 2}}, {"best": {"step": -1}})


def test_a_half_written_checkpoint_is_never_taken_for_whole(server: str) -> None:
    """A save that fails somewhere leaves one of the two checkpoints, whole."""
    url, clean = "s3://bucket/test/run", Storage(endpoint=f"http://{server}")
    found, broken = set(), 0
    for seed in range(12):
        clean.delete(url)
        Checkpoints(url, clean).save(snapshot(1))
        with FaultyS3(server, share=0.3, seed=seed, kinds=("reset", "truncate")) as faulty:
            try:
                Checkpoints(url, impatient(faulty.url)).save(snapshot(2))
            except StorageUnavailable:
                broken += 1
        newest = Checkpoints(url, clean).newest()
        assert newest is not None and all("not complete" in text for text in newest[1])
        step = newest[0].step
        assert torch.equal(newest[0].student["w"], snapshot(step).student["w"])
        found.add(step)
    assert broken >= 4 and found == {1, 2}


def test_a_bucket_that_is_away_makes_no_checkpoint_damaged(server: str) -> None:
    url, clean = "s3://bucket/test/run", Storage(endpoint=f"http://{server}")
    Checkpoints(url, clean).save(snapshot(1))
    with FaultyS3(server, share=0) as faulty:
        away = Checkpoints(url, impatient(faulty.url))
        assert away.newest() is not None
        faulty.spoil_after = faulty.requests + 3  # in the middle of reading it
        with pytest.raises(StorageUnavailable, match="cannot read s3://bucket/test/run/checkpoints/"):
            away.newest()
        manifest_url = "s3://bucket/test/none"
        with pytest.raises(StorageUnavailable):
            read_manifest(manifest_url, impatient(faulty.url))
        with pytest.raises(InputError, match="does not answer"):  # before a run it is the user who has to look
            impatient(faulty.url).check(url)


def curve(run: str, storage: Storage) -> dict[int, dict[str, Any]]:
    """Logged losses by step; a step twice would be an error."""
    records = [json.loads(line) for line in storage.read_bytes(join(run, "metrics.jsonl")).splitlines()]
    losses = [(r["step"], {k: v for k, v in r.items() if k.startswith(("loss", "pseudo", "gradient"))})
              for r in records if "loss/labeled" in r]
    assert all(one[0] < other[0] for one, other in pairwise(losses))
    return dict(losses)


def test_a_run_in_the_bucket_goes_on_from_it_bit_for_bit(server: str, tiny: Path, tmp_path: Path) -> None:
    clean = Storage(endpoint=f"http://{server}")
    clean.upload_dir(str(tiny), "s3://bucket/test/tiny")
    small = {"train__steps": 6, "train__checkpoint_every": 2, "train__panels_every": 3, "train__keep_checkpoints": 2}

    said: list[str] = []

    def train(config: Any, stop_at: int = 99) -> None:
        def report(message: dict[str, Any]) -> bool:
            said.append(message.get("text", ""))
            return message.get("step", -1) >= stop_at

        url = join(config.run.directory, "run")
        loop.run_worker(config, url, World(), report, launch.tracker_factory(config, url))

    train(tiny_config(tiny, tmp_path, **small))
    plain = tiny_plain(tiny, tmp_path, **small)
    plain["data"] |= {"labeled": "s3://bucket/test/tiny/source", "unlabeled": "s3://bucket/test/tiny/target",
                      "eval": {"val": "s3://bucket/test/tiny/val"}}
    plain["run"] |= {"directory": "s3://bucket/test/runs"}
    with FaultyS3(server, seed=5) as faulty:
        plain["storage"] = {"endpoint": faulty.url, "timeout": 1.0}
        config = launch.RunConfig.model_validate(plain)
        with pytest.raises(loop.Stopped):
            train(config, stop_at=3)
        clean.delete("s3://bucket/test/runs/run/checkpoints/step_00000003/complete.json")  # as if killed before its end
        train(config)
        assert "going on from step 2 on 1 worker(s)" in said
        assert faulty.faults.total() >= 3
    assert curve("s3://bucket/test/runs/run", clean) == curve(str(tmp_path / "run"), Storage())
    assert Checkpoints("s3://bucket/test/runs/run", clean).complete()[-1].endswith("/step_00000006")
    mine, theirs = (Checkpoints(url, clean).newest() for url in ("s3://bucket/test/runs/run", str(tmp_path / "run")))
    assert mine is not None and theirs is not None
    assert all(torch.equal(mine[0].student[key], theirs[0].student[key]) for key in theirs[0].student)


# Whole, as a user does it: pack, train, kill, resume


def command(job: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "jobs" / job), *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output = process.communicate(timeout=900)[0]
    assert process.returncode == code, output
    return output


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 of a command and everything it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def wait_for(storage: Storage, url: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 900
    while not storage.exists(url):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.1)


def write_camvid(root: Path) -> Path:
    """A miniature CamVid: 40 training images by day, 40 by dusk, 6 of the test split by dusk."""
    for split, sequence, first, count, tint in (("train", "0006R0_f", 0, 40, 0), ("train", "0001TP_", 100, 40, 40),
                                                ("test", "0001TP_", 200, 6, 40)):
        for index in range(first, first + count):
            for folder, data in zip((split, f"{split}annot"), scene(index, tint), strict=True):
                (root / folder).mkdir(parents=True, exist_ok=True)
                (root / folder / f"{sequence}{index:06d}.png").write_bytes(data)
    return root


def digests(storage: Storage, url: str) -> dict[str, str]:
    return {name: hashlib.sha256(storage.read_bytes(join(url, name))).hexdigest()
            for name in storage.list_files(url, recursive=True)}


@pytest.mark.slow
def test_pack_train_kill_and_resume_through_a_faulty_network(server: str, tmp_path: Path) -> None:
    clean, bucket, local = Storage(endpoint=f"http://{server}"), "s3://bucket/test", tmp_path / "shards"
    root = write_camvid(tmp_path / "camvid")
    with FaultyS3(server, seed=7, stall_seconds=60) as faulty:
        for name, part in (("source", ["--splits", "train", "--sequences", "0006R0"]),
                           ("target", ["--splits", "train", "--sequences", "0001TP", "--unlabeled"]),
                           ("val", ["--splits", "test", "--sequences", "0001TP"])):
            options = [*part, "--row-group-rows", "4"]
            for out, endpoint in ((f"{bucket}/{name}", ["--endpoint", faulty.url]), (str(local / name), [])):
                finish(command("prepare_shards.py", "camvid", str(root), *options, "--out", out, *endpoint))
            assert digests(clean, f"{bucket}/{name}") == digests(clean, str(local / name))
            finish(command("prepare_shards.py", "check", f"{bucket}/{name}", "--all", "--endpoint", faulty.url))
        print("packed:", faulty.requests, "requests,", dict(faulty.faults))

        plain = tiny_plain(local, tmp_path / "runs", data__loader="ray", data__classes="camvid", engine__kind="deepspeed")
        (tmp_path / "local.yaml").write_text(yaml.safe_dump(plain))
        finish(command("train_uda.py", "--config", str(tmp_path / "local.yaml")))
        want = curve(str(tmp_path / "runs/run"), Storage())
        assert list(want) == list(range(1, 11))

        plain["data"] |= {"labeled": f"{bucket}/source", "unlabeled": f"{bucket}/target", "eval": {"val": f"{bucket}/val"}}
        plain["run"] |= {"directory": f"{bucket}/runs"}
        plain["storage"] = {"endpoint": faulty.url, "timeout": 3.0}
        (tmp_path / "bucket.yaml").write_text(yaml.safe_dump(plain))
        first = command("train_uda.py", "--config", str(tmp_path / "bucket.yaml"))
        wait_for(clean, f"{bucket}/runs/run/checkpoints/step_00000005/complete.json", first)
        kill_all(first)
        assert not clean.exists(f"{bucket}/runs/run/result.json")
        output = finish(command("train_uda.py", "--config", str(tmp_path / "bucket.yaml"), "--resume"))
        assert "going on from step 5" in output, output
        print("trained:", faulty.requests, "requests,", dict(faulty.faults))
        assert set(faulty.faults) == set(FAULTS)
    assert curve(f"{bucket}/runs/run", clean) == want
    assert json.loads(clean.read_bytes(f"{bucket}/runs/run/result.json"))["step"] == 10
    assert (json.loads(clean.read_bytes(f"{bucket}/runs/run/result.json"))["results"]
            == json.loads((tmp_path / "runs/run/result.json").read_text())["results"])


def trained_from_bucket(tiny: Path, folder: Path, clean: Storage, endpoint: str, **changes: Any) -> subprocess.Popen[str]:
    """A run of 100 steps with data and run in the bucket, past its first checkpoint at step 10; no request is tried again."""
    clean.upload_dir(str(tiny), "s3://bucket/test/tiny")
    plain = tiny_plain(tiny, folder, train__steps=100, train__checkpoint_every=10, **changes)
    plain["data"] |= {name: f"s3://bucket/test/tiny/{part}" for name, part in (("labeled", "source"), ("unlabeled", "target"))}
    plain["data"]["eval"] = {"val": "s3://bucket/test/tiny/val"}
    plain["run"] |= {"directory": "s3://bucket/test/runs"}
    plain["storage"] = {"endpoint": endpoint, "retries": 0}
    (folder / "c.yaml").write_text(yaml.safe_dump(plain))
    run = command("train_uda.py", "--config", str(folder / "c.yaml"))
    wait_for(clean, "s3://bucket/test/runs/run/checkpoints/step_00000010/complete.json", run)
    return run


@pytest.mark.slow
def test_an_outage_restarts_the_worker_from_its_checkpoint(server: str, tiny: Path, tmp_path: Path) -> None:
    clean = Storage(endpoint=f"http://{server}")
    with FaultyS3(server, share=0) as faulty:
        run = trained_from_bucket(tiny, tmp_path, clean, faulty.url)
        faulty.away = True
        while faulty.faults.total() == 0:
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.05)
        faulty.away = False
        output = finish(run)
    assert "going on from step" in output, output
    assert list(curve("s3://bucket/test/runs/run", clean)) == list(range(1, 101))


@pytest.mark.slow
def test_bad_input_in_a_worker_ends_the_run_at_once(server: str, tiny: Path, tmp_path: Path) -> None:
    clean = Storage(endpoint=f"http://{server}")
    run = trained_from_bucket(tiny, tmp_path, clean, f"http://{server}", train__eval_every=50)
    clean.delete("s3://bucket/test/tiny/val/shard-00000.parquet")
    output = finish(run, code=2)
    assert "shard s3://bucket/test/tiny/val/shard-00000.parquet cannot be read" in output, output
    assert "going on from step" not in output

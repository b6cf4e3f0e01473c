"""One driver a run: who lives keeps it, who is dead loses it, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ecocseg import owner
from ecocseg.errors import InputError
from ecocseg.owner import owned
from ecocseg.storage import Storage, join


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(owner, "STALE_SECONDS", 30.0)


@pytest.fixture(params=["local", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Storage]]:
    if request.param == "local":
        yield str(tmp_path / "run"), Storage()
        return
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
    yield "s3://runs/run", Storage(endpoint=endpoint)
    server.stop()


def never() -> None:
    raise AssertionError("the run was lost")


def quiet(text: str) -> None:
    pass


def test_a_second_driver_is_refused_while_the_first_lives_and_nothing_stays(place: tuple[str, Storage]) -> None:
    url, storage = place
    refused = pytest.raises(InputError, match=r"run.name: .* is being trained by process \d+ on ")
    with owned(url, storage, never, quiet), refused, owned(url, storage, never, quiet):
        pass
    assert not storage.exists(join(url, owner.FILE))
    with owned(url, storage, never, quiet):
        assert storage.exists(join(url, owner.FILE))
    with pytest.raises(RuntimeError, match="mine"), owned(url, storage, never, quiet):
        raise RuntimeError("mine")
    assert not storage.exists(join(url, owner.FILE))


def test_of_several_at_once_one_creates_a_file(place: tuple[str, Storage]) -> None:
    url, storage = place
    told: list[bool] = []
    threads = [threading.Thread(target=lambda i=i: told.append(storage.create(join(url, "x"), bytes([i])))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [False] * 7 + [True]


def claim_by(url: str, storage: Storage, **changes: Any) -> None:
    storage.write_bytes(join(url, owner.FILE), json.dumps({**owner.describe(), **changes}).encode())


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    claim_by(str(tmp_path), Storage(), pid=gone.pid)  # born as this process was, which that number is not
    with owned(str(tmp_path), Storage(), never, said.append):
        pass
    assert len(said) == 1 and f"taken over from process {gone.pid} on" in said[0]


def test_silence_from_another_machine_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(owner, "STALE_SECONDS", 0.2)
    claim_by(str(tmp_path), Storage(), place="elsewhere", host="node7", job="SLURM job 12")
    with owned(str(tmp_path), Storage(), never, said.append):
        pass
    assert "owned by process" in said[0] and "on node7, SLURM job 12 since" in said[0] and "taken over" in said[1]


def test_a_file_cut_off_while_written_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "STALE_SECONDS", 0.2)
    (tmp_path / owner.FILE).write_bytes(b'{"id": "')
    with owned(str(tmp_path), Storage(), never, quiet):
        assert json.loads((tmp_path / owner.FILE).read_bytes())["pid"]


def test_an_owner_that_was_replaced_is_told_and_leaves_the_file_alone(tmp_path: Path) -> None:
    told = threading.Event()
    with owned(str(tmp_path), Storage(), told.set, quiet):
        claim_by(str(tmp_path), Storage(), id="other")
        assert told.wait(20)
    assert json.loads((tmp_path / owner.FILE).read_bytes())["id"] == "other"

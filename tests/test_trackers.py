"""MLflow and W&B with their own packages, offline: one run over a stop and a resume; and runs that outlive a dead tracker."""

from __future__ import annotations

import importlib.util
import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_config

from ecocseg import launch, loop, runfiles, trackers
from ecocseg.config import RunConfig, load
from ecocseg.engine import World
from ecocseg.errors import InputError
from ecocseg.storage import Storage
from ecocseg.tracking import Sink, read_metrics


def train(config: RunConfig, stop_at: int | None = None) -> list[str]:
    """Run in this process as `launch.train` does; asked to stop after a step, if given. Returns the messages."""
    url, said = f"{config.run.directory}/{config.run.name}", []
    launch.trackers.check(config)
    runfiles.write(config, url)

    def report(message: dict[str, Any]) -> bool:
        said.extend([message["text"]] if message["kind"] == "message" else [])
        return stop_at is not None and message.get("step", -1) >= stop_at

    loop.run_worker(config, url, World(), report, launch.tracker_factory(config, url))
    return said


def stop_and_resume(config: RunConfig) -> list[str]:
    with pytest.raises(loop.Stopped):
        train(config, stop_at=3)
    return train(config)


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in read_metrics(run) if name in record]


def test_mlflow_has_one_run_over_a_stop_and_a_resume(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, tmp_path, tracking__mlflow="local", tracking__project="p", train__steps=5,
                         train__checkpoint_every=2)
    said = stop_and_resume(config)
    assert not [text for text in said if "warning" in text]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("p")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss/mixed")] == curve(
        tmp_path / "run", "loss/mixed")
    assert run.data.metrics["val/student/miou"] == curve(tmp_path / "run", "val/student/miou")[-1][1]
    assert run.data.params["optim.lr"] == "0.002" and run.data.params["data.crop"] == "[32, 48]"
    facts = json.loads((tmp_path / "run/environment.json").read_text())
    assert run.data.tags["manifest.labeled"] == facts["manifests"]["labeled"]["hash"]
    assert run.data.tags["codebook"] == facts["codebook"] and run.data.tags["commit"].startswith(facts["commit"])
    stored = {path.path for folder in ("", "panels/training", "evaluation") for path in client.list_artifacts(
        run.info.run_id, folder or None)}
    assert {"config.yaml", "panels/training/step_00000005.png", "evaluation/val.csv"} <= stored
    table = Path(client.download_artifacts(run.info.run_id, "evaluation/val.csv", str(tmp_path))).read_text().splitlines()
    assert table[0] == "IoU [%],student,teacher" and [line.split(",")[0] for line in table[1:]] == [
        "ground", "block", "stripe", "sky", "miou", "accuracy", "ece"]


def wandb_records(path: Path) -> list[Any]:
    """What an offline W&B file holds: a header of 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, records, whole = path.read_bytes(), 7, [], b""
    while at + 7 < len(data):
        if (left := 32768 - at % 32768) < 7:  # too little room for another header
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def test_wandb_offline_has_one_id_over_a_stop_and_a_resume(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, tmp_path, tracking__wandb="offline", train__steps=5, train__checkpoint_every=2)
    said = stop_and_resume(config)
    assert not [text for text in said if "warning" in text]
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((tmp_path / "run/tracking.json").read_text())["wandb"]
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2  # before the stop, and after it
    logged: dict[int, float] = {}
    keys: set[str] = set()
    for record in [record for file in files for record in wandb_records(file)]:
        values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        keys |= values.keys()
        if "loss/mixed" in values:
            logged[values["_step"]] = values["loss/mixed"]
        if record.HasField("run"):
            settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert record.run.project == "ecocseg" and settings["train"]["steps"] == 5
            assert settings["facts"]["codebook"] == json.loads((tmp_path / "run/environment.json").read_text())["codebook"]
    assert sorted(logged.items()) == curve(tmp_path / "run", "loss/mixed")
    assert {"panels/training", "evaluation/val", "val/teacher/miou"} <= keys


def test_a_dead_server_is_warned_of_once_and_training_goes_on(tiny: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    said = train(tiny_config(tiny, tmp_path, tracking__mlflow=uri, train__steps=3))
    assert len([text for text in said if "warning: MLflow failed" in text]) == 1
    assert [step for step, _ in curve(tmp_path / "run", "loss/mixed")] == [1, 2, 3]


def test_a_sink_that_fails_for_a_while_gets_what_comes_later() -> None:
    class Shaky(Sink):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, step: int, scalars: Any) -> None:
            if step < 3:
                raise ConnectionError("away\nwith a traceback")
            self.steps.append(step)

    shaky, said = Shaky(), []
    sink = trackers.InBackground("Shaky", lambda: shaky, said.append)
    for step in range(5):
        sink.log(step, {"loss": 1.0})
    sink.close(True)
    assert shaky.steps == [3, 4]
    assert len(said) == 1 and "Shaky failed (ConnectionError: away)" in said[0]


def test_missing_packages_and_keys_are_named_before_anything_starts(tiny: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        launch.preflight(tiny_config(tiny, tmp_path, tracking__wandb="online"), str(tmp_path / "run"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    trackers.check(tiny_config(tiny, tmp_path, tracking__wandb="online"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for changes, extra in (({"tracking__wandb": "offline"}, r"ecocseg\[wandb\]"), ({"tracking__mlflow": "local"}, "alembic")):
        with pytest.raises(InputError, match=extra):
            launch.preflight(tiny_config(tiny, tmp_path, **changes), str(tmp_path / "run"))


@pytest.mark.parametrize(("changes", "says"), [
    ({"tracking__mlflow": "https://me:secret@host/"}, "MLFLOW_TRACKING_PASSWORD"),
    ({"tracking__mlflow": "sqlite:///mlflow.db"}, "sqlite:////"),
    ({"tracking__mlflow": "local", "run__directory": "s3://bucket/runs"}, "no local folder")])
def test_uris_that_cannot_serve_are_refused(tiny: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        tiny_config(tiny, tmp_path, **changes)
    assert "secret" not in str(error.value)


def test_only_rank_0_has_a_tracker(tiny: Path, tmp_path: Path) -> None:
    session = loop.Session(tiny_config(tiny, tmp_path), str(tmp_path / "run"), World(rank=1), lambda message: False)
    session.start(lambda step, console: pytest.fail("rank 1 made a tracker"))
    assert session.tracker is None
    session.close()


def test_a_run_is_run_again_from_its_folder(tiny: Path, tmp_path: Path) -> None:
    first = tiny_config(tiny, tmp_path, train__steps=4, coding__codebook={"kind": "random", "length": 9, "seed": 3})
    train(first)
    facts = runfiles.read(str(tmp_path / "run"), Storage())
    assert {"commit", "dirty", "command", "versions", "seed", "codebook", "manifests", "gpus", "starts"} <= facts.keys()
    assert facts["manifests"]["unlabeled"].keys() == {"url", "hash", "rows", "split"}
    again = load(file=str(tmp_path / "run/config.yaml"), overrides=["run.name=again"])
    train(again)
    same = [(r["step"], r["loss/labeled"], r["loss/mixed"]) for r in read_metrics(tmp_path / "run") if "loss/mixed" in r]
    assert len(same) == 4 and same == [
        (r["step"], r["loss/labeled"], r["loss/mixed"]) for r in read_metrics(tmp_path / "again") if "loss/mixed" in r]
    assert runfiles.read(str(tmp_path / "again"), Storage())["codebook"] == facts["codebook"]
    train(first)  # its last step is done: another start, not another run
    assert len(runfiles.read(str(tmp_path / "run"), Storage())["starts"]) == 2
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == first.model_dump(mode="json")

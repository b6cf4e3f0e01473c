"""MLflow and Weights & Biases, each an optional package, fed from rank 0 by a thread of its own.

A tracker is never worth a run: what it cannot take or send is warned of once, and training goes on. The ids of its runs are
kept in the run's folder, so that a resumed run goes on in the same ones.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import netrc
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ecocseg.config import RunConfig
from ecocseg.errors import InputError
from ecocseg.storage import Storage, join
from ecocseg.tracking import Sink

IDS = "tracking.json"
"""File in the run's folder with the ids of its runs elsewhere."""
WAITING = 1000
"""Calls that may wait for a slow server; more are dropped."""
CLOSE_SECONDS = 60.0
"""Seconds a run waits at its end for what is still to be sent."""
Warn = Callable[[str], None]


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run at its start."""

    name: str
    config: RunConfig
    tags: Mapping[str, str]
    """Commit, recipe, hashes of codebook and manifests."""
    directory: Path
    """Local folder for what is not sent at once."""
    url: str
    """The run's folder, maybe in a bucket, where its ids are kept."""
    storage: Storage

    @property
    def project(self) -> str:
        return self.config.tracking.project

    def known_id(self, kind: str) -> str | None:
        """The id of this run in a tracker, if an earlier start got one."""
        try:
            found = json.loads(self.storage.read_bytes(join(self.url, IDS))).get(kind)
        except FileNotFoundError:
            return None
        return None if found is None else str(found)

    def keep_id(self, kind: str, value: str) -> None:
        try:
            ids = json.loads(self.storage.read_bytes(join(self.url, IDS)))
        except FileNotFoundError:
            ids = {}
        self.storage.write_bytes(join(self.url, IDS), json.dumps({**ids, kind: value}, indent=1).encode())


def check(config: RunConfig) -> None:
    """See that the trackers a run asks for are there, before a worker is placed.

    Raises:
        InputError: naming the key and the package to install.
    """
    wanted = config.tracking
    uri = mlflow_uri(config)
    if uri is not None:
        is_database = urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql")
        _need("tracking.mlflow", "mlflow", ["mlflow", *(["sqlalchemy", "alembic"] if is_database else [])])
    if wanted.wandb is not None:
        _need("tracking.wandb", "wandb", ["wandb"])
    if wanted.wandb == "online" and not _has_wandb_key():
        raise InputError("tracking.wandb: online, and there is no key for its server; set WANDB_API_KEY, call `wandb login`, "
                         "or use tracking.wandb=offline")


def _need(key: str, extra: str, modules: Sequence[str]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{key}: {', '.join(missing)} is not installed; pip install 'ecocseg[{extra}]', or set {key}=null")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def mlflow_uri(config: RunConfig) -> str | None:
    """Where MLflow keeps the runs; `local` is a database in the folder of all runs."""
    uri = config.tracking.mlflow
    return f"sqlite:///{Path(config.run.directory).resolve()}/mlflow.db" if uri == "local" else uri


def sinks(info: RunInfo, warn: Warn) -> list[Sink]:
    """The trackers a run asks for; each starts with its first record."""
    uri = mlflow_uri(info.config)
    found: list[Sink] = [] if uri is None else [InBackground("MLflow", lambda: MlflowSink(uri, info), warn)]
    if info.config.tracking.wandb is not None:
        found.append(InBackground("Weights & Biases", lambda: WandbSink(info), warn))
    return found


class InBackground(Sink):
    """Makes a sink and calls it in a thread, in order: neither a slow server nor a dead one holds up the step.

    The first failure is warned of. Later calls are tried all the same, making the sink included: a server may come back.
    """

    def __init__(self, name: str, make: Callable[[], Sink], warn: Warn) -> None:
        self.name, self._make, self._warn = name, make, warn
        self._calls: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(WAITING)
        self._lost, self._warned = 0, False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"ecocseg-{name}")
        self._thread.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        kept = dict(scalars)
        self._put(lambda sink: sink.log(step, kept))

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        self._put(lambda sink: sink.image(step, name, picture_HWC))

    def table(self, step: int, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._put(lambda sink: sink.table(step, name, header, rows))

    def close(self, finished: bool) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for call in (lambda sink: sink.close(finished), None):
            try:
                self._calls.put(call, timeout=max(0.0, deadline - time.monotonic()))
            except queue.Full:
                self._lost += 1
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() or self._lost:
            self._warn_once("was too slow")

    def _put(self, call: Callable[[Sink], None]) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._lost += 1

    def _run(self) -> None:
        sink: Sink | None = None
        while (call := self._calls.get()) is not None:
            try:
                sink = self._make() if sink is None else sink
                call(sink)
            except BaseException as error:  # noqa: BLE001 - whatever a tracker raises, the run goes on
                self._lost += 1
                said = str(error).strip().splitlines()[:1]
                self._warn_once(f"failed ({': '.join([type(error).__name__, *said])[:300]})")

    def _warn_once(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"warning: {self.name} {what} and has not all records of this run; training goes on, and metrics.jsonl "
                       "in the run's folder has them")


class MlflowSink(Sink):
    """An MLflow run: config as params, tags, scalars, panels and tables. Values it has already are not sent again."""

    def __init__(self, uri: str, info: RunInfo) -> None:
        # by default a call is tried for minutes, and use of the library is reported to its makers
        for key, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
                           "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
            os.environ.setdefault(key, value)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        known = info.known_id("mlflow")
        self._sent: dict[str, int] | None = None if known is None else {}
        self._run_id = known or self._create(uri, info)
        if known is not None:
            self._client.update_run(known, status="RUNNING")

    def _create(self, uri: str, info: RunInfo) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(info.project)
        if experiment is None:
            beside = f"{Path(info.config.run.directory).resolve()}/mlruns" if info.config.tracking.mlflow == "local" else None
            identity = self._client.create_experiment(info.project, artifact_location=beside)
        else:
            identity = experiment.experiment_id
        run_id: str = self._client.create_run(identity, run_name=info.name, tags=dict(info.tags)).info.run_id
        info.keep_id("mlflow", run_id)
        params = [Param(key, str(value)[:500]) for key, value in flat(info.config.model_dump(mode="json")).items()]
        for first in range(0, len(params), 100):  # as many as a call may have
            self._client.log_batch(run_id, params=params[first:first + 100])
        self._client.log_text(run_id, info.config.to_yaml(), "config.yaml")
        return run_id

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        named = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in scalars.items()}
        metrics = [Metric(name, value, now, step) for name, value in named.items() if step > self._last(name)]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _last(self, name: str) -> int:
        """The last step an earlier start sent a value for: a resumed run does some steps again."""
        if self._sent is None:
            return -1
        if name not in self._sent:
            history = self._client.get_metric_history(self._run_id, name)
            self._sent[name] = max((point.step for point in history), default=-1)
        return self._sent[name]

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        self._client.log_image(self._run_id, picture_HWC, artifact_file=f"panels/{name}/step_{step:08d}.png")

    def table(self, step: int, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        self._client.log_text(self._run_id, text.getvalue(), f"{name}.csv")

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


class WandbSink(Sink):
    """A W&B run: config and tags as its config, scalars, panels and tables. Its server leaves out steps it has already."""

    def __init__(self, info: RunInfo) -> None:
        import wandb

        identity = info.known_id("wandb")
        if identity is None:
            identity = uuid.uuid4().hex[:8]
            info.keep_id("wandb", identity)
        group = info.name.rpartition("/")[0]  # runs of one command over seeds and variants, or of a sweep
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=info.project, id=identity, name=info.name, group=group or None, dir=str(info.directory),
            mode=info.config.tracking.wandb, resume="allow", tags=[info.config.recipe[:64]], reinit="create_new",
            config={**info.config.model_dump(mode="json"), "facts": dict(info.tags)},
            settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        self._run.log({f"panels/{name}": self._wandb.Image(picture_HWC)}, step=step)

    def table(self, step: int, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = self._wandb.Table(columns=list(header), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found

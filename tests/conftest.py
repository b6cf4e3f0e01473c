"""A tiny data set and recipe that every training test shares."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ecocseg import labelling  # noqa: E402
from ecocseg.config import RunConfig, validate  # noqa: E402
from ecocseg.data.classes import ClassList  # noqa: E402
from ecocseg.data.shards import SCHEMA, Record, read_manifest, write_shards  # noqa: E402
from ecocseg.storage import Storage  # noqa: E402

LONGEST = ("test_ray", "test_kernels", "test_toy", "test_ssl_methods", "test_stpp", "test_labelling", "test_pipeline",
           "test_sweep_runs", "test_loop")
"""Files begun first, so that with several processes none is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=place)


CLASSES = ClassList("tiny", ("ground", "block", "stripe", "sky"), ((90, 90, 90), (200, 60, 60), (60, 200, 60), (60, 60, 220)))


def load_job(name: str, folder: str = "jobs") -> ModuleType:
    """A script of jobs/, or another folder, as a module."""
    path = Path(__file__).resolve().parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scene(index: int, tint: int) -> tuple[bytes, bytes]:
    """A 48 x 64 picture of three things on a ground, and its mask; a small network learns it in seconds."""
    rng = np.random.default_rng([index, tint])
    mask = np.zeros((48, 64), np.uint8)
    mask[:int(rng.integers(10, 18))] = 3
    y, x = int(rng.integers(20, 34)), int(rng.integers(0, 40))
    mask[y:y + 12, x:x + 16] = 1
    mask[:, int(rng.integers(45, 60)):][:, :4] = 2
    colours = np.array(CLASSES.palette, np.int64)[mask]
    image = np.clip(colours + tint + rng.normal(0, 12, colours.shape), 0, 255).astype(np.uint8)
    picture, labels = io.BytesIO(), io.BytesIO()
    Image.fromarray(image).save(picture, "PNG")
    Image.fromarray(mask).save(labels, "PNG")
    return picture.getvalue(), labels.getvalue()


def write_tiny(root: Path, classes: ClassList = CLASSES) -> Path:
    """Shards `source` (labelled), `target` (unlabelled) and `val` (labelled target scenes) under a folder."""
    for name, first, count, tint, labeled in (("source", 0, 20, 0, True), ("target", 100, 24, 40, False),
                                              ("val", 200, 5, 40, True)):
        records = []
        for index in range(first, first + count):
            image, mask = scene(index, tint)
            records.append(Record(f"{name}-{index}", image, mask if labeled else None))
        write_shards(records, str(root / name), dataset=f"tiny/{name}", classes=classes, row_group_rows=4)
    return root


def damage_rows(url: str, changes: dict[int, dict[str, Any]]) -> None:
    """Change rows of a set of one shard as no packer would; checksums and manifest fit again."""
    manifest = read_manifest(url)
    (file,) = manifest.files
    rows = pq.read_table(f"{url}/{file.name}").to_pylist()
    for number, change in changes.items():
        rows[number].update(change)
    with pq.ParquetWriter(f"{url}/{file.name}", SCHEMA, write_page_checksum=True) as writer:
        for first, count in zip(np.cumsum((0, *file.row_groups)).tolist(), file.row_groups, strict=False):
            writer.write_table(pa.Table.from_pylist(rows[first:first + count], SCHEMA), row_group_size=count)
    data = Path(f"{url}/{file.name}").read_bytes()
    file = replace(file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    Path(f"{url}/manifest.json").write_bytes(replace(manifest, files=(file,)).to_json())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def tiny_plain(data: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """A configuration as plain data; `section__key=value` replaces a value."""
    plain: dict[str, Any] = {
        "recipe": "tiny", "description": "for tests",
        "data": {"labeled": str(data / "source"), "unlabeled": str(data / "target"), "eval": {"val": str(data / "val")},
                 "crop": [32, 48], "loader": "torch"},
        "model": {"encoder": "mobilenetv3_small_050", "head": "segformer", "channels": 16},
        "coding": {"kind": "ecoc", "codebook": {"kind": "max_min", "length": 7}},
        "method": {"kind": "self_training", "ema_decay": 0.9, "confidence_threshold": 0.6},
        "optim": {"lr": 0.002, "decoder_lr_factor": 1, "warmup_steps": 2},
        "train": {"steps": 10, "labeled_batch": 4, "unlabeled_batch": 4, "log_every": 1, "eval_every": 0,
                  "checkpoint_every": 5, "panels_every": 5},
        "engine": {"kind": "torch", "threads": 1}, "launch": {"workers": 1, "max_failures": 2},
        "tracking": {"tensorboard": False}, "run": {"directory": str(runs), "name": "run"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        plain[section][name] = value
    return plain


def tiny_config(data: Path, runs: Path, **changes: Any) -> RunConfig:
    return validate(tiny_plain(data, runs, **changes))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of several test processes on the same cores wait for one another, ten times as long as they work: what a test
    changes ends with it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def labelling_by_one_thread() -> Iterator[None]:
    """Labelling in this process takes every core for itself."""
    planned = labelling.plan_workers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "plan_workers", lambda *args, **kwargs: replace(planned(*args, **kwargs), threads=1))
        yield


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """Address of an S3 server."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def server(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of an S3 server with an empty bucket."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("s3", endpoint_url=f"http://{moto}", region_name="us-east-1")
    if any(bucket["Name"] == "bucket" for bucket in client.list_buckets()["Buckets"]):
        Storage(endpoint=f"http://{moto}").delete("s3://bucket/test")
    else:
        client.create_bucket(Bucket="bucket")
    return moto

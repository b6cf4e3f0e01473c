"""`jobs/benchmark.py ingest`: images a second into one worker, beside the limit and beside other loaders.

Every case decodes the same 512 x 512 JPEGs with the same code (`WeakTransform`: crop and flip), with the same number of
decoding threads or processes, into batches of the same size, and runs in a process of its own; the cases take turns. The
limit is a loop that decodes bytes lying in memory and does nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.pipeline import Stream
from ecocseg.data.shards import Record, read_manifest, write_shards
from ecocseg.data.transforms import WeakTransform
from ecocseg.errors import InputError
from ecocseg.storage import Storage, join

SIDE, CROP, BATCH = 512, (384, 384), 16
LOCAL = ("bare", "ray", "ray_tasks", "threads", "dataloader", "mosaicml", "webdataset")
NAMES = {"bare": "decode and crop alone (limit)", "ray": "ecocseg, data.loader=ray",
         "ray_tasks": "ecocseg, data.decode=ray", "threads": "ecocseg, data.loader=torch",
         "dataloader": "torch DataLoader, files", "mosaicml": "MosaicML Streaming", "webdataset": "WebDataset"}
PEERS = {"mosaicml": ("streaming", "mosaicml-streaming"), "webdataset": ("webdataset", "webdataset")}
"""Module and package of loaders that are no part of this project (extra `bench`)."""
TRANSFORM = WeakTransform(crop=CROP)


def photo(index: int) -> bytes:
    """A JPEG whose detail falls off as in photographs: noise of all scales, each half as strong as the next coarser."""
    rng = np.random.default_rng(index)
    total = np.full((SIDE, SIDE, 3), 128.0)
    for octave in range(2, 10):
        noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), np.uint8))
        total += (np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64) - 128) * 2.0 ** (1.5 - octave)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(total, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepare(root: Path, number: int, url: str, storage: Storage) -> float:
    """The same images as files, our shards, MosaicML's and WebDataset's, where missing. Returns the mean bytes of one."""
    files = root / "files"
    if len(list(files.glob("*.jpg"))) != number:
        files.mkdir(parents=True, exist_ok=True)
        for index in range(number):
            (files / f"{index:06d}.jpg").write_bytes(photo(index))
    images = [path.read_bytes() for path in sorted(files.glob("*.jpg"))]
    if not storage.exists(join(url, "manifest.json")):
        write_shards((Record(f"{i:06d}", data) for i, data in enumerate(images)), url, dataset="ingest",
                     classes=CLASS_LISTS["voc"], storage=storage)
    if has("streaming") and not (root / "mosaicml/index.json").exists():
        from streaming import MDSWriter

        with MDSWriter(out=str(root / "mosaicml"), columns={"image": "bytes"}, size_limit="64mb") as writer:
            for data in images:
                writer.write({"image": data})
    if has("webdataset") and not (root / "webdataset").exists():
        import webdataset

        (root / "webdataset").mkdir()
        with webdataset.ShardWriter(f"{root}/webdataset/%05d.tar", maxsize=64 << 20, verbose=0) as writer:
            for index, data in enumerate(images):
                writer.write({"__key__": f"{index:06d}", "jpg": data})
    return sum(map(len, images)) / number


def installed(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Loaders that can be measured here, and peers that are missing."""
    missing = [name for name in names if name in PEERS and not has(PEERS[name][0])]
    return [name for name in names if name not in missing], missing


def has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def decode(data: bytes, index: int) -> np.ndarray:
    return np.ascontiguousarray(TRANSFORM(data, None, np.random.default_rng(index)).image)


class Files(Dataset):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(decode(self.paths[index].read_bytes(), index))


def bare(root: Path, threads: int) -> Iterator[int]:
    """Every thread decodes batches of its own; none waits for another."""
    images = [path.read_bytes() for path in sorted((root / "files").glob("*.jpg"))]

    def work(number: int) -> int:
        batch = np.empty((BATCH, 3, *CROP), np.uint8)
        for i in range(BATCH):
            index = (number * BATCH + i) % len(images)
            batch[i] = TRANSFORM(images[index], None, np.random.default_rng(index)).image
        return BATCH

    with ThreadPoolExecutor(threads) as pool:
        under_way = deque(pool.submit(work, number) for number in range(2 * threads))
        for number in count(2 * threads):
            yield under_way.popleft().result()
            under_way.append(pool.submit(work, number))


def ours(loader: str, threads: int, url: str, storage: Storage) -> Iterator[int]:
    ray = loader.startswith("ray")
    if ray:
        from ecocseg.launch import start_ray

        start_ray()
    stream = Stream(read_manifest(url, storage), name="unlabeled", seed=0, global_batch=BATCH, transform=TRANSFORM,
                    loader="ray" if ray else "torch", decode="ray" if loader == "ray_tasks" else "beside",
                    decode_threads=threads, columns=("image_id", "image"), storage=storage)
    for (batch,) in stream:
        yield len(batch.image)


def endless(make: Callable[[], Any]) -> Iterator[int]:
    while True:
        for batch in make():
            yield len(batch)


def mosaicml(root: Path, workers: int) -> Iterator[int]:
    from streaming import StreamingDataset

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return torch.from_numpy(decode(super().__getitem__(index)["image"], index))

    data = Decoded(local=str(root / "mosaicml"), shuffle=True, batch_size=BATCH)
    return endless(lambda: DataLoader(data, batch_size=BATCH, num_workers=workers, drop_last=True))


def webdataset_batches(root: Path, workers: int) -> Iterator[int]:
    import webdataset

    urls = sorted(str(path) for path in (root / "webdataset").glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False,  # as many workers as shards may have none
                                 nodesplitter=webdataset.split_by_node).shuffle(256).map(
        lambda sample: torch.from_numpy(decode(sample["jpg"], 0)))
    return endless(lambda: DataLoader(data, batch_size=BATCH, num_workers=workers, drop_last=True))


def case(name: str, args: argparse.Namespace) -> float:
    """Images a second of one loader, over about `args.seconds` after a first pass's worth of warming up."""
    root, storage = Path(args.folder), Storage(endpoint=args.endpoint)
    make: dict[str, Callable[[], Iterator[int]]] = {
        "bare": lambda: bare(root, args.threads), "ray": lambda: ours("ray", args.threads, args.url, storage),
        "ray_tasks": lambda: ours("ray_tasks", args.threads, args.url, storage),
        "threads": lambda: ours("threads", args.threads, args.url, storage),
        "dataloader": lambda: endless(lambda: DataLoader(Files(root / "files"), batch_size=BATCH, shuffle=True, drop_last=True,
                                                         num_workers=args.threads, persistent_workers=False)),
        "mosaicml": lambda: mosaicml(root, args.threads), "webdataset": lambda: webdataset_batches(root, args.threads)}
    batches = make[name]()
    began = time.perf_counter()
    seen = 0
    while time.perf_counter() - began < args.seconds / 3 or seen < 8 * BATCH:
        seen += next(batches)
    seen, began = 0, time.perf_counter()
    while time.perf_counter() - began < args.seconds:
        seen += next(batches)
    return seen / (time.perf_counter() - began)


def ingest_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all loaders by turns and print the table."""
    folder = args.folder or str(Path(tempfile.gettempdir()) / "ecocseg-ingest")
    url, storage, server = args.url or join(folder, "shards"), Storage(endpoint=args.endpoint), None
    try:
        if args.s3:
            server, endpoint = s3_server()
            url, storage = "s3://ingest/shards", Storage(endpoint=endpoint)
            args.endpoint = endpoint
            make_bucket(endpoint)
        size = prepare(Path(folder), args.images, url, storage)
        names, missing = installed(LOCAL if not args.s3 else ("bare", "ray", "ray_tasks", "threads"))
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                found[name].append(_in_own_process(name, args, folder, url))
    finally:
        if server is not None:
            server.terminate()
    limit = statistics.median(found["bare"])
    print(f"{args.images} JPEGs of {SIDE} x {SIDE}, {size / 1024:.0f} KiB each, crop {CROP[0]}, {args.threads} decoding "
          f"thread(s) or process(es), {os.cpu_count()} cores, {'S3 server on this machine' if args.s3 else 'local disk'}")
    rows = []
    for name in names:
        rate = statistics.median(found[name])
        rows.append({"loader": name, "images_per_second": rate, "share_of_limit": rate / limit, "all": found[name]})
        print(f"{NAMES[name]:<32}{rate:>8.0f} images/s {100 * rate / limit:>6.0f} %   ({min(found[name]):.0f} to "
              f"{max(found[name]):.0f})")
    for name in missing:
        print(f"{NAMES[name]:<32} not installed, so not compared: pip install {PEERS[name][1]} (extra `bench`)")
    return rows


def _in_own_process(name: str, args: argparse.Namespace, folder: str, url: str) -> float:
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "ingest", "--case", name, "--folder", folder,
               "--url", url, "--threads", str(args.threads or 1), "--seconds", str(args.seconds)]
    command += ["--endpoint", args.endpoint] if args.endpoint else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def s3_server() -> tuple[subprocess.Popen[bytes], str]:
    """moto's S3 server (a development dependency) in a process of its own, and its URL."""
    if not has("moto"):
        raise InputError("--s3: needs moto's server; pip install 'moto[s3,server]'")
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update({"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"})
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"http://127.0.0.1:{port}"
        time.sleep(0.2)
    server.terminate()
    raise RuntimeError("moto's server did not start within 30 s")


def make_bucket(endpoint: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="ingest")

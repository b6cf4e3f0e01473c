"""What is needed to run a run again, written into its folder at each start, and told to trackers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ecocseg import checkpoint, streams
from ecocseg.config import RunConfig
from ecocseg.storage import Storage, join
from ecocseg.trackers import IDS

CONFIG, ENVIRONMENT, CODEBOOK = "config.yaml", "environment.json", "codebook.json"


def write(config: RunConfig, run_url: str) -> None:
    """Resolved config, codebook, and `environment.json`: versions, commit, command, hashes of data, splits and codebook.

    `starts` in it has an entry for each start, the first one first: a resumed run may be of another commit than it began with.
    """
    storage, manifests = checkpoint.build_storage(config), streams.load_manifests(config)
    earlier = read(run_url, storage).get("starts", [])
    if not checkpoint.Checkpoints(run_url, storage).complete():  # nothing to go on from: another run than the one that failed
        earlier = []
        storage.delete(join(run_url, IDS))
    book = checkpoint.build_codebook(config.coding, manifests["labeled"].classes)
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **source_state(), "command": sys.argv,
             "versions": checkpoint.versions(), "platform": platform.platform(), "cores": os.cpu_count(), "gpus": gpu_names()}
    facts = {**start, "seed": config.train.seed, "codebook": None if book is None else book.hash,
             "manifests": {name: {"url": m.url, "hash": m.hash, "rows": m.num_rows, "split": m.options.get("split")}
                           for name, m in manifests.items()},
             "starts": [*earlier, start]}
    storage.write_bytes(join(run_url, CONFIG), config.to_yaml().encode())
    storage.write_bytes(join(run_url, ENVIRONMENT), json.dumps(facts, indent=1).encode())
    if book is not None:
        storage.write_bytes(join(run_url, CODEBOOK), json.dumps(book.to_dict()).encode())


def read(run_url: str, storage: Storage) -> dict[str, Any]:
    """The `environment.json` of a run; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(join(run_url, ENVIRONMENT)))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def tags(facts: dict[str, Any], recipe: str) -> dict[str, str]:
    """What a tracker files a run under, from its `environment.json`."""
    found = {"recipe": recipe, "commit": str(facts.get("commit", "unknown")) + ("+changes" if facts.get("dirty") else ""),
             "codebook": facts.get("codebook") or "one-hot"}
    return found | {f"manifest.{name}": entry["hash"] for name, entry in facts.get("manifests", {}).items()}


def source_state() -> dict[str, Any]:
    """Commit of the source, and whether it has changes that are in none. ECOCSEG_COMMIT tells it where there is no
    repository, as in a container or a job's working directory."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("ECOCSEG_COMMIT", "unknown"), "dirty": None}


def gpu_names() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

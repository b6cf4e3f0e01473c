"""`train.profile` writes where a step goes, locally and in a bucket's place, and leaves the run as it is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from ecocseg import loop, profile
from ecocseg.config import RunConfig
from ecocseg.engine import World
from ecocseg.errors import InputError


def train(config: RunConfig) -> tuple[list[str], dict[int, float]]:
    """Messages, and labelled losses by step."""
    said: list[str] = []
    losses: dict[int, float] = {}

    def report(message: dict[str, Any]) -> bool:
        said.extend([message["text"]] if message["kind"] == "message" else [])
        losses.update({message["step"]: message["loss/labeled"]} if "loss/labeled" in message else {})
        return False

    loop.run_worker(config, f"{config.run.directory}/{config.run.name}", World(), report)
    return said, losses


def shares(table: str) -> dict[str, tuple[float, float]]:
    """Milliseconds and per cent of each range of a table."""
    lines = [line.rsplit(maxsplit=3) for line in table.split("\n\n")[0].splitlines()[1:-1]]
    return {name.strip(): (float(ms), float(share)) for name, ms, share, _ in lines}


def test_a_profile_names_every_part_of_a_step(tiny: Path, tmp_path: Path) -> None:
    plain = {"train__steps": 8, "train__panels_every": 0, "train__checkpoint_every": 0, "data__eval": {}}
    said, losses = train(tiny_config(tiny, tmp_path / "a", train__profile=2, **plain))
    folder = tmp_path / "a/run/profile"
    table = (folder / "table.txt").read_text()
    parts = shares(table)
    assert list(parts) == [*profile.RANGES, "other"]
    assert all(ms > 0 for name, (ms, _) in parts.items() if name != "other")
    assert abs(sum(share for _, share in parts.values()) - 100) < 1
    assert "of 2 step(s)" in table and "aten::" in table
    assert any(table.split("\n\n")[0] in text for text in said)
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {*profile.RANGES, profile.STEP} <= {event.get("name") for event in events}
    assert train(tiny_config(tiny, tmp_path / "b", **plain))[1] == losses
    assert not (tmp_path / "b/run/profile").exists()


def test_a_profile_that_cannot_begin_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train.profile: begins after 5 steps, and train.steps is 4; use 8 or more"):
        tiny_config(tiny, tmp_path, train__profile=3, train__steps=4)

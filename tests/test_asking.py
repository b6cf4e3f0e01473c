"""What is asked of a run reaches all workers at one step, soon, whatever the log interval."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_config

from ecocseg import asking, loop
from ecocseg.asking import Asking
from ecocseg.checkpoint import Checkpoints
from ecocseg.engine import World
from ecocseg.storage import Storage

STEPS, LOG_EVERY = 12, 5


def test_the_stronger_request_is_kept_until_it_is_agreed_on() -> None:
    asked = Asking(World(), lambda: "")
    assert asked.between() == "" and asked.now("") == ""
    for answer in ("save", "", "restart", "save"):
        asked.take(answer)
    assert asked.between() == "restart" and asked.between() == ""
    asked.take(True)
    assert asked.now("save") == "stop" and asked.between() == ""
    assert asked.now("save") == "save"


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for given_at in range(1, STEPS - 2):
        asked = Asking(World(rank, 2), lambda: "")
        agreed = []
        for step in range(1, STEPS + 1):
            if rank == 0 and step == given_at:
                asked.take("save")
            agreed.append(asked.now("") if step % LOG_EVERY == 0 else asked.between())
        Path(folder, f"{given_at}-{rank}").write_text(",".join(agreed))
    dist.destroy_process_group()


def test_two_workers_agree_once_at_one_step_within_two(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    for given_at in range(1, STEPS - 2):
        mine, theirs = ((tmp_path / f"{given_at}-{rank}").read_text().split(",") for rank in range(2))
        assert mine == theirs and mine.count("save") == 1
        assert given_at <= mine.index("save") + 1 <= given_at + 2


def test_a_run_stops_between_log_lines_and_has_saved(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "POLL_SECONDS", 0.01)
    config = tiny_config(tiny, tmp_path, train__steps=5000, train__log_every=5000, train__checkpoint_every=0)
    url = f"{tmp_path}/run"
    with pytest.raises(loop.Stopped, match="stopped at step"):
        loop.run_worker(config, url, World(), lambda message: message["kind"] == "poll")
    found = Checkpoints(url, Storage()).newest()
    assert found is not None and 0 < found[0].step < 5000

"""Room asked for on a cluster that grows."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from ecocseg import scale
from ecocseg.config import RunConfig, load
from ecocseg.errors import InputError


def config(*overrides: str) -> RunConfig:
    return load("daformer_gta2cityscapes", overrides=["launch.wait=60", *overrides])


def test_what_is_asked_for() -> None:
    worker = {"CPU": 4.0, "GPU": 1.0}
    assert scale.wanted(config("launch.workers=2", "launch.gpu=true")) == [worker] * 2 + [{"CPU": 1.0}]
    assert scale.wanted(config("launch.workers=[1,2]", "launch.gpu=true")).count(worker) == 2
    on_cpus = config("launch.workers=2", "launch.gpu=false", "launch.cpus_per_worker=3", "data.decode=ray",
                     "data.decode_threads=2")
    assert scale.wanted(on_cpus) == [{"CPU": 3.0}] * 2 + [{"CPU": 1.0}] * 9  # 2 workers x 2 streams x (2 + 1/4)


@pytest.mark.parametrize("given", ("launch.workers=2", "launch.gpu=true"))
def test_what_cannot_be_asked_for_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="launch.wait: .* give launch.workers, and launch.gpu=true"):
        scale.wait_for_room(config(given), print)


def test_this_machine_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not scale.wait_for_room(config("launch.workers=2", "launch.gpu=true"), print)


@pytest.mark.slow
def test_nodes_that_come_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without CPUs: no room within 3 s; then a node comes while a run waits, and is free for what follows."""
    monkeypatch.setattr(scale, "LOOK_SECONDS", 0.5)
    small: dict[str, Any] = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        told: list[str] = []
        ask = config("launch.workers=1", "launch.gpu=false", "launch.cpus_per_worker=2")
        assert not scale.wait_for_room(ask.updated(launch={"wait": 3.0}), told.append)
        assert told == [told[0]] and "3 CPUs asked for" in told[0] and "0 CPUs there" in told[0]
        found: list[bool] = []
        waiting = threading.Thread(target=lambda: found.append(scale.wait_for_room(ask, told.append)))
        waiting.start()
        cluster.add_node(num_cpus=3, object_store_memory=80_000_000)
        waiting.join(60)
        assert found == [True]
        end = time.monotonic() + 30
        while ray.available_resources().get("CPU", 0) < 3:  # what had been asked for is not held
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        ray.shutdown()
        cluster.shutdown()

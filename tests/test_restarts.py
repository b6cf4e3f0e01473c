"""What is decided about a run on a cluster, without one: sizes, room on nodes, paths, and whether to begin again."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from ecocseg import cluster, launch, loop, restarts
from ecocseg.engine import World
from ecocseg.errors import InputError, Restart
from ecocseg.resources import Resources, elastic_sizes, fits, plan_on_nodes
from ecocseg.watch import Board, Vigil


class Remote:
    """A board in this process, called as an actor is."""

    def __init__(self) -> None:
        self.board = Board()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.board, name)
        return type("Method", (), {"remote": staticmethod(method)})


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setattr(restarts.ray, "get", lambda value: value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield from fake_board(monkeypatch, server.getsockname()[1])


def fake_board(monkeypatch: pytest.MonkeyPatch, port: int) -> Iterator[Remote]:
    monkeypatch.setattr(restarts.ray, "nodes", lambda: [
        {"NodeID": "a", "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port},
        {"NodeID": "c", "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": 1},  # Ray has not noticed yet
        {"NodeID": "b", "Alive": False, "NodeManagerAddress": "10.0.0.2"}])
    yield Remote()


def raised(error: Exception) -> UserExceptionWithTraceback:
    return UserExceptionWithTraceback(error, f"Traceback\n{type(error).__name__}: {error}")


def died() -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


def group_error(**failures: Exception) -> WorkerGroupError:
    """As Ray's controller makes it of what it hears from its workers."""
    statuses = {int(rank[1:]): WorkerStatus(running=False, error=failure) for rank, failure in failures.items()}
    return WorkerGroupPollStatus(statuses).get_worker_group_error()


def attempt(board: Remote, step: int = 7, error: str = "", nodes: str = "aa", **more: Any) -> None:
    """What workers of an attempt tell: where they are, how far they came, what went wrong in worker 1."""
    for rank, node in enumerate(nodes):
        board.board.begin(rank, node)
    board.board.post({"kind": "progress", "step": step})
    if error:
        board.board.note({"rank": 1, "kind": "ValueError", "text": error, "step": step, **more})


def test_errors_of_ones_own_have_a_budget(board: Remote) -> None:
    policy = restarts.Retries(board, FailureConfig(max_failures=2, max_preemption_failures=0))
    for number in range(3):
        attempt(board, step=7 + number, error="bad")
        decision = policy.make_decision(group_error(r0=raised(RuntimeError("peer")), r1=raised(ValueError("bad"))))
        assert decision == (FailureDecision.RETRY if number < 2 else FailureDecision.RAISE)
    text = "worker 1: bad, after step 9 (number 3, and launch.max_failures is 2); go on with --resume"
    assert board.board.failure == {"kind": "lost", "text": text}
    assert "starting again" in board.board.take()[1]["text"]


def test_the_same_error_at_the_same_step_is_not_tried_a_third_time(board: Remote) -> None:
    policy = restarts.Retries(board, FailureConfig(max_failures=50))
    failures = group_error(r1=raised(ValueError("bad")))
    decisions = []
    for address in ("0x7f01", "0x7f02"):
        attempt(board, error=f"tensor at {address} is bad")
        decisions.append(policy.make_decision(failures))
    assert decisions == [FailureDecision.RETRY, FailureDecision.RAISE]
    assert board.board.failure is not None and board.board.failure["kind"] == "failed"
    assert "twice, at the same step" in board.board.failure["text"]


@pytest.mark.parametrize("second", [{"error": "worse"}, {"step": 8, "error": "bad"}, {"error": "bad", "passes": True}])
def test_another_error_another_step_or_one_that_passes_is_tried_again(board: Remote, second: dict[str, Any]) -> None:
    policy = restarts.Retries(board, FailureConfig(max_failures=50))
    for told in ({"error": "bad"} | {key: value for key, value in second.items() if key == "passes"}, second):
        attempt(board, **told)
        assert policy.make_decision(group_error(r1=raised(ValueError("bad")))) == FailureDecision.RETRY


def test_lost_nodes_have_a_budget_of_their_own(board: Remote) -> None:
    policy = restarts.Retries(board, FailureConfig(max_failures=0, max_preemption_failures=2))
    taken = PreemptionError(PreemptionInfo(None, {"b": [1]}), drain_timed_out=True)
    for error, nodes in ((group_error(r0=raised(RuntimeError("peer"))), "ac"), (taken, "ab")):
        attempt(board, nodes=nodes, error="connection lost")
        assert policy.make_decision(error) == FailureDecision.RETRY
    attempt(board, nodes="ab")
    assert policy.make_decision(group_error(r1=died())) == FailureDecision.RAISE
    assert board.board.failure is not None and "lost node 10.0.0.2" in board.board.failure["text"]


def test_a_worker_that_dies_on_a_living_node_is_an_error_of_ones_own(board: Remote) -> None:
    policy = restarts.Retries(board, FailureConfig(max_failures=0, max_preemption_failures=2))
    attempt(board, nodes="aa")
    assert policy.make_decision(group_error(r1=died())) == FailureDecision.RAISE


def test_what_went_wrong_first_is_told() -> None:
    """A worker that was lost, then what workers told, then what Ray heard; an error need not have a text."""
    told = [{"rank": 1, "text": "ValueError: bad"}]
    peer, silent = raised(RuntimeError("peer")), raised(AssertionError())
    assert restarts.first_error(group_error(r0=peer, r1=died()).worker_failures, told) == "worker 1: " + str(ActorDiedError())
    assert restarts.first_error(group_error(r0=peer).worker_failures, told) == "worker 1: ValueError: bad"
    assert restarts.first_error(group_error(r0=silent).worker_failures, []) == "worker 0: AssertionError: "
    assert restarts.first_error({0: peer}, []) == "worker 0: RuntimeError: peer"  # where Ray does not unwrap


def test_asked_for_restarts_count_towards_nothing(board: Remote) -> None:
    policy = restarts.Retries(board, FailureConfig(max_failures=0, max_preemption_failures=0))
    for _ in range(3):
        attempt(board)
        assert policy.make_decision(group_error(r0=raised(Restart("saved")))) == FailureDecision.RETRY


def test_what_a_user_must_mend_is_not_tried_again(board: Remote) -> None:
    policy = restarts.Retries(board, FailureConfig(max_failures=9))
    attempt(board)
    board.board.fail("input", "data.labeled: lost")
    assert policy.make_decision(group_error(r0=raised(InputError("data.labeled: lost")))) == FailureDecision.RAISE


def test_an_elastic_run_has_sizes_that_share_the_batch_and_fit(board: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {size: Resources(size, 0.7, False, 0.5, 1) for size in (1, 2, 4)}
    sizes = restarts.Sizes(board, ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 0.7}), plans)
    nodes: list[dict[str, Any]] = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 2.0}} for name in "ab"]
    leaving: dict[str, int] = {}
    monkeypatch.setattr(restarts, "_get_draining_nodes", lambda: leaving)
    monkeypatch.setattr(restarts.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(restarts, "answers", lambda node: node["Alive"])
    assert sizes._count_possible_workers({"a": {"CPU": 1.4}, "b": {"CPU": 1.4}}) == 4
    assert sizes._count_possible_workers({"a": {"CPU": 1.4}, "b": {"CPU": 0.7}}) == 2  # 3 cannot share
    leaving["b"] = 1
    assert sizes._count_possible_workers({"a": {"CPU": 1.4}, "b": {"CPU": 1.4}}) == 2
    leaving.clear()
    nodes[1]["Alive"] = False  # Ray's reservation still has both
    assert sizes._count_possible_workers({"a": {"CPU": 1.4}, "b": {"CPU": 1.4}}) == 2
    nodes[0]["Resources"] = {"CPU": 1.0}
    assert sizes._count_possible_workers({"a": {"CPU": 1.4}, "b": {"CPU": 1.4}}) == 0  # the reader would have no CPU


def test_a_range_of_workers_means_the_sizes_that_can_share_the_batches(tmp_path: Path) -> None:
    def sizes(workers: Any, **changes: Any) -> tuple[int, ...]:
        return elastic_sizes(tiny_config(tmp_path, tmp_path, launch__workers=workers, **changes))

    assert sizes(2) == () and sizes((1, 4)) == sizes([1, 7]) == (1, 2, 4)
    assert sizes((1, 12), train__labeled_batch=12, train__unlabeled_batch=24) == (1, 2, 3, 4, 6, 12)
    assert sizes((1, 4), data__lanes=2) == (1, 2)
    with pytest.raises(InputError, match=r"launch.workers: \[3, 5\] .* those that can are 1, 2, 4"):
        sizes((3, 5))


def test_a_worker_must_fit_on_a_node(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, data__loader="ray", launch__workers=2)
    plan = plan_on_nodes(config, [(0.0, 0), (2.0, 0), (2.0, 0)])  # of the sum each would get 1.5
    assert (plan.workers, plan.cpus_per_worker) == (2, 1.5) and fits(plan, [(2.0, 0), (2.0, 0)])
    assert plan_on_nodes(config, [(1.0, 0)] * 6).cpus_per_worker == 1.0  # not 2
    with pytest.raises(InputError, match="do not fit on the nodes"):
        plan_on_nodes(tiny_config(tmp_path, tmp_path, launch__workers=2, launch__cpus_per_worker=1.5), [(1.0, 0)] * 4)
    elastic = tiny_config(tmp_path, tmp_path, launch__workers=[1, 4], launch__cpus_per_worker=1.5)
    plan = plan_on_nodes(elastic, [(2.0, 0), (2.0, 0)])
    assert (plan.workers, plan.sizes) == (2, (1, 2, 4))


def test_relative_paths_of_a_job_last_longer_than_its_working_directory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, home = tmp_path / "copy", tmp_path / "home"
    (copied / "sent").mkdir(parents=True)
    monkeypatch.chdir(copied)
    monkeypatch.delenv(cluster.JOB_CONFIG, raising=False)
    assert cluster.absolute("runs") == str(copied / "runs")
    monkeypatch.setenv(cluster.JOB_CONFIG, json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}}))
    monkeypatch.setenv(cluster.HOME, str(home))
    assert cluster.absolute("runs") == str(home / "runs") and cluster.absolute("/runs") == "/runs"
    assert cluster.absolute("sent") == str(copied / "sent")
    config = tiny_config(Path("sent"), Path("runs"))
    assert launch.choose_run(launch.with_absolute_paths(config), None)[1] == str(home / "runs/run")


def test_workers_are_sent_the_code_unless_the_job_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://here")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv(cluster.JOB_CONFIG, raising=False)
    sent = cluster._runtime_env({"RAY_TQDM": "0"})
    assert sent["env_vars"] == {"RAY_TQDM": "0", "AWS_ENDPOINT_URL": "http://here"}
    assert [Path(path).name for path in sent["py_modules"]] == ["ecocseg"]
    monkeypatch.setenv(cluster.JOB_CONFIG, json.dumps(
        {"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"AWS_ENDPOINT_URL": "http://there"}}}))
    assert cluster._runtime_env({"RAY_TQDM": "0"}) == {"env_vars": {"RAY_TQDM": "0"}}


def test_a_run_saves_when_it_is_asked_to_or_warned(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, tmp_path, train__checkpoint_every=0, train__panels_every=0, train__steps=5,
                         train__keep_checkpoints=9)
    asked = {2: "save"}

    def report(message: dict[str, Any]) -> str:
        return asked.get(message["step"], "") if message["kind"] == "progress" and "loss/labeled" in message else ""

    warnings = iter(["", "", "save", "", ""])
    loop.run_worker(config, str(tmp_path / "run"), World(), report, notice=lambda: next(warnings))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (2, 3, 5)]
    asked = {2: "restart"}
    with pytest.raises(Restart, match="saved at step 2"):
        loop.run_worker(config, str(tmp_path / "again"), World(), report)


def test_who_stops_a_run_waits_for_workers_alone() -> None:
    board = Board()
    assert board.over()  # none has begun: there is nothing to save
    board.begin(0, "a")
    board.ask("stop")
    board.ask("restart")
    assert not board.over() and board.post({"kind": "message", "text": ""}) == ""
    assert board.post({"kind": "progress", "step": 3}) == board.post({"kind": "progress", "step": 4}) == "stop"
    board.fail("stopped", "saved")
    assert board.over()
    board = Board()
    board.begin(0, "a")
    board.ask("save")
    assert [board.post({"kind": "progress", "step": step}) for step in (1, 2)] == ["save", ""]  # once is enough
    board.ask("restart")
    assert board.attempt()["nodes"] == {0: "a"} and board.over()  # begun again, and not there yet
    assert board.post({"kind": "progress", "step": 3}) == ""  # asked of the ones before


def test_who_waits_for_a_node_is_told_what_for(board: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("ecocseg.watch.time.monotonic", lambda: now[0])
    board.board = Board()
    vigil = Vigil(board, lambda: "2 worker(s) wait")

    def told(seconds: int) -> list[float]:
        found = []
        for _ in range(seconds):
            now[0] += 1
            text = vigil.look()
            assert text in (None, f"no worker is training for {board.board.idle():.0f} s: 2 worker(s) wait")
            found += [now[0]] * (text is not None)
        return found

    first, *again = told(1300)
    assert 1030 <= first <= 1036 and len(again) == 2 and again[0] >= first + 600
    board.board.begin(0, "a")
    assert not told(100)
    board.board.attempt()  # lost, and soon there again
    assert not told(25)
    board.board.begin(0, "a")
    assert not told(100)
    board.board.attempt()
    assert len(told(50)) == 1

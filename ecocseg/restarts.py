"""When Ray Train begins a run's workers again, and how many: the two decisions of its controller that a run has its own
view of.

Why again: an error of the run's own counts towards launch.max_failures, and the same error at the same step twice is not
tried a third time; a node that is lost or taken away counts towards launch.max_preemptions; workers that saved in order to
be more or fewer count towards nothing. How many: only numbers that can share the global batches.

These classes stand in for Ray's own, which are not public. They live in the controller's process, which imports what this
file does: keep it light.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import RayTrainError, UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.preemption import _get_draining_nodes
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from ecocseg.cluster import node_shape
from ecocseg.errors import Restart
from ecocseg.resources import Resources, fits


class Trainer(TorchTrainer):
    """A TorchTrainer with policies of one's own; without them it is Ray's."""

    def __init__(self, *arguments: Any, policies: dict[str, Any], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.policies = policies

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        return super()._initialize_and_run_controller(**(given | self.policies))


class Retries(DefaultFailurePolicy):
    """Budgets for errors of one's own and for lost nodes, and an end to what fails the same way again."""

    def __init__(self, board: Any, config: FailureConfig) -> None:
        super().__init__(config)
        self.board, self.before = board, ""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error = training_failed_error
        if not isinstance(error, WorkerGroupError | PreemptionError):
            return super().make_decision(error)
        told = ray.get(self.board.attempt.remote())
        if told["failure"] is not None:
            return FailureDecision.RAISE
        failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        if any(isinstance(raised_by_worker(failure), Restart) for failure in failures.values()):
            return FailureDecision.RETRY
        gone = lost_nodes(told["nodes"].values()) if failures else ["a node that is taken away"]
        if not gone:
            return self._failed(failures, told)
        self._preemption_failures += 1
        return self._count(f"lost {', '.join(gone)}, after step {told['step']}", self._preemption_failures,
                           "launch.max_preemptions", self.failure_config.max_preemption_failures)

    def _failed(self, failures: Mapping[int, BaseException], told: dict[str, Any]) -> FailureDecision:
        self._worker_group_failures += 1
        what, mark = first_error(failures, told["errors"]), signature(told["errors"], told["step"])
        what = f"{what}, after step {told['step']}"
        if mark and mark == self.before:
            return self._end("failed", f"{what} (twice, at the same step: a third time would not mend it)")
        self.before = mark
        return self._count(what, self._worker_group_failures, "launch.max_failures", self.failure_config.max_failures)

    def _count(self, what: str, number: int, key: str, most: int) -> FailureDecision:
        if number > most:
            return self._end("lost", f"{what} (number {number}, and {key} is {most})")
        self.board.post.remote({"kind": "message", "text": f"{what}; starting again from the newest checkpoint "
                                                           f"(number {number}, {key} is {most})"})
        return FailureDecision.RETRY

    def _end(self, kind: str, text: str) -> FailureDecision:
        ray.get(self.board.fail.remote(kind, f"{text}; go on with --resume"))
        return FailureDecision.RAISE


def raised_by_worker(failure: BaseException) -> BaseException | None:
    """What a worker's own code raised, which Ray wraps or not; None when the worker was lost."""
    if isinstance(failure, UserExceptionWithTraceback):
        return failure._base_exc
    return None if isinstance(failure, RayTrainError | RayError) else failure


def lost_nodes(nodes: Iterable[str]) -> list[str]:
    """Of the nodes that had workers those that are gone, by address."""
    known = {node["NodeID"]: node for node in ray.nodes()}
    gone = [known.get(node, {}) for node in sorted(set(nodes)) if not answers(known.get(node, {}))]
    return [f"node {node.get('NodeManagerAddress', '?')}" for node in gone]


def answers(node: Mapping[str, Any]) -> bool:
    """Whether a node is alive, as Ray has it, and so it is: Ray's own checks take up to half a minute to notice a loss, while
    the other workers' errors come at once."""
    if not node.get("Alive"):
        return False
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=3).close()
    except OSError:
        return False
    return True


def first_error(failures: Mapping[int, BaseException], errors: list[dict[str, Any]]) -> str:
    """What went wrong first, in a line: other workers fail after it, for want of it."""
    own = {rank: raised_by_worker(failure) for rank, failure in failures.items()}
    dead = [f"worker {rank}: {str(failures[rank]).strip().splitlines()[-1].strip()}" for rank in own if own[rank] is None]
    told = [f"worker {error['rank']}: {error['text']}" for error in errors]
    raised = [f"worker {rank}: {type(error).__name__}: {error}" for rank, error in own.items() if error is not None]
    return (dead + told + raised)[0]


def signature(errors: list[dict[str, Any]], step: int) -> str:
    """What two failures have in common that are one: the step and the first error, whatever addresses and sizes are in it."""
    if not errors or errors[0].get("passes"):
        return ""
    first = errors[0]
    return f"{first.get('step', step)} {first['kind']} {re.sub(r'0x[0-9a-f]+|[0-9]+', '#', first['text'])}"


class Sizes(ElasticScalingPolicy):
    """Ray's elastic policy among sizes that can share the batches and fit with their readers, on nodes that are alive.

    A run that could have more workers, or must have fewer, is asked to save first and then begins again: nothing is repeated.
    """

    def __init__(self, board: Any, config: ScalingConfig, plans: Mapping[int, Resources]) -> None:
        super().__init__(config)
        self.board, self.plans = board, dict(plans)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Ray hears of dead nodes late, counts those that are taken away and fractions wrongly, and has no mind for readers."""
        leaving = _get_draining_nodes()
        alive = [node_shape(node["Resources"]) for node in ray.nodes() if node["NodeID"] not in leaving and answers(node)]
        wanted = self.scaling_config._resources_per_worker_not_none
        mine = sum(min(int(node.get(key, 0.0) / amount + 1e-6) for key, amount in wanted.items() if amount > 0)
                   for name, node in reserved_resources.items() if name not in leaving)
        return max((size for size, plan in self.plans.items() if size <= mine and fits(plan, alive)), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            text = f"the cluster has room for {decision.num_workers} worker(s) now: saving, to go on with them"
            self.board.post.remote({"kind": "message", "text": text})
            self.board.ask.remote("restart")
            return NoopDecision()
        return decision

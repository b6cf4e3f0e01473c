"""Trials under Ray Tune: each is an ordinary training run, `launch.train`, watched from the thread beside it.

Train runs inside Tune: a trial is a Tune actor without resources of its own, whose run places its workers itself, one or
many on any nodes, with the same folder, checkpoints and recovery as a run started by hand. Tune cannot see those
resources; `sweep.plan_trials` has counted them. Ending a trial asks its run to save and stop, and waits for that, so what
a stopped trial had is free again without anybody's help, and it can be gone on with.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import statistics
import sys
import threading
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher

from ecocseg import checkpoint, launch
from ecocseg.config import RunConfig, with_values
from ecocseg.errors import InputError
from ecocseg.metrics import EvalResult
from ecocseg.storage import Storage, join
from ecocseg.sweep import Domain, Plan, Sweep, points, trial_base
from ecocseg.sweep_page import write_results
from ecocseg.sweep_report import Record, Trial, shown
from ecocseg.tracking import METRICS_FILE, parse_metrics

STATE = ".tune"
"""Folder, in that of the sweep, where Tune keeps what it needs to go on."""


class Watcher:
    """Takes a run's messages, as the progress display does, and turns each evaluation that has been saved into a result.
    Where an objective is not among them it asks the run to stop: an exception here would leave its workers behind."""

    def __init__(self, config: RunConfig, objectives: Mapping[str, str], stop: threading.Event) -> None:
        self.config, self.objectives, self.stop = config, objectives, stop
        self.error: InputError | None = None
        self.results: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.latest: dict[str, float] = {}
        self.rates: list[float] = []
        self.evaluated: dict[int, dict[str, float]] = {}
        """Step of each evaluation that has not been reported -> what was logged by then."""

    def restart(self, phase: str) -> None:
        """A run begins; nothing to do."""

    def note(self, record: Mapping[str, Any]) -> None:
        """Take in a record of metrics."""
        self.latest.update({name: value for name, value in record.items() if isinstance(value, int | float)})
        if record.get("time/steps_per_second"):
            self.rates.append(record["time/steps_per_second"])
        if f"{next(iter(self.config.data.eval))}/student/miou" in record:
            self.evaluated[int(record["step"])] = dict(self.latest)

    def read(self, text: str) -> None:
        """Take in what an earlier process logged, and had time to report."""
        for record in parse_metrics(text):
            self.note(record)
        self.evaluated.clear()

    def update(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "progress":
            self.note(record)
        elif record["kind"] == "checkpoint" and record["step"] < self.config.train.steps:
            saved = [step for step in self.evaluated if step <= record["step"]]  # later ones are in the next checkpoint
            if not saved:
                return
            logged = self.evaluated[max(saved)]
            for step in saved:
                del self.evaluated[step]
            try:
                self.results.put(self.result(record["step"], logged))
            except InputError as error:
                self.error = error
                self.stop.set()

    def finish(self, final: launch.RunResult) -> None:
        for name, by_model in final.results.items():
            for which, found in by_model.items():
                figures = EvalResult.from_dict(found).figures()
                self.latest.update({f"{name}/{which}/{key}": value for key, value in figures.items()})
        self.results.put(self.result(final.step, self.latest) | {"done": True})

    def result(self, step: int, logged: Mapping[str, float]) -> dict[str, Any]:
        """The objectives' values in what a run had logged by a step.

        Raises:
            InputError: when one of them is logged by no such run.
        """
        first = next(iter(self.config.data.eval))
        found = dict(logged)
        for short in ("miou", "dice"):
            if f"{first}/student/{short}" in found:
                found[short] = found[f"{first}/student/{short}"]
        rate = statistics.median(self.rates) if self.rates else found.get("rate")
        if rate:
            found["step_seconds"] = 1 / rate
        missing = [name for name in self.objectives if name not in found]
        if missing:
            raise InputError(f"objectives.{missing[0]}: is not logged; there are {', '.join(sorted(found))}")
        return {"step": step, **{name: found[name] for name in self.objectives}}


class SweepTrial(tune.Trainable):
    """One trial. A Tune step lasts until the run's next evaluation is saved, or the run has ended."""

    def setup(self, config: dict[str, Any], base: dict[str, Any],  # type: ignore[override]
              objectives: dict[str, str]) -> None:
        self.thread: threading.Thread | None = None
        self.stop_asked = threading.Event()
        self.values, self.base, self.objectives = dict(config), RunConfig.model_validate(base), objectives
        self.run_name = f"trial-{self.trial_id}"
        self.storage = checkpoint.build_storage(self.base)
        self.failure: Exception | None = None

    def step(self) -> dict[str, Any]:
        if self.thread is None:
            self._begin()
        result = self.watcher.results.get()
        if result is not None:
            return result
        assert self.failure is not None
        if isinstance(self.failure, InputError) or (isinstance(self.failure, launch.RunFailed) and not self.failure.__cause__):
            # What a run ends by itself for, it would again: that is a result.
            return {"done": True, "step": 0, "failed": str(self.failure), **dict.fromkeys(self.objectives, float("nan"))}
        raise self.failure  # lost workers, a bucket that is away: Tune begins the trial again, and so does --resume

    def _begin(self) -> None:
        self.watcher = Watcher(self.base, self.objectives, self.stop_asked)

        def run() -> None:
            try:
                metrics_url = join(self.base.run.directory, self.run_name, METRICS_FILE)
                if self.storage.exists(metrics_url):  # a trial gone on with
                    self.watcher.read(self.storage.read_bytes(metrics_url).decode())
                config = with_values(self.base, self.values | {"run.name": self.run_name})
                self.watcher.finish(launch.train(config, "auto", self.watcher, self.stop_asked))
            except Exception as error:  # noqa: BLE001 - told to Tune by step()
                self.failure = self.watcher.error or error
                self.watcher.results.put(None)

        self.thread = threading.Thread(target=run, name="trial", daemon=True)
        self.thread.start()

    def cleanup(self) -> None:
        self.stop_asked.set()
        if self.thread is not None:
            self.thread.join()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Name what the run itself has saved; nothing is copied."""
        return {"trial": self.trial_id, "run": self.run_name, "id": uuid.uuid4().hex[:8]}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on with a run of this trial, or (PBT) with another trial's: from a copy of its newest checkpoint, in a folder of
        its own, for this trial's run before may still be writing into the first one."""
        if checkpoint is None:
            return
        self.run_name = checkpoint["run"]
        if checkpoint["trial"] != self.trial_id:
            self.run_name = f"trial-{self.trial_id}-{checkpoint['id']}"
            runs = self.base.run.directory
            adopt(join(runs, checkpoint["run"]), join(runs, self.run_name), self.storage)


def adopt(origin: str, run_url: str, storage: Storage) -> None:
    """Begin a run's folder with the newest checkpoint of another, once: a killed sweep asks for the same again.

    Raises:
        InputError: when the other has none that is whole.
    """
    own = checkpoint.Checkpoints(run_url, storage)
    if own.complete():
        return
    found = checkpoint.Checkpoints(origin, storage).newest()
    if found is None:
        raise InputError(f"{origin} has no checkpoint to go on from")
    own.save(found[0])


class Recorder(tune.Callback):
    """Keeps the sweep's record and files up to date, and says what happens. It is pickled into Tune's state, so it opens
    what it needs at the start."""

    def __init__(self, sweep: Sweep, space: Mapping[str, Domain], base: RunConfig, sweep_url: str) -> None:
        self.base, self.sweep_url = base, sweep_url
        self.empty = Record(sweep_url.rpartition("/")[2], sweep.description, base.recipe, sweep.goals,
                            {key: domain.kind for key, domain in space.items()})

    def setup(self, *args: Any, **info: Any) -> None:
        self.storage = checkpoint.build_storage(self.base)
        self.record = Record.read(self.sweep_url, self.storage) or self.empty

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if iteration == 0:  # what was begun after Tune's last save before a kill is begun anew, under another name
            known = {f"trial-{trial.trial_id}" for trial in trials}
            self.record.trials = [trial for trial in self.record.trials if trial.name in known]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._row(trial)
        row.state, row.error = "running", None
        print(f"{row.name} begins: {', '.join(f'{key}={shown(value)}' for key, value in row.values.items())}", flush=True)
        self._write()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        row = self._row(trial)
        row.ended = float(result["timestamp"])
        if result.get("failed"):
            row.state, row.error = "failed", str(result["failed"])
            print(f"{row.name} failed: {row.error}", flush=True)
        else:
            first = next(iter(self.record.objectives))
            row.step, row.metrics = int(result["step"]), {name: float(result[name]) for name in self.record.objectives}
            row.curve = [point for point in row.curve if point[0] < row.step] + [(row.step, row.metrics[first])]
            said = ", ".join(f"{name} {shown(value)}" for name, value in row.metrics.items())
            print(f"{row.name} step {row.step}/{self.base.train.steps}: {said}", flush=True)
        self._write()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._row(trial)
        if row.state != "failed":
            row.state = "done" if row.step >= self.base.train.steps else "stopped"
            print(f"{row.name} {row.state} at step {row.step}", flush=True)
        self._write()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row, lines = self._row(trial), str(trial.get_error() or "its process was lost").strip().splitlines()
        row.state, row.error = "failed", f"{lines[-1].strip()}; --resume tries again"
        print(f"{row.name} failed: {row.error}", flush=True)
        self._write()

    def _row(self, trial: Any) -> Trial:
        name = f"trial-{trial.trial_id}"
        row = self.record.find(name)
        if row is None:
            row = Trial(name, {})
            self.record.trials.append(row)
        row.values = {key: trial.config[key] for key in self.record.scales}
        return row

    def _write(self) -> None:
        write_results(self.record, self.base, self.sweep_url, self.storage)


class Asha(ASHAScheduler):
    """ASHA that knows what trials reached before the sweep was killed, which Tune forgets."""

    def __init__(self, sweep_url: str, storage: Storage, **options: Any) -> None:
        super().__init__(**options)
        self.sweep_url, self.storage = sweep_url, storage

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        record = Record.read(self.sweep_url, self.storage)
        row = record.find(f"trial-{trial.trial_id}") if record else None
        assert self._metric_op is not None
        for step, value in row.curve if row else ():
            self._trial_info[trial.trial_id].on_result(trial, step, self._metric_op * value)


def scheduler(sweep: Sweep, space: Mapping[str, Domain], config: RunConfig, sweep_url: str) -> TrialScheduler:
    metric, mode = next(iter(sweep.goals.items()))
    every = sweep.scheduler.every or config.train.eval_every
    if sweep.scheduler.kind == "asha":
        return Asha(sweep_url, checkpoint.build_storage(config), time_attr="step", metric=metric, mode=mode,
                    max_t=config.train.steps, grace_period=every, reduction_factor=sweep.scheduler.reduction)
    if sweep.scheduler.kind == "pbt":
        return PopulationBasedTraining(
            time_attr="step", metric=metric, mode=mode, perturbation_interval=every, log_config=False,
            hyperparam_mutations={key: list(domain.values) if domain.kind == "choice" else tune_domain(domain)
                                  for key, domain in space.items()},
            custom_explore_fn=partial(clip, dict(space)))
    return FIFOScheduler()


def clip(space: Mapping[str, Domain], values: dict[str, Any]) -> dict[str, Any]:
    """PBT multiplies without looking: back into each key's range."""
    return {key: space[key].clip(value) if key in space else value for key, value in values.items()}


def searcher(sweep: Sweep, space: Mapping[str, Domain], concurrent: int) -> Searcher | BasicVariantGenerator:
    """What chooses the points.

    Raises:
        InputError: when Optuna is not installed.
    """
    given = points(sweep, space)
    if given is not None:
        return BasicVariantGenerator(points_to_evaluate=given, max_concurrent=concurrent)
    try:
        import optuna
    except ImportError:
        raise InputError("search.algorithm: tpe needs Optuna, which is not installed; pip install 'ecocseg[sweep]', or use "
                         "search.algorithm=random") from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names, ways = list(sweep.goals), list(sweep.goals.values())
    # Optuna's own default of 10 points at random would be all of a small sweep.
    sampler = optuna.samplers.TPESampler(seed=sweep.search.seed, n_startup_trials=min(10, max(3, sweep.search.trials // 4)))
    return OptunaSearch(metric=names if len(names) > 1 else names[0], mode=ways if len(ways) > 1 else ways[0], sampler=sampler)


def tune_domain(domain: Domain) -> Any:
    """A domain as Tune has it."""
    if domain.kind == "choice":
        return tune.choice(list(domain.values))
    low, high = domain.values
    if domain.kind == "int":
        return tune.randint(low, high + 1)
    return (tune.uniform if domain.kind == "uniform" else tune.loguniform)(low, high)


def run(sweep: Sweep, space: Mapping[str, Domain], base: RunConfig, plan: Plan, sweep_url: str) -> Record:
    """Run the trials, or those that a killed sweep in the same folder has left, and return the record of all.

    Raises:
        InputError: when Optuna is missing.
        launch.RunStopped: after Ctrl-C or SIGTERM; `--resume` goes on.
    """
    search = searcher(sweep, space, plan.concurrent)
    quiet()
    launch.start_ray()
    config = trial_base(sweep, base, plan, sweep_url)
    filesystem, path = checkpoint.build_storage(config).open(sweep_url)
    # Tune wants every actor to have some resource; a byte of memory is the smallest there is.
    trainable = tune.with_resources(
        tune.with_parameters(SweepTrial, base=config.model_dump(mode="json"), objectives=sweep.goals), {"memory": 1})
    state = f"{path}/{STATE}"
    if tune.Tuner.can_restore(state, storage_filesystem=filesystem):
        tuner = tune.Tuner.restore(state, trainable, resume_errored=True, storage_filesystem=filesystem)
    else:
        given = points(sweep, space)
        tuner = tune.Tuner(
            trainable, param_space={key: tune_domain(domain) for key, domain in space.items()},
            tune_config=tune.TuneConfig(
                search_alg=search, scheduler=scheduler(sweep, space, config, sweep_url),
                num_samples=sweep.search.trials if given is None else len(given),
                max_concurrent_trials=plan.concurrent if given is None else None),
            run_config=tune.RunConfig(
                name=STATE, storage_path=path, storage_filesystem=filesystem, verbose=0,
                failure_config=tune.FailureConfig(max_failures=config.launch.max_failures),
                callbacks=[Recorder(sweep, space, base, sweep_url)]))
    interrupted = fit(tuner)
    record = Record.read(sweep_url, checkpoint.build_storage(config))
    if interrupted or record is None:
        raise launch.RunStopped(f"stopped; what trials have saved is in {sweep_url}, go on with --resume")
    return record


def quiet() -> None:
    """Tune's loggers and progress tables would drown ours; its own files per trial say nothing that a run's do not."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


def fit(tuner: tune.Tuner) -> bool:
    """Run Tune; true when it was ended by Ctrl-C or SIGTERM: it saves its state, trials have theirs. Again: at once."""
    asked: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            os._exit(130)
        print("\nstopping (again to stop at once)", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGUSR1)  # what Tune listens to, beside Ctrl-C

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        tuner.fit()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return bool(asked)

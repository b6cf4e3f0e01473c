"""Sweeps: what is searched, whether every point of it is a sound configuration, and how many trials a cluster holds.

A sweep is a YAML file: a recipe, values fixed for all trials, and a space of dotted keys, each with the values to try
(`{choice: [..]}` or a plain list), a range (`{uniform: [low, high]}`, `{loguniform: [low, high]}`) or whole numbers
(`{int: [first, last]}`). Everything here is decided before a trial starts; `sweep_trials.py` runs them.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from ecocseg import checkpoint, launch
from ecocseg.codebook import Codebook
from ecocseg.config import (
    RunConfig,
    Section,
    check_section,
    keys,
    load,
    parse_override,
    raise_problems,
    read_yaml,
    with_values,
)
from ecocseg.data.classes import CLASS_LISTS
from ecocseg.errors import InputError
from ecocseg.resources import SHARES, Resources, fits, fixed_workers, no_room, plan_resources

SECTIONS = ("data", "model", "coding", "method", "optim", "train", "engine")
"""Sections whose keys may be searched; the others say where a run is, what it may take and how it is scored."""
NOT_SEARCHED = ("data.eval", "train.eval_every", "train.checkpoint_every", "train.compare_with_source_only")
CHANGEABLE = ("coding.reliability", "coding.bce_weight", "coding.distance_weight", "coding.contrast_weight",
              "coding.temperature", "method.confidence_threshold", "method.mixed_weight", "method.masked_weight",
              "method.feature_distance", "optim.lr", "optim.decoder_lr_factor")
"""Keys a run may go on with from its checkpoint at other values; population based training changes nothing else."""
MOST_POINTS = 10000


class SearchConfig(Section):
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """How points are chosen: Optuna's tree-structured Parzen estimator, at random, or every combination."""
    trials: int = Field(16, ge=1)
    """Number of trials; of a grid all are run."""
    seed: int = Field(0, ge=0)
    """Seed of the search, apart from those of training and codebook."""


class SchedulerConfig(Section):
    kind: Literal["none", "asha", "pbt"] = "none"
    """Which trials go on: all, by asynchronous successive halving the better ones (ASHA), or by population based training
    (PBT) all, the worse ones from a checkpoint of the better ones, with values near theirs."""
    every: int | None = Field(None, ge=1)
    """Number of steps before the first decision: ASHA's grace period, PBT's interval; null = train.eval_every."""
    reduction: int = Field(3, ge=2)
    """One of so many trials passes each of ASHA's decisions, which are so many times as many steps apart."""


class Sweep(Section):
    name: str = "sweep"
    """Name the sweep's folder begins with; that of the file unless it says otherwise."""
    description: str = ""
    """One line on what is searched."""
    recipe: str | None = None
    """Recipe every trial is a run of."""
    config: str | None = None
    """File of the recipe, instead of its name."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Values of dotted keys that all trials share."""
    space: dict[str, Any] = Field(default_factory=dict)
    """Values or range of every dotted key that is searched."""
    objectives: dict[str, Literal["max", "min"]] = Field(default_factory=dict)
    """Logged metrics and their direction, the one that counts first; null = miou: max. `miou` and `dice` are the student's on
    the first evaluation set, `step_seconds` the median time of a step. TPE models all of them, schedulers the first."""
    codebooks: bool = False
    """Build and rank codebooks, and train nothing."""
    concurrent: int | None = Field(None, ge=1)
    """Number of trials at a time; null = as many as the cluster holds."""
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()

    @property
    def goals(self) -> dict[str, str]:
        """The objectives, or what stands in for them."""
        if self.objectives:
            return dict(self.objectives)
        return {"of_bound": "max", "column_separation": "max", "bits": "min"} if self.codebooks else {"miou": "max"}


@dataclass(frozen=True)
class Domain:
    """The values of one key: `choice` of some, or `uniform`, `loguniform` or `int` between two (both included)."""

    kind: str
    values: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        if self.kind == "choice":
            return rng.choice(self.values)
        low, high = self.values
        if self.kind == "int":
            return rng.randint(low, high)
        if self.kind == "uniform":
            return rng.uniform(low, high)
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    def points(self) -> list[Any] | None:
        """All values, or None if there is no end of them."""
        if self.kind == "choice":
            return list(self.values)
        return list(range(self.values[0], self.values[1] + 1)) if self.kind == "int" else None

    def examples(self) -> list[Any]:
        """Values whose soundness stands for that of all: a range's ends, and a number between that is not whole."""
        if self.kind in ("choice", "int"):
            return list(self.values)
        low, high = self.values
        return [low, high, low + (high - low) / math.pi]

    def clip(self, value: Any) -> Any:
        """The value, or the nearer end of the range."""
        return value if self.kind == "choice" else min(max(value, self.values[0]), self.values[1])

    def describe(self) -> str:
        if self.kind == "choice":
            return " | ".join(map(str, self.values))
        return f"{self.values[0]} .. {self.values[1]}" + {"int": " (whole)", "loguniform": " (log)"}.get(self.kind, "")


def parse_domain(key: str, given: Any) -> Domain:
    """A key's domain from YAML. Raises InputError with the forms there are."""
    kind, values = ("choice", given) if isinstance(given, list) else (None, None)
    if isinstance(given, dict) and len(given) == 1:
        kind, values = next(iter(given.items()))
    forms = "{choice: [a, b]}, {uniform: [low, high]}, {loguniform: [low, high]} or {int: [first, last]}"
    if kind not in ("choice", "uniform", "loguniform", "int") or not isinstance(values, list) or not values:
        raise InputError(f"space.{key}: {given!r} is no domain; use {forms}")
    if kind == "choice":
        return Domain(kind, tuple(values))
    if len(values) == 2 and kind != "int":
        values = [_number(value) for value in values]
    whole = int if kind == "int" else (int, float)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, whole) for v in values) or values[0] >= values[1]:
        raise InputError(f"space.{key}: {kind} needs [low, high] in rising {'whole ' if kind == 'int' else ''}numbers, "
                         f"not {given[kind]!r}")
    if kind == "loguniform" and values[0] <= 0:
        raise InputError(f"space.{key}: loguniform needs numbers above 0, not {values[0]:g}; use uniform")
    return Domain(kind, tuple(values) if kind == "int" else tuple(map(float, values)))


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_sweep(path: Path, words: Sequence[str] = ()) -> Sweep:
    """Read a search space and the words `key=value`, for the sweep's own keys (search.trials=8) or for the recipe's.

    Raises:
        InputError: naming every bad key or value.
    """
    plain = read_yaml(path)
    plain.setdefault("name", path.stem)
    own = {key for key, *_ in keys(Sweep)} - {"overrides", "space", "objectives"}
    fixed = plain.setdefault("overrides", {})
    for word in words:
        key, value = parse_override(word)
        section, _, leaf = key.rpartition(".")
        if key in own:
            (plain.setdefault(section, {}) if section else plain)[leaf] = value
        elif isinstance(fixed, dict):
            fixed[key] = value
    sweep, problems = check_section(Sweep, plain)
    raise_problems(f"the sweep {path}", problems)
    assert sweep is not None
    return sweep


def base_config(sweep: Sweep) -> RunConfig:
    """What all trials share, checked."""
    if (sweep.recipe is None) == (sweep.config is None):
        raise InputError("the sweep must say either recipe (a name) or config (a file)")
    return with_values(load(sweep.recipe, sweep.config), sweep.overrides)


def domains(sweep: Sweep) -> dict[str, Domain]:
    if not sweep.space:
        raise InputError("space: nothing to search; give at least one dotted key with its values")
    return {key: parse_domain(key, given) for key, given in sweep.space.items()}


def check(sweep: Sweep, base: RunConfig, space: Mapping[str, Domain]) -> None:
    """Whether every key, value and combination that a trial may get is a sound configuration, and the rest can work.

    Raises:
        InputError: with all problems found.
    """
    known = {key for key, *_ in keys()}
    problems = [f"space.{key}: is not searched, it does not decide a result; put it under overrides"
                for key in space if key in known and (key.partition(".")[0] not in SECTIONS or key.startswith(NOT_SEARCHED))]
    problems += [f"space.{key}: has a value under overrides too; leave one of them out"
                 for key in space if key in sweep.overrides]
    if not problems:
        problems += sorted({line for key, domain in space.items() for value in domain.examples()
                            for line in _problems(base, {key: value})})
    problems += _scheduler_problems(sweep, base, space)
    if not problems:
        drawn = itertools.islice(draws(space, sweep.search.seed), 50)
        combinations = grid(space) if sweep.search.algorithm == "grid" else drawn
        problems += sorted({line for point in combinations for line in _problems(base, point)})
    if not problems and base.data.classes in CLASS_LISTS:
        problems += sorted({line for values in _codebooks(base, space) for line in _codebook_problems(base, values)})
    raise_problems("the sweep", problems)


def _problems(base: RunConfig, values: Mapping[str, Any]) -> list[str]:
    try:
        with_values(base, values)
    except InputError as error:
        lines = str(error).splitlines()
        return [line.strip() for line in lines[1:]] or [str(error).removeprefix("the configuration has a problem: ")]
    return []


def _scheduler_problems(sweep: Sweep, base: RunConfig, space: Mapping[str, Domain]) -> list[str]:
    kind, every, algorithm = sweep.scheduler.kind, sweep.scheduler.every, sweep.search.algorithm
    problems = []
    if not base.data.eval and not sweep.codebooks:
        problems.append("data.eval: a sweep compares trials by it; name an evaluation set")
    if sweep.codebooks:
        problems += [f"space.{key}: codebooks alone are made by coding.codebook.* alone; set codebooks: false to train"
                     for key in space if not key.startswith("coding.codebook.")]
        problems += [f"search.algorithm: {algorithm} needs training; use grid or random"] if algorithm == "tpe" else []
    if algorithm == "grid":
        problems += [f"space.{key}: a grid needs choice or int, not {domain.kind}; or search.algorithm=random"
                     for key, domain in space.items() if domain.points() is None]
    if kind == "none":
        return problems
    if base.train.eval_every == 0 or base.train.eval_every >= base.train.steps:
        problems.append(f"scheduler.kind: {kind} decides by evaluations during a run, train.eval_every is "
                        f"{base.train.eval_every} of {base.train.steps} steps; use {max(1, base.train.steps // 4)}")
    if (every or 1) >= base.train.steps:
        problems.append(f"scheduler.every: {every} is not below train.steps {base.train.steps}")
    if "train.steps" in space:
        problems.append(f"space.train.steps: {kind} compares trials of the same length; put it under overrides")
    if kind == "pbt":
        problems += [f"space.{key}: a running model cannot change it, so PBT does not; use scheduler.kind=asha, or search only "
                     f"{', '.join(CHANGEABLE)}" for key in space if key not in CHANGEABLE]
        if sweep.concurrent is not None:
            problems.append("concurrent: PBT's trials all train at the same time; leave it out, search.trials says how many")
        if algorithm != "random":
            problems.append(f"search.algorithm: PBT searches by itself, {algorithm} does not go with it; use random")
    return problems


def _codebooks(base: RunConfig, space: Mapping[str, Domain]) -> Iterator[dict[str, Any]]:
    """Kinds and lengths the space may ask for."""
    book = base.coding.codebook
    lengths, kinds = space.get("coding.codebook.length"), space.get("coding.codebook.kind")
    if base.coding.kind == "ecoc" and book.path is None:
        for length in lengths.examples() if lengths else [book.length]:
            for kind in kinds.examples() if kinds else [book.kind]:
                yield {"coding.codebook.length": length, "coding.codebook.kind": kind}


def _codebook_problems(base: RunConfig, values: Mapping[str, Any]) -> list[str]:
    if values["coding.codebook.kind"] == "random":  # takes long, and has the limits of max_min
        values = {**values, "coding.codebook.kind": "max_min"}
    try:
        build_codebook(with_values(base, values))
    except InputError as error:
        return [f"{', '.join(f'{key}={value}' for key, value in values.items())}: {error}"]
    return []


def build_codebook(config: RunConfig) -> Codebook:
    """The codebook of a configuration that names its classes, without a word about repeated columns."""
    if config.data.classes is None:
        raise InputError("data.classes: not set; name the class list that the codebooks are for")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        book = checkpoint.build_codebook(config.coding, CLASS_LISTS[config.data.classes])
    if book is None:
        raise InputError("coding.kind: one_hot has no codebook; use coding.kind=ecoc")
    return book


def grid(space: Mapping[str, Domain]) -> list[dict[str, Any]]:
    """Every combination of values, for domains that are finite."""
    count = math.prod(len(domain.points() or ()) for domain in space.values())
    if count > MOST_POINTS:
        raise InputError(f"search.algorithm: the grid has {count} points, more than {MOST_POINTS}; use random or fewer values")
    return [dict(zip(space, values, strict=True))
            for values in itertools.product(*(domain.points() or () for domain in space.values()))]


def draws(space: Mapping[str, Domain], seed: int) -> Iterator[dict[str, Any]]:
    """Points at random, without end; equal for equal seeds."""
    rng = random.Random(seed)
    while True:
        yield {key: domain.draw(rng) for key, domain in space.items()}


def points(sweep: Sweep, space: Mapping[str, Domain]) -> list[dict[str, Any]] | None:
    """The points of a grid or a random search; None where they follow from the results."""
    if sweep.search.algorithm == "tpe":
        return None
    return grid(space) if sweep.search.algorithm == "grid" else list(
        itertools.islice(draws(space, sweep.search.seed), sweep.search.trials))


@dataclass(frozen=True)
class Plan:
    """How many trials run at a time, and what each takes."""

    concurrent: int
    each: Resources
    cpus: float
    gpus: int

    def describe(self) -> str:
        return (f"{self.concurrent} at a time, each with {self.each.describe()}; "
                f"the cluster has {self.cpus:g} CPU(s) and {self.gpus} GPU(s)")


def plan_trials(config: RunConfig, nodes: Sequence[tuple[float, int]], wanted: int | None = None,
                key: str = "concurrent") -> Plan:
    """Fit as many trials of a configuration as possible, or as many as wanted (by a key), on nodes of (CPUs, GPUs).

    A trial's workers and their data are placed by Ray Train and Ray Data, which Tune knows nothing of and which wait for ever
    for what is not there. So what all concurrent trials may take together never exceeds what the cluster has. A trial has
    one worker unless launch.workers says more (of a range, the most), and smaller shares of CPU where nodes have few beside
    their GPUs.

    Raises:
        InputError: with the numbers, when not even one trial fits, or not as many as wanted.
    """
    config = config.updated(launch={"workers": fixed_workers(config) or 1})
    cpus, gpus = sum(node[0] for node in nodes), sum(node[1] for node in nodes)
    one = plan_resources(config, cpus, gpus)
    most = (gpus if one.gpu else int(cpus)) // one.workers
    shares = [None, *SHARES] if config.launch.cpus_per_worker is None else [config.launch.cpus_per_worker]
    for number, share in itertools.product([wanted] if wanted else range(most, 0, -1), shares):
        try:
            each = plan_resources(config.updated(launch={"cpus_per_worker": share}), cpus / number, gpus // number)
        except InputError:
            continue
        if fits(each, nodes, number):
            return Plan(number, each, cpus, gpus)
    if wanted is not None:
        best = plan_trials(config, nodes)
        raise InputError(f"{key}: {wanted} trials of {one.workers} worker(s) do not fit into {cpus:g} CPU(s) and {gpus} "
                         f"GPU(s) on {len(nodes)} node(s) at a time; {best.concurrent} do, with {best.each.describe()} each")
    raise no_room(one, nodes)


def trial_base(sweep: Sweep, base: RunConfig, plan: Plan, sweep_url: str) -> RunConfig:
    """What a trial's run has beside the recipe: its share of the cluster, its folder, and a checkpoint for every result."""
    train: dict[str, Any] = {"compare_with_source_only": False,
                             "checkpoint_every": base.train.eval_every or base.train.checkpoint_every}
    if sweep.scheduler.kind == "pbt":  # one may be read while the next is written
        train["keep_checkpoints"] = max(2, base.train.keep_checkpoints)
    share = {"wait": 0.0, "workers": plan.each.workers, "gpu": plan.each.gpu, "cpus_per_worker": plan.each.cpus_per_worker}
    return launch.with_absolute_paths(base).updated(train=train, launch=share, run={"directory": sweep_url})


def to_yaml(sweep: Sweep) -> str:
    return yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False)

"""Search for settings of a recipe, or for a codebook: many trials side by side on a cluster, the better ones longer.

    python tune/sweep.py                                          # the demo's code and loss weights
    python tune/sweep.py --space tune/spaces/uda.yaml --dry-run data.labeled=s3://bucket/gta ...
    python tune/sweep.py --space tune/spaces/codebooks.yaml       # no training: which K?
    python tune/sweep.py --list
"""

import argparse
import re
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ecocseg import cli, cluster, launch, scale, sweep  # noqa: E402
from ecocseg.checkpoint import build_storage  # noqa: E402
from ecocseg.config import RunConfig, key_lines, read_yaml  # noqa: E402
from ecocseg.errors import InputError, run_main  # noqa: E402
from ecocseg.storage import Storage, join  # noqa: E402
from ecocseg.sweep_report import Record, best, text_table  # noqa: E402

SPACES = Path(__file__).resolve().parent / "spaces"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        for path in sorted(SPACES.glob("*.yaml")):
            print(f"{path.relative_to(SPACES.parent.parent)}: {read_yaml(path).get('description', '')}")
        return 0
    spec = sweep.read_sweep(Path(args.space), args.overrides)
    base, space = sweep.base_config(spec), sweep.domains(spec)
    sweep.check(spec, base, space)
    storage = build_storage(base)
    url, spec = choose_folder(spec, base, storage, args.name, args.resume)
    lines = describe(spec, base, space)
    plan = None
    if not spec.codebooks:
        if base.launch.wait and not args.dry_run:
            scale.wait_for_room(base, print, spec.search.trials if spec.scheduler.kind == "pbt" else spec.concurrent or 1)
        population = spec.search.trials if spec.scheduler.kind == "pbt" else None  # has to train side by side
        plan = sweep.plan_trials(base, launch.cluster_nodes(), population or spec.concurrent,
                                 "search.trials" if population else "concurrent")
        spec = spec.model_copy(update={"concurrent": plan.concurrent})  # of a sweep that is gone on with it stays
        lines.append(f"trials      {plan.describe()}")
        launch.preflight(base, url)
    print("\n".join([*lines, f"folder      {url}"]))
    if args.dry_run:
        print("all checks passed; nothing was trained")
        return 0
    storage.write_bytes(join(url, "sweep.yaml"), settings(spec, base).encode())
    try:
        record = run(spec, base, space, plan, url)
    except launch.RunFailed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    return finish(record, url, spec.codebooks)


def parse(argv: list[str] | None) -> argparse.Namespace:
    keys = ["keys of a sweep (the same in its file; other dotted.key=value are the recipe's, see jobs/train_uda.py --help):",
            *key_lines(sweep.Sweep)]
    parser = argparse.ArgumentParser(description=__doc__, epilog="\n".join(keys),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", metavar="FILE", default=str(SPACES / "demo_code.yaml"),
                        help="search space (default tune/spaces/demo_code.yaml)")
    parser.add_argument("--name", help="name of the sweep's folder under run.directory (default: name and time)")
    parser.add_argument("--list", action="store_true", help="show the spaces that are there and exit")
    parser.add_argument("--dry-run", action="store_true", help="check keys, values, data and cluster; train nothing")
    cli.add_resume(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the sweep, or of the recipe for all trials")
    return parser.parse_intermixed_args(cli.words(argv))


def settings(spec: sweep.Sweep, base: RunConfig) -> str:
    """What a sweep that is gone on with must have in common with the one before."""
    return f"{sweep.to_yaml(spec)}# of the recipe:\n" + "".join(f"# {line}\n" for line in base.to_yaml().splitlines())


def choose_folder(spec: sweep.Sweep, base: RunConfig, storage: Storage, name: str | None,
                  resume: str | None) -> tuple[str, sweep.Sweep]:
    """The sweep's folder: a new one, or with --resume that of the name, or the newest; and the sweep, with as many trials at
    a time as it had before.

    Raises:
        InputError: when there is a sweep where there should be none, none where there should be one, or another one.
    """
    root = cluster.absolute(base.run.directory)
    storage.check(root)
    if name is None and resume is not None:
        named = re.compile(re.escape(spec.name) + r"-\d{8}-\d{6}")
        name = max((n for n in storage.list_dirs(root) if named.fullmatch(n)), default=None)
        if name is None and resume == "yes":
            raise InputError(f"--resume: no sweep of '{spec.name}' under {root}; start without it, or name it with --name")
    url = join(root, name or f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    there = storage.exists(join(url, "sweep.yaml"))
    if there and resume is None:
        raise InputError(f"--name: {url} already holds a sweep; go on with --resume, or choose another name")
    if not there and resume == "yes":
        raise InputError(f"--resume: {url} holds no sweep; start without it")
    if there:
        text = storage.read_bytes(join(url, "sweep.yaml")).decode()
        if spec.concurrent is None:
            spec = spec.model_copy(update={"concurrent": yaml.safe_load(text)["concurrent"]})
        before, now = text.splitlines(), settings(spec, base).splitlines()
        other = [line.strip("# ") for line in now if line not in before]
        if other:
            raise InputError(f"--resume: {url} holds a sweep with other settings ({'; '.join(other[:5])}); give the command it "
                             "was started with, or choose another --name")
    return url, spec


def describe(spec: sweep.Sweep, base: RunConfig, space: dict[str, sweep.Domain]) -> list[str]:
    search, goals = spec.search, spec.goals
    given = sweep.points(spec, space)
    lines = [f"sweep       {spec.name}: {spec.description}", f"recipe      {base.recipe}"]
    lines += [f"space       {key}: {domain.describe()}" for key, domain in space.items()]
    lines += [f"search      {search.algorithm}, {search.trials if given is None else len(given)} trials"
              + ("" if spec.scheduler.kind == "none" else f", {spec.scheduler.kind} every "
                 f"{spec.scheduler.every or base.train.eval_every} of {base.train.steps} steps"),
              "objectives  " + ", then ".join(f"{name} ({way})" for name, way in goals.items())]
    return lines


def run(spec: sweep.Sweep, base: RunConfig, space: dict[str, sweep.Domain], plan: sweep.Plan | None, url: str) -> Record:
    if plan is None:
        from ecocseg.sweep_codebooks import rank_codebooks

        return rank_codebooks(spec, base, space, url)
    from ecocseg import sweep_trials

    return sweep_trials.run(spec, space, base, plan, url)


def finish(record: Record, url: str, codebooks: bool) -> int:
    print(f"\n{text_table(record)}\n")
    top = best(record)
    if top is None:
        print("failed: no trial has a result; the table says why", file=sys.stderr)
        return 1
    print(f"best: {top.name}; python jobs/train_uda.py --config {join(url, 'best.yaml')}")
    print(f"written: {url}  (index.html, results.csv, best.yaml, results.json, "
          f"{'sweep.yaml' if codebooks else 'a folder per run'})")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

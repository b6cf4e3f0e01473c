"""The command line that jobs/train_uda.py and its siblings share: read a recipe, check, train, sum up."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ecocseg import batching, checkpoint, expect, launch, memory, preflight, stpp, streams
from ecocseg.config import RECIPES, RunConfig, help_text, load, recipe_names, with_values
from ecocseg.data.classes import CLASS_LISTS, ClassList
from ecocseg.errors import InputError
from ecocseg.metrics import EvalResult, table
from ecocseg.report import Run, final_scores, scores_table
from ecocseg.smoke import smoke
from ecocseg.storage import is_remote, join
from ecocseg.tracking import ProgressDisplay

SETTINGS = ("data", "model", "coding", "method", "optim", "train", "eval")
"""Sections that decide a result."""
SOURCE_ONLY: dict[str, dict[str, Any]] = {"method": {"kind": "supervised", "feature_distance": 0.0, "pseudo_labels": False}}


def main(description: str, default_recipe: str, argv: Sequence[str] | None = None) -> int:
    args = parse(description, default_recipe, argv)
    if args.list:
        print(list_recipes(load(default_recipe).is_adaptation))
        return 0
    config = load(args.recipe, args.config, args.overrides)
    if args.smoke:
        config = smoke(config, "data/smoke", make=not args.print_config)
    if args.print_config:
        print(config.to_yaml(), end="")
        return 0
    if args.dry_run:
        print(dry_run_without_data(config) if args.no_data else dry_run(config))
        return 0
    display = ProgressDisplay()
    try:
        if args.seeds or args.variants:
            if args.resume:
                display.print("--resume: goes without saying with --seeds and --variants; finished runs are kept, others are "
                              "gone on with")
            return run_many(config, args, display)
        return run_one(config, args.resume, display)
    except launch.RunFailed as failure:
        display.close()
        print(f"failed: {failure}", *[f"run folder: {url}" for url in [failure.run_url] if url], sep="\n", file=sys.stderr)
        return 1
    finally:
        display.close()


def parse(description: str, default_recipe: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--recipe", default=default_recipe, help=f"recipe by name (default {default_recipe})")
    which.add_argument("--config", metavar="FILE", help="recipe from a YAML file; may name a `base:`")
    parser.add_argument("--list", action="store_true", help="show the recipes and exit")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and exit")
    parser.add_argument("--dry-run", action="store_true", help="check everything that can be checked without training")
    parser.add_argument("--no-data", action="store_true", help="with --dry-run: check what needs neither data nor GPU")
    parser.add_argument("--smoke", action="store_true",
                        help="the recipe's method, coding and decoder on toy pictures in small sizes: seconds on any machine")
    add_resume(parser)
    parser.add_argument("--seeds", metavar="0,1,2", help="run once for each seed and sum up")
    parser.add_argument("--variants", metavar="FILE", help="YAML of named overrides; each is run and compared")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    return parser.parse_intermixed_args(words(argv))


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", nargs="?", const="yes", choices=("yes", "auto"), metavar="auto",
                        help="go on from the newest checkpoint; `auto` starts anew when there is none")


def words(argv: Sequence[str] | None) -> list[str]:
    """The command's words; `--resume key=value` means a plain --resume."""
    found = list(sys.argv[1:] if argv is None else argv)
    for at, word in enumerate(found):
        if word == "--resume" and found[at + 1:at + 2] not in (["auto"], ["yes"]):
            found[at] = "--resume=yes"
    return found


def list_recipes(adaptation_first: bool = True) -> str:
    """Every recipe with its method, model, schedule, data, published result and what it takes; adaptation or few labels
    first."""
    expected = expect.stored()
    blocks: dict[bool, list[str]] = {True: [], False: []}
    for name in recipe_names():
        config = load(name)
        model, train, data, takes = config.model, config.train, config.data, expected[name]
        urls = [url for url in (data.labeled, data.unlabeled, *data.eval.values()) if url is not None]
        unlabeled = f" + {train.unlabeled_batch}" if config.needs_unlabeled else ""
        lines = [f"{name}: {config.description}",
                 f"  {config.method.kind}, {model.encoder} + {model.head} ({takes['parameters']} M parameters), {train.steps} "
                 f"steps of {train.labeled_batch}{unlabeled} images", f"  data       {', '.join(urls)}"]
        lines += [f"  published  {text}" for text in (config.published, config.cost) if text]
        hours = f"{takes['hours']:g}" if takes["hours"] >= 0.1 else "under 0.1"
        lines.append(f"  estimated  {hours} h on {takes['gpus']} GPU(s) of {expect.gpu_rate(config) / 1e12:g} TFLOP/s, "
                     f"{takes['gb']} GB each")
        blocks[config.is_adaptation].append("\n".join(lines))
    titles = {True: "to another domain (jobs/train_uda.py)", False: "few labels (jobs/train_ssl.py)"}
    order = (adaptation_first, not adaptation_first)
    return "\n".join(line for kind in order for line in (f"# {titles[kind]}", *blocks[kind]))


def dry_run(config: RunConfig) -> str:
    """Check config, data, storage, resources and model shapes; returns what was found."""
    config, run_url = launch.choose_run(config, "auto" if config.run.name else None)
    resources = launch.plan_on_nodes(config, launch.cluster_nodes())
    launch.preflight(config, run_url, resources.possible)
    manifests = streams.load_manifests(config)
    lines = [f"recipe      {config.recipe}: {config.description}", f"run folder  {run_url} (writable)"]
    buckets = [url for url in (run_url, *(m.url for m in manifests.values())) if is_remote(url)]
    lines += [f"storage     credentials from {checkpoint.build_storage(config).credentials(url)}" for url in buckets[:1]]
    lines += [f"data        {name}: {m.num_rows} images, {m.num_labeled} with masks, {len(m.files)} shard(s) of the right "
              f"size, {m.url}"
              for name, m in manifests.items()]
    lines += [*task_lines(config, manifests["labeled"].classes, forward=True, workers=resources.workers),
              f"resources   {resources.describe()}; {batching.micro_batches(config, resources.workers)} micro-batch(es)",
              "all checks passed; nothing was trained"]
    return "\n".join(lines)


def dry_run_without_data(config: RunConfig) -> str:
    """Check what a recipe says without its data: classes, coding, model and batches. The model is only counted."""
    if config.data.classes is None:
        raise InputError("--no-data: data.classes is not set; name the built-in class list the data would have")
    urls = {"labeled": config.data.labeled, "unlabeled": config.data.unlabeled, **config.data.eval}
    preflight.check_task(config, CLASS_LISTS[config.data.classes])
    lines = [f"recipe      {config.recipe}: {config.description}"]
    lines += [f"data        {name}: {url} (not looked at)" for name, url in urls.items() if url is not None]
    lines += [*task_lines(config, CLASS_LISTS[config.data.classes], forward=False),
              f"batches     {config.train.labeled_batch} labelled"
              + (f" + {config.train.unlabeled_batch} unlabelled" if config.needs_unlabeled else "")
              + f" images a step, {config.train.steps} steps",
              "all checks passed that need no data; nothing was trained"]
    return "\n".join(lines)


def task_lines(config: RunConfig, classes: ClassList, forward: bool, workers: int = 1) -> list[str]:
    """Classes, coding, model and memory of a run; with `forward` the model is built, run once, and its output's shape shown."""
    import torch

    book = checkpoint.build_codebook(config.coding, classes)
    coding = checkpoint.build_coding(config.coding, book, classes.num_classes)
    with torch.device("cpu" if forward else "meta"):
        model = checkpoint.build_model(config.model, coding.num_outputs, pretrained=forward,
                                       storage=checkpoint.build_storage(config)).eval()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    shape = ""
    if forward:
        with torch.no_grad():
            image = torch.zeros(1, 6 if config.model.siamese else 3, *config.data.crop)
            shape = f", crop {tuple(config.data.crop)} -> logits {tuple(model(image).shape)}"
    return [f"classes     {classes.num_classes}: {', '.join(classes.names)}", f"coding      {coding.describe()}",
            f"model       {config.model.encoder} + {config.model.head}: {size:.2f} M parameters{shape}",
            f"learning    {batching.lr_line(config)}",
            f"memory      {memory.estimate(config, model, workers, batching.micro_batches(config, workers)).describe()}"]


def run_one(config: RunConfig, resume: str | None, display: ProgressDisplay) -> int:
    """Train one configuration; with `train.compare_with_source_only` the source-only baseline first."""
    config, run_url = launch.choose_run(config, resume)
    before = None
    if config.train.compare_with_source_only and config.needs_unlabeled:
        before = finished_or_train(source_only(config), display)
    result = train(config, "auto" if resume else None, display)
    display.close()
    print_results(before, result, display)
    inside = f"{stpp.FOLDERS}, result.json" if config.method.kind == "stpp" else (
        "config.yaml, checkpoints/, metrics.jsonl, tensorboard/, panels/, result.json")
    for url in [run_url] + ([before.run_url] if before else []):
        print(f"written: {url}  ({inside})")
    return 0


def train(config: RunConfig, resume: str | None, display: ProgressDisplay) -> launch.RunResult:
    """One run, or the chain of runs that ST++ is."""
    if config.method.kind != "stpp":
        return launch.train(config, resume, display)
    return stpp.train(config, lambda stage: finished_or_train(stage, display),
                      lambda text: display.update({"kind": "message", "text": text}))


def source_only(config: RunConfig) -> RunConfig:
    """The same recipe on labelled images alone, in a run folder beside it."""
    plain = config.updated(**SOURCE_ONLY)
    return plain.updated(run={"name": f"{config.run.name}-source-only"}, train={"compare_with_source_only": False})


def finished_or_train(config: RunConfig, display: ProgressDisplay) -> launch.RunResult:
    """The result of a run that is there already, else train it, going on from what it has.

    Raises InputError where the folder's run had other settings: its result is not this one's.
    """
    storage = checkpoint.build_storage(config)
    config, run_url = launch.choose_run(launch.with_absolute_paths(config), "auto")
    if storage.exists(join(run_url, "config.yaml")):
        before = yaml.safe_load(storage.read_bytes(join(run_url, "config.yaml")))
        now = config.model_dump(mode="json")
        other = [f"{section}.{key}" for section in SETTINGS for key, value in now[section].items()
                 if before.get(section, {}).get(key, value) != value]
        if other:
            raise InputError(f"run.name: {run_url} holds a run with other settings ({', '.join(other)}); choose another "
                             "run.name, or delete it")
    if storage.exists(join(run_url, "result.json")):
        final = json.loads(storage.read_bytes(join(run_url, "result.json")))
        return launch.RunResult(run_url, final["step"], final["results"], final["classes"], final)
    return train(config, "auto", display)


def print_results(before: launch.RunResult | None, after: launch.RunResult, display: ProgressDisplay) -> None:
    """A table per evaluation set: per-class IoU before and after adaptation, or of student and teacher."""
    for name, by_model in after.results.items():
        columns: dict[str, EvalResult] = {}
        if before is not None:
            columns["source only"] = EvalResult.from_dict(before.results[name]["student"])
        for which in ("teacher", "student"):
            if which in by_model:
                title = "adapted" if before is not None and which == "student" else which
                columns[title] = EvalResult.from_dict(by_model[which])
        display.print_table(table(columns, after.classes, difference=before is not None), f"evaluation on '{name}'")


def run_many(config: RunConfig, args: argparse.Namespace, display: ProgressDisplay) -> int:
    """Run every variant with every seed, skipping those whose result is there, and print mean and deviation. A run that fails
    is named in the table, and makes the exit code 1."""
    seeds = read_seeds(args.seeds) if args.seeds else [config.train.seed]
    variants = read_variants(args.variants) if args.variants else {config.recipe: {}}
    base = config.run.name or config.recipe
    planned = [(name, seed, with_values(config, overrides).updated(
                    train={"seed": seed, "compare_with_source_only": False},
                    run={"name": f"{base}/{name.replace(' ', '-')}-seed{seed}"}))
               for seed in seeds for name, overrides in variants.items()]
    runs: list[Run] = []
    for name, seed, one in planned:
        try:
            last = final_scores(finished_or_train(one, display).results)
        except launch.RunStopped:
            raise
        except launch.RunFailed as failure:  # the others still run, and the table names it
            display.print(f"failed: {failure}")
            last = {}
        runs.append(Run(name, seed, last, last, []))
    display.close()
    print(scores_table(runs))
    return 0 if all(run.last for run in runs) else 1


def read_seeds(text: str) -> list[int]:
    seeds = [part.strip() for part in text.split(",")]
    bad = [seed for seed in seeds if not (seed.isascii() and seed.isdigit())]
    if bad:
        raise InputError(f"--seeds: {', '.join(map(repr, bad))} in '{text}' is no seed; give whole numbers from 0 on, for "
                         "example --seeds 0,1,2")
    return [int(seed) for seed in seeds]


def read_variants(path: str) -> dict[str, dict[str, Any]]:
    try:
        variants = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--variants: cannot read {path}: {error}") from None
    if not isinstance(variants, dict) or not all(isinstance(v, dict | None) for v in variants.values()):
        raise InputError(f"--variants: {path} must map names to dotted overrides; see {RECIPES.parent.parent / 'jobs'}")
    return {str(name): value or {} for name, value in variants.items()}

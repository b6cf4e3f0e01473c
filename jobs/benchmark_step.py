"""`benchmark.py step`: a whole step of a recipe, one-hot beside ECOC, by turns in one process.

The recipe's own model, method, teacher, optimizer and precision on random images: everything of a step but reading data. Peaks
of memory are measured in processes of their own.
Shapes: B batch, H W pixels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import benchmark
from benchmark_coding import class_map, seconds

FORMS = {"one_hot": "one-hot", "ecoc": "ECOC"}


def recipe_step(form: str, args: argparse.Namespace) -> Callable[[], None]:
    """A function that makes a step of the recipe with this coding."""
    import torch

    from ecocseg import checkpoint
    from ecocseg.config import load
    from ecocseg.data.classes import CLASS_LISTS
    from ecocseg.data.pipeline import Batch
    from ecocseg.engine import World, build_engine
    from ecocseg.evaluate import Normalize
    from ecocseg.methods import METHODS, StepInput
    from ecocseg.methods.base import random_generator
    from ecocseg.models.segmenter import parameter_groups
    from ecocseg.teacher import Teacher

    config = load(args.recipe, overrides=[f"coding.kind={form}", "engine.kind=torch", "model.pretrained=null",
                                          "method.feature_distance=0"])
    assert config.data.classes is not None
    classes = CLASS_LISTS[config.data.classes]
    world = World(device=torch.device(args.device))
    torch.manual_seed(0)
    coding = checkpoint.build_coding(config.coding, checkpoint.build_codebook(config.coding, classes), classes.num_classes)
    model = checkpoint.build_model(config.model, coding.num_outputs, pretrained=False).to(args.device)
    if config.engine.channels_last:
        model.memory_format = torch.channels_last
    kind = METHODS[config.method.kind]
    method = kind(config.method, coding, Normalize(config.data.mean, config.data.std))
    teacher = Teacher(model, config.method.ema_decay, kind.whole_teacher) if kind.needs_teacher else None
    groups = parameter_groups(model, config.optim.lr, config.optim.decoder_lr_factor, config.optim.weight_decay,
                              config.optim.no_decay)
    engine = build_engine(model, groups, config.optim, config.engine, world, args.batch)
    args.classes = classes.num_classes
    torch.manual_seed(1)
    sizes = argparse.Namespace(**vars(args))

    def batch(labelled: bool) -> Batch:
        shape = (args.batch, args.size, args.size)
        labels_BHW = class_map(sizes) if labelled else None
        image = torch.randint(0, 256, (args.batch, 6 if config.model.siamese else 3, *shape[1:]), dtype=torch.uint8)
        return Batch(image, labels_BHW, torch.ones(shape, dtype=torch.bool), torch.arange(args.batch), []).to(
            torch.device(args.device))

    labeled, unlabeled, partner = batch(True), batch(False), batch(False)
    made = 0

    def step() -> None:
        nonlocal made
        torch.manual_seed(made)  # dropout and stochastic depth, the same for both codings
        if teacher is not None and made:
            teacher.update(model)
        given = StepInput(made, 0, labeled, unlabeled if config.needs_unlabeled else None, engine, teacher, engine.autocast,
                          model=model, partner=partner, unlabeled_total=args.batch)
        model.begin_step(random_generator(0, made, 8))
        parts = method.parts(given)
        for index, part in enumerate(parts):
            engine.run_part(part, 1.0, index == len(parts) - 1)
        engine.step()
        made += 1

    return step


def case(args: argparse.Namespace) -> dict[str, float]:
    """Steps of one coding, their peak of memory above model and images."""
    args.repeats = 1
    return benchmark.measure(recipe_step(args.case, args), args)


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    print(f"{args.recipe}: {args.batch} + {args.batch} images of {args.size} x {args.size}, {args.device}, "
          f"{torch.get_num_threads()} thread(s)")
    steps = {form: recipe_step(form, args) for form in FORMS}
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for number in range(args.repeats + 1):
        for form in FORMS if number % 2 else reversed(FORMS):
            taken = seconds(steps[form], args)
            if number:  # the first step makes the optimizer's state
                times[form].append(taken)
    del steps
    rows: list[dict[str, Any]] = []
    print(f"{'coding':<10}{'median s':>9}{'least':>8}{'most':>8}{'CPU s':>8}{'MB':>8}{'time':>9}{'CPU time':>10}{'memory':>9}")
    for form, shown in FORMS.items():
        clock, cpu = zip(*times[form], strict=True)
        row = {"form": form, "seconds": statistics.median(clock), "least": min(clock), "most": max(clock),
               "cpu_seconds": statistics.median(cpu), "megabytes": benchmark.in_own_process(form, sys.argv[1:])["megabytes"]}
        rows.append(row)
        change = [f"{100 * (row[name] / rows[0][name] - 1):+.1f} %" for name in ("seconds", "cpu_seconds", "megabytes")]
        print(f"{shown:<10}{row['seconds']:>9.3f}{row['least']:>8.3f}{row['most']:>8.3f}{row['cpu_seconds']:>8.3f}"
              f"{row['megabytes']:>8.0f}{change[0]:>9}{change[1]:>10}{change[2]:>9}", flush=True)
    return rows

"""ST++ (Yang et al., CVPR 2022): one network's labels teach the next, the most stable images first.

A chain of ordinary runs and labelled pools in one folder: `teacher` learns the labelled images and labels the others
(`labels`); `round1` learns the images whose predictions changed least over the teacher's checkpoints (`labels/stable`), then
labels those that were left (`labels/rest`); `round2` learns all (`labels/second`: the teacher's labels of the stable images,
its student's of the rest). What is finished is not made again, and what is not goes on, whatever ended the chain.

The released code labels with the best checkpoint on the evaluation images; here it is the last one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import torch

from ecocseg import checkpoint, inference, labelling, launch
from ecocseg.config import RunConfig
from ecocseg.data.shards import Manifest, read_manifest
from ecocseg.labelling_shard import GPU_BATCH, Labeler
from ecocseg.launch import TEACHER, RunResult
from ecocseg.storage import join

FIRST, SECOND, LABELS = "round1", "round2", "labels"
FOLDERS = f"{TEACHER}/, {FIRST}/, {SECOND}/, {LABELS}/"


def train(config: RunConfig, run: Callable[[RunConfig], RunResult], say: Callable[[str], None]) -> RunResult:
    """The whole chain; the result is that of its last run.

    Args:
        config: with `method.kind` stpp and the run named.
        run: trains a stage, or gives the result of one that is there.
        say: told what is labelled.

    Raises:
        InputError, launch.RunFailed: as each stage does.
    """
    config, run_url = launch.choose_run(launch.with_absolute_paths(config), "auto")
    launch.preflight(config, run_url)
    storage = checkpoint.build_storage(config)

    def label(pool: Manifest, by: str, steps: Sequence[int], out: str, together: Manifest | None = None) -> Manifest:
        say(f"labelling {pool.num_rows} images by {by}, into {out}")
        urls = [join(run_url, by, "checkpoints", f"step_{step:08d}") for step in steps]
        return label_pool(config, urls, pool, out, together)

    teacher, labels = teacher_stage(config), join(run_url, LABELS)
    run(teacher)
    storage.write_bytes(join(run_url, "config.yaml"), config.to_yaml().encode())
    last, every = teacher.train.steps, teacher.train.checkpoint_every
    first = label(read_manifest(str(config.data.unlabeled), storage), TEACHER, [last, *range(every, last, every)], labels)
    parts = labelling.divide(first, config.method.stable_share, storage)
    student = student_stage(config, FIRST, parts["stable"].url)
    run(student)
    second = label(parts["rest"], FIRST, [student.train.steps], join(labels, "second"), parts["stable"])
    final = run(student_stage(config, SECOND, second.url)).final
    storage.write_bytes(join(run_url, "result.json"), json.dumps(
        {"recipe": config.recipe, "seed": config.train.seed, **final}, indent=1).encode())
    return RunResult(run_url, final["step"], final["results"], final["classes"], final)


def teacher_stage(config: RunConfig) -> RunConfig:
    """The run of labelled images alone, in batches as large as the students' two; its checkpoints of each third are kept.

    The recipe's learning rate is meant for that larger batch here, and follows optim.lr_rule from there as the students' does.
    """
    steps = config.method.teacher_steps or config.train.steps
    third = -(-steps // 3)
    labeled, batch = config.train.labeled_batch, config.train.labeled_batch + config.train.unlabeled_batch
    lr_batch = max(1, round((config.optim.lr_batch or labeled) * batch / labeled))
    return config.updated(
        method={"kind": "supervised"}, run={"name": join(str(config.run.name), TEACHER)}, optim={"lr_batch": lr_batch},
        train={"steps": steps, "labeled_batch": batch, "checkpoint_every": third, "eval_every": third,
               "keep_checkpoints": steps, "compare_with_source_only": False})


def student_stage(config: RunConfig, name: str, labels: str) -> RunConfig:
    """A run of labelled images and of a labelled pool, whose images are each seen as often in either round."""
    share = config.method.stable_share if name == FIRST else 1.0
    return config.updated(
        method={"kind": "supervised", "pseudo_labels": True}, run={"name": join(str(config.run.name), name)},
        data={"unlabeled": labels},
        train={"steps": max(1, round(share * config.train.steps)), "compare_with_source_only": False})


def label_pool(config: RunConfig, checkpoints: Sequence[str], pool: Manifest, out: str,
               together: Manifest | None = None) -> Manifest:
    """The pool labelled by the first of the checkpoints and compared with the others."""
    storage, method = checkpoint.build_storage(config), config.method
    last, *earlier = (inference.load(url, "student", storage, torch.device("cpu")) for url in checkpoints)
    weighted = method.weighting == "image" or last.coding.weighting == "image"
    spec = last.spec
    if method.label_scales:
        spec = dataclasses.replace(spec, scales=method.label_scales, flip=True)
    workers, device = labelling.place_workers(None, "cpu" if config.launch.gpu is False else None, len(pool.files))
    labeler = Labeler(last, spec, method.confidence_threshold if weighted else 0.0, tuple(earlier),
                      GPU_BATCH if workers.gpus else 1)
    plan = labelling.Plan(pool, out, storage, labeler.describe(), last.class_list)
    return labelling.label_pool(labeler, plan, workers, device, together=together, overwrite=True)

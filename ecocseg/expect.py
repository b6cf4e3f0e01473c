"""What a recipe takes of GPUs, hours and memory: estimates from its model's operations, and a table of them for `--list`.

The table lies beside the recipes; `python jobs/benchmark.py recipes --json ecocseg/recipes/expected.json` makes it again.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ecocseg import batching, checkpoint, memory
from ecocseg.config import RECIPES, ModelConfig, RunConfig, load, recipe_names
from ecocseg.data.classes import CLASS_LISTS
from ecocseg.methods import METHODS

TABLE = RECIPES / "expected.json"
GPU_RATE = 20e12
"""Operations a second that a GPU is taken to reach in training: an eighth of what NVIDIA states for an A100 in TF32. UniMatch
on VOC at 513, 16.8 hours on two GPUs in ECOCSeg's table, is 17e12 by the same count."""
ENCODER_RATES = {"mit_b": 3.3e12}
"""The same for encoders, by how their names begin, that are much slower than their operations: MiT's depthwise convolutions
and attention over few images wait for memory. Of DAFormer's 13.7 hours on one GPU in that table; its authors' 16 hours on an
RTX 2080 Ti say the same."""
LONG_HOURS, GPU_GB = 24, 80


def step_operations(config: RunConfig) -> float:
    """Floating-point operations of a step: a forward pass counts once, the backward pass of those with a gradient twice."""
    kind = METHODS[config.method.kind]
    learning, labelling = kind.images_per_step(config.train.labeled_batch,
                                               config.train.unlabeled_batch if config.needs_unlabeled else 0)
    labelling += config.train.labeled_batch * (config.method.feature_distance > 0)  # by the frozen encoder, most of a model
    height, width = config.data.crop
    return _forward_operations(config.model.model_dump_json(), height, width) * (3 * learning + labelling)


@functools.cache  # recipes of a family share a model
def _forward_operations(model_json: str, height: int, width: int) -> float:
    config = ModelConfig.model_validate_json(model_json)
    with torch.device("meta"):
        model = checkpoint.build_model(config, 1, pretrained=False).train()
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.empty(2, 6 if config.siamese else 3, height, width, device="meta"))
    return counter.get_total_flops() / 2


def gpu_rate(config: RunConfig) -> float:
    """Operations a second that a GPU is taken to reach with a recipe's encoder."""
    return next((rate for start, rate in ENCODER_RATES.items() if config.model.encoder.startswith(start)), GPU_RATE)


def expect(config: RunConfig) -> dict[str, Any]:
    """Parameters in millions, and for the fewest GPUs (1, 2, 4 or 8) that need no more than a day and 80 GB each, or for 8:
    their number, hours, and GB of each."""
    steps: float = config.train.steps
    if config.method.kind == "stpp":  # a teacher and two students; labelling is little beside them
        steps = (config.method.teacher_steps or steps) + (config.method.stable_share + 1) * steps
    hours = steps * step_operations(config) / gpu_rate(config) / 3600
    num_classes = CLASS_LISTS[config.data.classes].num_classes if config.data.classes else 1
    with torch.device("meta"):
        model = checkpoint.build_model(config.model, num_classes, pretrained=False)
    batches = [config.train.labeled_batch] + ([config.train.unlabeled_batch] if config.needs_unlabeled else [])
    found: dict[str, Any] = {}
    for gpus in (n for n in (1, 2, 4, 8) if not any(batch % n for batch in batches)):
        gb = memory.estimate(config, model, gpus, batching.micro_batches(config, gpus)).total / memory.GB
        found = {"parameters": round(sum(p.numel() for p in model.parameters()) / 1e6, 1), "gpus": gpus,
                 "hours": float(f"{hours / gpus:.2g}"), "gb": round(gb, 1)}
        if hours / gpus <= LONG_HOURS and gb <= GPU_GB:
            break
    return found


def table() -> dict[str, dict[str, Any]]:
    """`expect` of every recipe."""
    return {name: expect(load(name)) for name in recipe_names()}


def stored() -> dict[str, dict[str, Any]]:
    """The table that lies beside the recipes."""
    found: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found

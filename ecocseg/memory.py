"""How much memory a worker's step will take, told before it is taken: instead of an out-of-memory after minutes.

What autograd keeps is not guessed: the model runs forward once on torch's meta device, where tensors have shapes and no
content, and what it saves for the backward pass is counted. Evaluation, allocator gaps and the strips of rows that losses
work in are not counted.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecocseg import batching
from ecocseg.config import RunConfig
from ecocseg.engine import World
from ecocseg.errors import InputError
from ecocseg.methods import METHODS

BF16_SHARE = 0.6
"""What autocast to bf16 leaves of activations kept in fp32: norms, softmax and losses stay."""
CUDA_CONTEXT = 10**9
"""Bytes that CUDA, cuDNN and NCCL take for themselves, about."""
GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Bytes of one worker at the height of its step."""

    weights: int
    """Student, and what else has its size and no gradient: teacher, pretrained encoder."""
    gradients: int
    optimizer: int
    activations: int
    images: int
    """Images in the largest graph of the step."""
    snapshot: int = 0
    """Host memory of rank 0 while a checkpoint is written: the copy it is written from."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        return (f"about {self.total / GB:.1f} GB per worker: weights and teacher {self.weights / GB:.1f}, gradients "
                f"{self.gradients / GB:.1f}, optimiser {self.optimizer / GB:.1f}, activations of {self.images} image(s) "
                f"{self.activations / GB:.1f}; a checkpoint takes {self.snapshot / GB:.1f} GB of host memory "
                "while it is written")


def saved_bytes(model: nn.Module, images: int, size: tuple[int, int], channels: int = 3) -> int:
    """Bytes that the forward pass of a model on the meta device saves for its backward pass, each tensor once."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}  # the tensors are held, so that no other can take their place

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.empty(images, channels, *size, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def estimate(config: RunConfig, model: nn.Module, workers: int, micro_batches: int) -> Estimate:
    """What a step of `model` (on any device, left as it is) takes of each of `workers` workers."""
    kind = METHODS[config.method.kind]
    meta = copy.deepcopy(model).to("meta").train()
    parameters = 4 * sum(p.numel() for p in meta.parameters())
    copies = 1 + kind.needs_teacher + (config.method.feature_distance > 0)
    shard = workers if config.engine.kind == "deepspeed" and config.engine.zero_stage > 0 else 1
    states = 2 if config.optim.kind == "adamw" else 1
    share = workers * micro_batches
    labeled, unlabeled = config.train.labeled_batch // share, config.train.unlabeled_batch // share
    images = kind.images_in_graph(labeled, unlabeled if config.needs_unlabeled else 0)
    channels = 6 if config.model.siamese else 3
    saved = saved_bytes(meta, 2, config.data.crop, channels) / 2  # batch norm refuses a single image in training
    if config.engine.precision == "bf16":
        saved *= BF16_SHARE
    # DeepSpeed keeps the flat partition its optimiser works on beside the weights.
    optimizer = (states + (config.engine.kind == "deepspeed" and config.engine.zero_stage > 0)) * parameters // shard
    snapshot = (1 + kind.needs_teacher + states) * parameters
    return Estimate(copies * parameters, parameters, optimizer, int(images * saved), images, snapshot)


def check(config: RunConfig, model: nn.Module, world: World, micro_batches: int) -> Estimate | None:
    """See that a step fits this worker's device; None where the model cannot run without content.

    Raises:
        InputError: with the numbers and what to change. `launch.check_memory=false` leaves it to the device.
    """
    try:
        found = estimate(config, model, world.size, micro_batches)
    except (NotImplementedError, RuntimeError):  # an encoder that looks at its input's values
        return None
    there = available_bytes(world.device)
    needed = found.total + (found.snapshot if world.device.type == "cpu" and world.rank == 0 else 0)
    if config.launch.check_memory and needed > there:
        raise InputError(refusal(config, found, there, world.size, micro_batches))
    return found


def refusal(config: RunConfig, found: Estimate, there: int, workers: int, micro_batches: int) -> str:
    """The message of a step that does not fit, with the keys that make it smaller and are not at their end."""
    smaller = smaller_micro_batch(config, workers, micro_batches)
    remedies = [] if smaller is None else [f"train.micro_batch={smaller} (accumulation follows)"]
    remedies += [] if config.model.activation_checkpointing else ["model.activation_checkpointing=true"]
    remedies += [] if config.engine.precision == "bf16" else ["engine.precision=bf16"]
    remedies += ["engine.zero_stage=1"] if config.engine.zero_stage == 0 else []
    remedies.append(f"a smaller data.crop than {config.data.crop[0]} x {config.data.crop[1]}")
    return (f"memory: a step takes {found.describe()}; this device has {there / GB:.1f} GB. Use {', '.join(remedies)}, or more "
            "workers; launch.check_memory=false tries all the same")


def smaller_micro_batch(config: RunConfig, workers: int, micro_batches: int) -> int | None:
    """The largest train.micro_batch below what a worker takes at once now that method, head and batches allow, or None."""
    for size in range(config.train.labeled_batch // (workers * micro_batches) - 1, 0, -1):
        try:
            number = batching.micro_batches(config.updated(train={"micro_batch": size}), workers)
            return config.train.labeled_batch // (workers * number)
        except InputError:
            continue
    return None


def available_bytes(device: torch.device) -> int:
    """What a worker can have of its device: a GPU's memory less what CUDA takes, or its share of the free RAM."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) - CUDA_CONTEXT
    import psutil

    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

"""What the commands that use a finished model share: its weights, the device, and flags on how to predict."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ecocseg.errors import InputError
from ecocseg.evaluate import EvalSpec
from ecocseg.storage_options import add_storage_arguments

if TYPE_CHECKING:
    from ecocseg.checkpoint import Loaded
    from ecocseg.storage import Storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for device, storage and prediction; what is not given stays as the checkpoint's configuration has it."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, else cpu)")
    add_storage_arguments(parser, "what the environment says, else AWS; for data what the checkpoint's run has")
    group = parser.add_argument_group("how to predict (default: as the checkpoint's run did)")
    group.add_argument("--mode", choices=["whole", "slide"], help="whole image, or overlapping windows")
    group.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="window size in pixels")
    group.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="pixels between windows")
    group.add_argument("--resize", type=int, nargs=2, metavar=("H", "W"),
                       help="test size in pixels; 0 0 = the image's own; predictions return to the original size")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, help="average with the mirrored image")
    group.add_argument("--scales", type=float, nargs="+", metavar="S", help="scales to average over, e.g. 0.75 1 1.25")
    group.add_argument("--average", choices=["logits", "probabilities"], help="what windows, flips and scales average")


def override(spec: EvalSpec, options: argparse.Namespace) -> EvalSpec:
    """The spec with what the command line gives put in place. InputError if the result makes no sense."""
    changes: dict[str, Any] = {}
    for name in ("mode", "flip", "average", "crop", "stride", "scales", "resize"):
        value = getattr(options, name)
        if value is not None:
            changes[name] = tuple(value) if isinstance(value, list) else value
    if changes.get("resize") == (0, 0):
        changes["resize"] = None
    return dataclasses.replace(spec, **changes)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; by default the first GPU, else the CPU. InputError if this machine does not have it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: {reason}; use --device cpu, or leave it out") from None
    return device


def load(path: str, which: str, storage: Storage, device: torch.device) -> Loaded:
    """A checkpoint's model on `device`, in eval mode; `which`: student, teacher, or auto (teacher if there is one)."""
    from ecocseg.checkpoint import load_for_inference

    storage.check(path)
    if which == "auto":
        student = load_for_inference(path, "student", storage)  # the error of a missing checkpoint is this one's
        try:
            loaded = load_for_inference(path, "teacher", storage)
        except InputError:
            loaded = student
    else:
        loaded = load_for_inference(path, which, storage)
    loaded.model.to(device).eval()
    return loaded


def autocast_dtype(loaded: Loaded) -> torch.dtype | None:
    """The precision the run evaluated in, so that the same numbers come out."""
    return torch.bfloat16 if loaded.config.engine.precision == "bf16" else None

"""From host to device without making the host wait.

A plain `tensor.to(device)` or `torch.tensor(..., device=device)` holds the host up until a GPU has done all it was given.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, through pinned memory and in the order of the device's work."""
    if device.type != "cuda":
        return tensor if device.type == "cpu" else tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """These numbers as a tensor, copied to a device once. It is shared: not to be changed in place."""
    with torch.inference_mode(False):
        return to_device(torch.tensor(values, dtype=dtype), device)

"""Triton kernels for the coding maths on GPUs, behind the Coding interface; losses.py, pseudo_labels.py and bits.py are the
fallback and the reference.

    geometry.py    label pixels over cells: tiles and their windows
    tile.py        what kernels share: upsampling as a product of matrices, class scores, packed bits
    decode.py      pseudo-labels
    loss.py        losses and their gradients
    count.py       evaluation
    operators.py   the kernels as torch operators
    dispatch.py    what codings and evaluation call
    costs.py       what each must move and compute at least

Triton is imported when a kernel is first used. With TRITON_INTERPRET=1 in the environment before that, kernels run on a CPU
in Triton's interpreter: for tests, at a few thousand pixels a second.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from ecocseg.errors import InputError
from ecocseg.kernels import geometry

Choice = Literal["auto", "torch", "triton"]
MAX_CLASSES, MAX_BITS = 256, 128
HAVE_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Kernels are run by Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check(choice: Choice, device: str) -> None:
    """InputError if this kind of device cannot do what `coding.kernels` asks for."""
    if choice != "triton" or device == "cuda" and HAVE_TRITON:
        return
    if not HAVE_TRITON:
        raise InputError("coding.kernels=triton: the package triton is not installed; use auto, or install triton")
    if not interpreted():
        raise InputError(f"coding.kernels=triton needs a CUDA device, and this runs on {device}; use auto or torch")


def supported(choice: Choice, logits_BKhw: Tensor, size: tuple[int, int], num_classes: int, align_corners: bool) -> bool:
    """Kernels take this case; else torch does. What they do not take: float64, more than 256 classes (1024 outputs) or 128
    bits, labels less than about 0.6 times as large as the logits, empty tensors."""
    if choice == "torch":
        return False
    check(choice, logits_BKhw.device.type)
    if choice == "auto" and not (logits_BKhw.device.type == "cuda" and HAVE_TRITON):
        return False
    if logits_BKhw.dtype not in DTYPES or not logits_BKhw.numel() or min(size) < 1:
        return False
    if num_classes > MAX_CLASSES or logits_BKhw.shape[1] > MAX_BITS and logits_BKhw.shape[1] != num_classes:
        return False
    source = (logits_BKhw.shape[-2], logits_BKhw.shape[-1])
    rows, columns = geometry.window(source, size, align_corners)
    return source == size or rows * columns <= geometry.MAX_WINDOW

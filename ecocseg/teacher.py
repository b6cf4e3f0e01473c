"""The teacher: an fp32 average of the student's parameters that labels what has no label."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Teacher:
    """Exponential moving average of a student.

    The average starts as a copy and its decay rises as min(1 - 1/(t+1), decay), with t = 1 at the first update (DACS,
    DAFormer; with `whole` t = 0). It lives outside the engine, so no sharding stage and no compiler prefix can hide a
    parameter from it, and `t` is in the checkpoint, so a restart never copies the student over it.

    Batch norm stays in training mode and keeps statistics of its own, as in the released DACS and DAFormer;
    dropout and stochastic depth are off.

    With `whole`, as in UniMatch V2, buffers are averaged too and batch norm uses them; updates are made after the optimiser's
    step instead of before the next one, and the first copies the student.
    """

    def __init__(self, student: nn.Module, decay: float, whole: bool = False) -> None:
        self.decay, self.whole = decay, whole
        self.updates = 0
        self.module = copy.deepcopy(student).float().requires_grad_(False)
        self.label_mode()

    def label_mode(self) -> None:
        self.module.eval()
        for module in () if self.whole else self.module.modules():
            if isinstance(module, _BatchNorm):
                module.train()

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move one step towards the student's parameters; called at the start of each step but the first, or with `whole`
        at the end of each."""
        self.updates += 1
        alpha = min(1 - 1 / (self.updates + (0 if self.whole else 1)), self.decay)
        mine: list[torch.Tensor] = list(self.module.parameters())
        theirs = [p.detach() for p in student.parameters()]
        if len(mine) != len(theirs):
            raise RuntimeError(f"teacher has {len(mine)} parameters, student {len(theirs)}")
        torch._foreach_lerp_(mine, [p.float() for p in theirs], 1 - alpha)
        for own, other in zip(self.module.buffers(), student.buffers(), strict=True) if self.whole else ():
            if own.is_floating_point():
                own.lerp_(other.float(), 1 - alpha)
            else:  # a count of batches
                own.copy_(other)

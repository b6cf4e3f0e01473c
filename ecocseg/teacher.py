"""The teacher: an fp32 average of the student's parameters that labels what has no label."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ecocseg.profile import TEACHER, within


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

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        with within(TEACHER):
            return self.module(image)

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
        if self.whole:
            pairs = list(zip(self.module.buffers(), student.buffers(), strict=True))
            averaged = [(own, other.float()) for own, other in pairs if own.is_floating_point()]
            counted = [(own, other) for own, other in pairs if not own.is_floating_point()]  # of batches
            if averaged:
                torch._foreach_lerp_([own for own, _ in averaged], [other for _, other in averaged], 1 - alpha)
            if counted:
                torch._foreach_copy_([own for own, _ in counted], [other for _, other in counted])

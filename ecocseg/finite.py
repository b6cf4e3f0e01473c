"""What becomes of numbers that are not finite: they are found, left out where the run may go on, and never saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ecocseg.checkpoint import Snapshot

REMEDY = "lower optim.lr, set optim.gradient_clipping, or leave such steps out with train.on_nan=skip"


def from_before(newest: int | None) -> str:
    """What there is to go back to."""
    return "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}, from before"


def check_snapshot(snapshot: Snapshot, newest: int | None) -> None:
    """See that a checkpoint is worth going on from. Buffers may be infinite on purpose; what is learned may not.

    Raises:
        FloatingPointError: naming the first weight or state that is not finite.
    """
    groups = {"weight": snapshot.student, "teacher's weight": snapshot.teacher or {}}
    groups |= {f"optimiser state of '{name}'": state for name, state in snapshot.optimizer.items()}
    for what, tensors in groups.items():
        for name, value in tensors.items():
            learned = name in snapshot.optimizer or what.startswith("optimiser")
            bad = ~torch.isfinite(value) if learned else torch.isnan(value)
            if value.is_floating_point() and bad.any():
                raise FloatingPointError(f"{what} '{name}' is not finite at step {snapshot.step}, which is not saved; "
                                         f"{REMEDY}; {from_before(newest)}")


def total(values: Tensor, only_finite: bool) -> Tensor:
    """Sum and number of the values, or of those that are finite: what a mean over all workers is made of."""
    if not only_finite:
        return torch.stack([values.sum(), values.new_full((), len(values))])
    finite = torch.isfinite(values)
    return torch.stack([torch.where(finite, values, 0).sum(), finite.sum()])


def first_bad(losses: Tensor) -> int:
    """Index of the first loss that is not finite, of which there is one."""
    return torch.isfinite(losses).tolist().index(False)


class Buffers:
    """The floating-point buffers of models (batch norm's statistics), kept from before a step to be put back after it."""

    def __init__(self, *models: nn.Module | None) -> None:
        self._live = [buffer for model in models if model is not None for buffer in model.buffers()
                      if buffer.is_floating_point()]
        self._kept = [torch.empty_like(buffer) for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def put_back(self, bad: Tensor) -> None:
        """As kept where `bad` (a number on their device) is not 0; without waiting for the device."""
        for live, kept in zip(self._live, self._kept, strict=True):
            live.copy_(torch.where(bad > 0, kept, live))


class SkipCount:
    """Steps left out one after another, over log intervals."""

    def __init__(self, most: int) -> None:
        self.most, self.in_a_row = most, 0

    def update(self, skipped: Sequence[float], step: int, newest: Callable[[], int | None]) -> int:
        """Take in which of the steps up to `step` were left out; how many were. `newest` tells the newest checkpoint's step.

        Raises:
            FloatingPointError: when the last `most` were, or a longer run among them.
        """
        for number, one in enumerate(skipped):
            self.in_a_row = self.in_a_row + 1 if one else 0
            if self.in_a_row >= self.most:
                at = step - len(skipped) + number + 1
                raise FloatingPointError(
                    f"the gradient was not finite {self.in_a_row} steps in a row, up to step {at} (train.max_skipped); lower "
                    f"optim.lr or set optim.gradient_clipping; {from_before(newest())}")
        return sum(one > 0 for one in skipped)

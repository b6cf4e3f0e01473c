"""What turns losses into a step: DeepSpeed (ZeRO 0, 1, 2) or plain torch, behind the same five calls.

A step may consist of several parts (a source loss, a mixed loss), each with a forward and a backward pass of its own, so
that one graph is in memory at a time. Under ZeRO-1/2 two plain backward calls lose the first gradient without a
word; only the last part may be marked as the accumulation boundary, which `run_part` does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecocseg.config import EngineConfig, OptimConfig
from ecocseg.libraries import deepspeed
from ecocseg.profile import BACKWARD, STUDENT, within

OptimizerState = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class World:
    """Where this worker stands: its rank, how many there are, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, on every worker."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing: Any) -> list[Any]:
        """What each worker gave, on every worker."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things


def schedule(optim: OptimConfig, steps: int, step: int) -> float:
    """Factor of the learning rate at a step: linear warm-up, then (1 - step/steps)^power, or constant."""
    decay = (1 - step / steps) ** optim.power if optim.schedule == "poly" else 1.0
    if step >= optim.warmup_steps:
        return decay
    rise = optim.warmup_ratio + (1 - optim.warmup_ratio) * (step + 1) / optim.warmup_steps
    return decay * min(rise, 1.0)


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """On a GPU the update is one kernel over all parameters; on a CPU torch's own loop needs no copies of them."""
    fused = True if device.type == "cuda" else None
    if optim.kind == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=fused)


def build_engine(model: nn.Module, groups: list[dict[str, Any]], optim: OptimConfig, engine: EngineConfig,
                 world: World, micro_batch: int, skip_bad: bool = False) -> Engine:
    """The engine a configuration asks for. `micro_batch` (images) is only what DeepSpeed's books show; with `skip_bad` a step
    whose gradient is not finite changes nothing, on any worker."""
    optimizer = build_optimizer(groups, optim, world.device)
    kind = DeepSpeedEngine if engine.kind == "deepspeed" else Engine
    return kind(model, optimizer, optim, engine, world, micro_batch, skip_bad)


class Engine:
    """Plain torch: DistributedDataParallel over the workers, the optimiser as it is."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, optim: OptimConfig, engine: EngineConfig,
                 world: World, micro_batch: int, skip_bad: bool = False) -> None:
        self.model, self.clipping, self.world, self.skip_bad = model, optim.gradient_clipping, world, skip_bad
        self.skipped: Tensor | None = None
        """1 when the last step was left out because its gradient was not finite, else 0; None when nobody looked."""
        self.optimizer: Any = optimizer
        self.autocast_dtype = torch.bfloat16 if engine.precision == "bf16" else None
        self.forward: Callable[..., Any] = model
        self._wrap(optimizer, engine, micro_batch)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]

    def _wrap(self, optimizer: torch.optim.Optimizer, engine: EngineConfig, micro_batch: int) -> None:
        if self.world.size > 1:
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            with warnings.catch_warnings():  # newer torch has another name for the argument, older ones only this
                warnings.simplefilter("ignore", FutureWarning)
                self.forward = nn.parallel.DistributedDataParallel(
                    self.model, device_ids=devices, broadcast_buffers=False)

    def autocast(self) -> Any:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.autocast_dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with within(STUDENT), self.autocast():
            return self.forward(*args, **kwargs)

    def run_part(self, part: Callable[[], Tensor], scale: float, last: bool) -> Tensor:
        """Run one part of the step forward and backward; its gradient, times `scale`, is added to the step's.

        Gradients are averaged over workers when `last` is true, once for all parts.
        """
        held_back = self.world.size > 1 and not last
        with self.forward.no_sync() if held_back else nullcontext():  # type: ignore[attr-defined]
            loss = part()
            with within(BACKWARD):
                (loss * scale).backward()
        return loss.detach()

    def set_lr(self, factor: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def step(self) -> Tensor | float:
        """Clip, update, clear the gradients; the norm of the gradient before clipping (nan when nobody computed it)."""
        norm: Tensor | float = float("nan")
        if self.clipping > 0:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        if self.skip_bad:
            norm = self._look(norm)
        if self.skipped is not None and self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = self.skipped
            self.optimizer.step()
        elif self.skipped is None or not self.skipped.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _look(self, norm: Tensor | float = float("nan")) -> Tensor:
        """Set `skipped`, for all workers alike; the norm of the gradient, computed if it is not given."""
        if not isinstance(norm, Tensor):
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.skipped = self.world.sum((~torch.isfinite(norm)).float()).clamp_(max=1)
        return norm

    def average_buffers(self, module: nn.Module) -> None:
        """Give all workers the mean of a module's batch norm statistics, before these are evaluated or saved."""
        if self.world.size == 1:
            return
        for buffer in module.buffers():
            if buffer.is_floating_point():
                self.world.sum(buffer).div_(self.world.size)

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every parameter between `run_part` and `step` (for tests)."""
        return {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def optimizer_state(self) -> OptimizerState:
        """Whole optimiser state by parameter name, whatever the number of workers; a collective, same on every rank."""
        return {name: {key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                       for key, value in self.optimizer.state[p].items() if torch.is_tensor(value)}
                for name, p in self.model.named_parameters() if self.optimizer.state.get(p)}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Put back what `optimizer_state` gave, on any number of workers; the model's weights are loaded before."""
        for name, p in self.model.named_parameters():
            if name in state:
                # averages lie in memory as their weight does
                self.optimizer.state[p] = {
                    key: _counter(value, p.device) if value.ndim == 0 else torch.empty_like(p).copy_(value)
                    for key, value in state[name].items()}


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO 0, 1 or 2, fp32 weights and our own torch optimiser (no compiled operators needed)."""

    def _wrap(self, optimizer: torch.optim.Optimizer, engine: EngineConfig, micro_batch: int) -> None:
        quiet_deepspeed()
        # The shared-memory gloo helper is compiled at the first use (minutes); plain gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage = engine.zero_stage
        os.environ.setdefault("LOCAL_RANK", str(self.world.device.index or 0))
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,  # parts and micro-batches are both accumulated by run_part
            "zero_optimization": {"stage": engine.zero_stage},
            "gradient_clipping": self.clipping,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=settings, dist_init_required=not dist.is_initialized())
        self.forward = self.deepspeed
        if self.skip_bad and self.stage > 0:
            self.optimizer.check_grad_overflow = True  # ZeRO looks at the shards itself, and tells all workers

    def run_part(self, part: Callable[[], Tensor], scale: float, last: bool) -> Tensor:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        loss = part()
        with within(BACKWARD):
            self.deepspeed.backward(loss * scale)
        return loss.detach()

    def step(self) -> Tensor | float:
        if self.skip_bad and self.stage == 0:
            total = self._look()
            assert self.skipped is not None
            if self.skipped.item():
                self.deepspeed.zero_grad()
                return total
        self.deepspeed.step()
        if self.stage > 0:  # it leaves such steps out by itself, asked or not
            self.skipped = torch.full((), float(self.optimizer.overflow), device=self.world.device)
        norm = self.deepspeed.get_global_grad_norm() if self.stage > 0 else None
        return float("nan") if norm is None else norm

    def gradients(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().gradients()
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).detach().clone() for name, p in self.model.named_parameters()}

    def optimizer_state(self) -> OptimizerState:
        if self.stage == 0:
            return super().optimizer_state()
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = self.optimizer.single_partition_of_fp32_groups
        mine = self.optimizer.optimizer.state.get(flat[0], {})
        if not mine:  # before the first step
            return {}
        self._link_states()
        whole: OptimizerState = {}
        for name, p in self.model.named_parameters():
            whole[name] = {}
            for key in sorted(mine):  # each is a collective, and a state that was loaded has its keys in any order
                value = mine[key]
                if torch.is_tensor(value) and value.ndim == 0:
                    whole[name][key] = value.detach().cpu().clone()
                elif torch.is_tensor(value):
                    whole[name][key] = safe_get_full_optimizer_state(p, key).detach().cpu().clone()
        return whole

    def _link_states(self) -> None:
        """Point every parameter at its piece of the sharded optimiser state; the pieces appear with the first step."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def load_optimizer_state(self, state: OptimizerState) -> None:
        if self.stage == 0:
            return super().load_optimizer_state(state)
        zero = self.optimizer
        zero.refresh_fp32_params()  # the sharded master copy follows the weights just loaded
        if not state:
            return
        first = next(iter(state.values()))
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {key: _counter(value, flat.device) if value.ndim == 0 else torch.zeros_like(flat)
                                          for key, value in first.items()}
        self._link_states()
        for name, p in self.model.named_parameters():
            for key, value in state[name].items():
                if value.ndim > 0:
                    p.set_full_hp_param(value.to(p.device), key)  # type: ignore[attr-defined]


def _counter(value: Tensor, device: torch.device) -> Tensor:
    """AdamW's step counter, a copy of its own where it keeps it: beside the weights where it is fused, else on the CPU."""
    return value.to(device, copy=True) if device.type == "cuda" else value.clone()


def quiet_deepspeed() -> None:
    """DeepSpeed's own INFO lines say nothing to a person training; warnings and errors stay."""
    import logging

    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

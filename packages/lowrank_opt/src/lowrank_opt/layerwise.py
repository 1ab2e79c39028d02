"""Updates inside the backward pass: each gradient is used and freed as soon as it is complete.

Only one gradient lives at a time. With several micro-batches per step, low-rank parameters keep a running L
(r x d, float32) instead of a gradient; dense ones keep their gradient until the last micro-batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lm_core.errors import ConfigError, InputError, RunFailed
from lowrank_opt.base import BaseOptimizer, Group, UnsupportedDistributedError, choice, is_shared

if TYPE_CHECKING:
    from lowrank_opt.exchange import Exchange

log = logging.getLogger("lowrank_opt")

CLIP_MODES = ("delayed", "per_param")


def attach_per_layer(
    opt: BaseOptimizer, model: nn.Module, accumulation: int = 1, clip: float | None = None, clip_mode: str = "delayed"
) -> PerLayer:
    """Let `opt` update the parameters of `model` inside `backward`; `opt.step()` then ends the step.

        layers = attach_per_layer(opt, model, accumulation=4, clip=1.0)
        for batch in micro_batches: (loss(batch) / 4).backward()
        opt.step()

    accumulation: backward passes per step. clip: largest gradient norm; "delayed" scales by the global norm of the
    step before (by "per_param" in the first step), "per_param" limits each gradient to its share of the norm.
    Learning rates must be set before the first backward, and states saved after `step`. `opt.grad_norm` is the
    global norm of the last step before clipping; `opt.grad_norm_kind` is "full", or "projected" where low-rank
    parameters accumulated L. One process only, except under the engine lowrank. Undo with `layers.detach()`.

    Raises ConfigError for settings that cannot work, and for trained parameters that `opt` does not have.
    """
    return PerLayer(opt, model, accumulation, clip, clip_mode)


class PerLayer:
    """The hooks of `attach_per_layer`, and what they count between two steps."""

    def __init__(self, optimizer: BaseOptimizer, model: nn.Module, accumulation: int, clip: float | None, clip_mode: str) -> None:
        choice("clip_mode", clip_mode, CLIP_MODES)
        if accumulation < 1:
            raise ConfigError(f"accumulation: {accumulation} is below 1; use the number of backward passes per step")
        if clip is not None and not clip > 0:
            raise ConfigError(f"clip: {clip} is not above 0; use None to turn clipping off")
        if optimizer.per_layer:
            raise ConfigError("attach_per_layer: the optimizer is attached already; detach() it first")
        self.optimizer, self.accumulation, self.clip, self.clip_mode = optimizer, accumulation, clip, clip_mode
        self.place = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
        if missing := [name for p, name in trained.items() if p not in self.place]:
            raise ConfigError(f"params: {len(missing)} trained parameters are in no group: {', '.join(missing)}; add or freeze them")
        if shared := [name for p, name in trained.items() if is_shared(p)]:
            raise UnsupportedDistributedError(
                f"attach_per_layer: {shared[0]} is a DTensor, whose gradient is summed after the hooks; one process only"
            )
        self.elements = sum(p.numel() for p in trained)
        self.seen: dict[nn.Parameter, int] = {}
        self.low: dict[Tensor, Tensor] = {}
        self.square = 0.0
        self.projected = False
        # of several processes: the sums of what updates need, and how they begin a step of a matrix together
        self.exchange: Exchange | None = None
        self.begin: Callable[[Group, nn.Parameter], None] = optimizer._begin_low
        if accumulation > 1 and optimizer._needs_gradient and any(group.get("rank") for group in optimizer.param_groups):
            log.warning("%s needs whole gradients: with accumulation %d every one is kept", type(optimizer).__name__, accumulation)
        self.handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in trained]
        self.handles.append(optimizer.register_state_dict_pre_hook(self._refuse_inside_a_step))
        optimizer._layers = self

    def detach(self) -> None:
        """Back to ordinary steps; between steps only."""
        self._refuse_inside_a_step(self.optimizer)
        for handle in self.handles:
            handle.remove()
        self.optimizer._layers = None

    def finish(self) -> None:
        """End the step: update what fewer backward passes reached, and hand over the norm."""
        if not self.seen:
            raise InputError("step: no gradient arrived since the last step; call backward before step")
        for parameter in [p for p, count in self.seen.items() if count < self.accumulation]:
            self._update(parameter)
        if self.exchange is not None:
            for parameter, total in self.exchange.flush():
                self._apply(parameter, total)
        norm = math.sqrt(self.square)
        for group in self.optimizer.param_groups:
            group["grad_norm"] = norm
        self.optimizer.grad_norm = norm
        self.optimizer.grad_norm_kind = "projected" if self.projected else "full"
        self.seen, self.square, self.projected = {}, 0.0, False

    def _refuse_inside_a_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.seen:
            raise InputError("state: a step is under way, so the state is neither old nor new; save and detach after step()")

    @torch.no_grad()
    def _arrived(self, parameter: nn.Parameter) -> None:
        count = self.seen[parameter] = self.seen.get(parameter, 0) + 1
        name = self.optimizer._address(parameter).name
        if count > self.accumulation:
            raise InputError(f"{name}: backward ran {count} times in a step of accumulation {self.accumulation}; call step() in between")
        group = self._group(parameter)
        if self._adds_low(group, parameter):
            if count == 1:
                self.begin(group, parameter)
            low = self.optimizer._accumulate_low(group, parameter)
            self.low[parameter] = low if count == 1 else self.low[parameter].add_(low)
            self.projected = True
            parameter.grad = None
        if count == self.accumulation:
            self._update(parameter)

    def _group(self, parameter: Tensor) -> Group:
        # looked up each time: loading a state replaces the groups
        return self.optimizer.param_groups[self.place[parameter]]

    def _adds_low(self, group: Group, parameter: Tensor) -> bool:
        """Whether L is summed, over micro-batches or processes, instead of the gradient."""
        return (self.accumulation > 1 or self.exchange is not None) and self.optimizer._accumulates_low(group, parameter)

    def _update(self, parameter: nn.Parameter) -> None:
        low = self.low.pop(parameter, None)
        total = self.optimizer._gradient(parameter) if low is None else low
        if self.exchange is None:
            self._apply(parameter, total)
            return
        parameter.grad = None
        for done, summed in self.exchange.add(parameter, total):
            self._apply(done, summed)

    def _apply(self, parameter: nn.Parameter, total: Tensor) -> None:
        """Clip and update with the whole gradient, or L."""
        group = self._group(parameter)
        norm = float(torch.linalg.vector_norm(total, dtype=torch.promote_types(total.dtype, torch.float32)))
        if not math.isfinite(norm):
            address, step = self.optimizer._address(parameter), self.optimizer.state[parameter].get("step", 0)
            raise RunFailed(
                f"{address.name}: its gradient is not finite after step {step}; resume from a checkpoint with a lower learning rate"
            )
        self.square += norm * norm
        factor = self._clip_factor(group, parameter, norm)
        if factor < 1:
            total.mul_(factor)
        if self.optimizer.owns(parameter):
            if self._adds_low(group, parameter):
                self.optimizer._apply(group, parameter, total)
            else:
                parameter.grad = total
                self.optimizer._update(group, [parameter])
        parameter.grad = None

    def _clip_factor(self, group: Group, parameter: Tensor, norm: float) -> float:
        if self.clip is None:
            return 1.0
        previous = group.get("grad_norm")
        if self.clip_mode == "delayed" and previous is not None:
            return min(1.0, self.clip / (float(previous) + 1e-6))
        return min(1.0, self.clip * math.sqrt(parameter.numel() / self.elements) / (norm + 1e-6))

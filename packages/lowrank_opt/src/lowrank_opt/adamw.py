"""AdamW on whole parameters: the baseline, and what every parameter without a rank gets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lm_core.errors import ConfigError
from lowrank_opt.base import CHUNK, BaseOptimizer, Group, State, UnsupportedDistributedError, choice, is_shared, local, rate
from lowrank_opt.quant import MOMENTS, Piece, is_quantised, moment_layout, zero_moments
from lowrank_opt.sharding import by_rows, shares


def adam_(
    weights: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor], steps: list[int], group: Group
) -> None:
    """AdamW in place on contiguous tensors of one dtype, `steps` being the number of this update (1 for the first)."""
    # torch's fused kernel counts up itself, and wants the count as a tensor on the same device
    counts = torch.tensor([step - 1.0 for step in steps], device=weights[0].device)
    adamw(
        weights,
        gradients,
        first,
        second,
        [],
        list(counts.unbind()),
        fused=True,
        lr=rate(group),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def normalised(gradient: Tensor, first: Tensor, second: Tensor, step: int, group: Group) -> Tensor:
    """Update both moments in place with `gradient` and return *minus* Adam's normalised step, a new tensor.

    One pass of torch's fused kernel on a weight of zeros with a learning rate of one.
    """
    out = torch.zeros_like(gradient)
    adam_([out], [gradient], [first], [second], [step], {**group, "lr": 1.0, "weight_decay": 0.0})
    return out


class AdamW(BaseOptimizer):
    """AdamW with decoupled weight decay, equal to `torch.optim.AdamW` for float32 parameters.

    For bfloat16 and float16 parameters moments and arithmetic are float32, and bfloat16 weights are rounded
    at random (`stochastic_rounding`), so small updates are not lost. state_bits=8 keeps moments in 8 bits, by
    blocks of `block_size`; those of tensors below `min_8bit_size` elements stay float32.
    """

    _identity: tuple[str, ...] = ("state_bits", "block_size", "min_8bit_size")
    _state_bits = 32

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        stochastic_rounding: bool = True,
        state_bits: int | None = None,
        block_size: int = 256,
        min_8bit_size: int = 4096,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        settings["state_bits"] = state_bits or self._state_bits
        super().__init__(params, settings)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        choice("state_bits", group["state_bits"], (32, 8))
        for name in ("block_size", "min_8bit_size"):
            if group[name] < 1:
                raise ConfigError(f"{name}: {group[name]} is below 1; use for example 256")

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        parts = [rows * math.prod(parameter.shape[1:]) for rows in shares(parameter)]
        return moment_layout(group, tuple(parameter.shape), row_aligned=False, shares=parts)

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        whole: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = {}
        steps: dict[torch.device, list[int]] = {}
        for parameter in parameters:
            state = self._dense_state(group, parameter)
            state["step"] += 1
            tensors = [local(t) for t in (parameter.detach(), self._gradient(parameter), *(state[m] for m in MOMENTS if m in state))]
            if len(tensors) == 4 and all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors):
                for collected, tensor in zip(whole.setdefault(parameter.device, ([], [], [], [])), tensors, strict=True):
                    collected.append(tensor)
                steps.setdefault(parameter.device, []).append(state["step"])
            else:
                self._update_in_chunks(group, parameter, tensors[0], tensors[1], state)
        for device, lists in whole.items():
            adam_(*lists, steps[device], group)

    def _dense_state(self, group: Group, parameter: Tensor) -> State:
        state: State = self.state[parameter]
        if not state:
            if is_shared(parameter) and is_quantised(group, parameter.numel()) and not by_rows(parameter):
                name, placed = self._address(parameter).name, parameter.placements  # type: ignore[attr-defined]
                raise UnsupportedDistributedError(
                    f"state_bits: {name} is shared out by {placed}, and 8-bit blocks need rows (Shard(0)); use state_bits 32"
                )
            state["step"] = 0
            state.update(zero_moments(AdamW._layout(self, group, parameter), parameter))
            self._mark_cut(group, parameter, state)
        return state

    def _mark_cut(self, group: Group, parameter: Tensor, state: State) -> None:
        """Keep where 8-bit blocks are cut short by the end of a process's share, if anywhere."""
        if cut := self._cut(group, parameter):
            state["cut"] = cut

    def _update_in_chunks(self, group: Group, parameter: Tensor, weight: Tensor, gradient: Tensor, state: State) -> None:
        """A part at a time: for half precision, 8-bit moments, and tensors that are not contiguous."""
        flat, gradient = weight.reshape(-1), gradient.reshape(-1)
        rounding = self._rounding(group, parameter, state["step"])
        block = group["block_size"]
        chunk = max(1, CHUNK // block) * block
        quantised = "exp_avg_q" in state
        if quantised and flat.dtype == gradient.dtype == torch.float32:
            chunk = max(1, flat.numel())  # nothing is copied, so there is nothing to keep small
        for start in range(0, flat.numel(), chunk):
            part = slice(start, min(start + chunk, flat.numel()))
            if quantised:
                value, piece = flat[part].float(), Piece(state, block, columns=part)
                decay = 1 - rate(group) * group["weight_decay"]
                piece.adam_(gradient[part].float(), value, state["step"], group, decay=decay, alpha=rate(group))
            else:
                first, second = (local(state[name]).view(-1)[part] for name in MOMENTS)
                value = flat[part].to(first.dtype)
                adam_([value], [gradient[part].to(first.dtype)], [first], [second], [state["step"]], group)
            if rounding:
                rounding.round(value)
            if flat.dtype != value.dtype:
                flat[part].copy_(value)
        if not weight.is_contiguous():
            weight.copy_(flat.view(weight.shape))


class AdamW8bit(AdamW):
    """AdamW whose moments take 8 bits per element, except those of small tensors and of groups with state_bits 32."""

    _state_bits = 8

"""Muon, a baseline: the momentum of a matrix made orthogonal; AdamW for everything else, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank_opt.base import Group, choice, decay_factor, rate, work_dtype
from lowrank_opt.matrix import MatrixOptimizer, matrix_shape

# Of a quintic iteration whose slope at zero is as large as it can be; singular values end up between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Roughly U V^T of the matrix U S V^T, in bfloat16 and of the same shape."""
    a, b, c = COEFFICIENTS
    wide = matrix.to(torch.bfloat16)
    if matrix.shape[0] > matrix.shape[1]:
        wide = wide.t()
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.t()
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.t() if matrix.shape[0] > matrix.shape[1] else wide


class MuonWithAdamW(MatrixOptimizer):
    """Muon for the matrices of groups with a `rank` (its value does not matter), AdamW for the others.

    adjust_lr: "match_rms_adamw" gives updates the size of Adam's, so that its learning rate fits; "original" is
    sqrt(max(1, rows / columns)). Momentum is float32 whatever the weight's dtype.
    """

    _identity: tuple[str, ...] = MatrixOptimizer._identity

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: str = "match_rms_adamw",
        **settings: Any,
    ) -> None:
        self._more = {"rank": rank, "momentum": momentum, "nesterov": nesterov, "adjust_lr": adjust_lr}
        super().__init__(params, lr, betas, eps, weight_decay, **settings)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        choice("adjust_lr", group["adjust_lr"], ("match_rms_adamw", "original"))

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        if self._is_matrix(group, parameter):
            return {"momentum_buffer": matrix_shape(parameter)}
        return super()._layout(group, parameter)

    def _update_matrix(self, group: Group, parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            dtype = work_dtype(parameter.dtype)
            state.update(step=0, momentum_buffer=torch.zeros(gradient.shape, dtype=dtype, device=parameter.device))
        state["step"] += 1
        buffer, gradient = state["momentum_buffer"], gradient.to(state["momentum_buffer"].dtype)
        buffer.lerp_(gradient, 1 - group["momentum"])
        step = orthogonalise(gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
        rows, columns = gradient.shape
        size = 0.2 * math.sqrt(max(rows, columns)) if group["adjust_lr"] == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
        value = parameter.detach().reshape(gradient.shape).to(buffer.dtype, copy=True)
        value.mul_(decay_factor(group)).add_(step, alpha=-rate(group) * size)
        rounding = self._rounding(group, parameter, state["step"])
        if rounding:
            rounding.round(value)
        parameter.copy_(value.view(parameter.shape))

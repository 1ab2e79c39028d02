"""The update of galore-torch 1.0, step by step, for comparisons with it.

State is in the gradient's dtype and natural layout (m x r or r x n), decay comes after the update, epsilon
is added before bias correction, refreshes come all at once, and a rank that reaches the smaller side rotates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_opt.base import Group, State, rate
from lowrank_opt.projector import rank_of, side_of


def update(group: Group, parameter: Tensor, gradient: Tensor, state: State, *, matrix: bool) -> None:
    """One step of `parameter`, projected if `matrix`."""
    weight = parameter.detach()
    if matrix:
        shape = (parameter.shape[0], parameter.numel() // parameter.shape[0])
        weight, gradient = weight.view(shape), gradient.reshape(shape)
        side = side_of(shape, group["proj_type"])
        if state.get("step", 0) % group["update_proj_gap"] == 0:
            refresh(state, gradient, side, rank_of(group["rank"], shape))
            state["side"] = side
        low = forward(state, gradient, side)
    else:
        low = gradient
    if "exp_avg" not in state:
        state.setdefault("step", 0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    state["exp_avg"].mul_(beta1).add_(low, alpha=1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
    step = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
    if matrix:
        step = backward(state, step, side) * group["scale"]
    size = rate(group) * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    weight.add_(step, alpha=-size)
    if group["weight_decay"] > 0:
        weight.add_(weight, alpha=-rate(group) * group["weight_decay"])


def refresh(state: State, gradient: Tensor, side: str, rank: int) -> None:
    """Singular vectors as they come, without canonical sign; `proj` is r x k as everywhere else."""
    columns, _, rows = torch.linalg.svd(gradient.float(), full_matrices=False)
    left, right = columns[:, :rank].t().to(gradient.dtype).clone(), rows[:rank].to(gradient.dtype).clone()
    state["proj"] = right if side == "right" else left
    if side == "full":
        state["proj_right"] = right


def forward(state: State, gradient: Tensor, side: str) -> Tensor:
    """The low-rank gradient in its natural layout."""
    if side == "right":
        return torch.mm(gradient, state["proj"].t())
    low = torch.mm(state["proj"], gradient)
    return torch.mm(low, state["proj_right"].t()) if side == "full" else low


def backward(state: State, low: Tensor, side: str) -> Tensor:
    """The low-rank step at full size."""
    if side == "right":
        return torch.mm(low, state["proj"])
    step = torch.mm(state["proj"].t(), low)
    return torch.mm(step, state["proj_right"]) if side == "full" else step

"""Distances between student and teacher, as sums over positions. B batch, T time, D hidden size."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kernels_cuda.head.linear_kl.reference import divergence

Align = Literal["l2", "mse", "relative"]


def misfit(target_BTD: Tensor, output_BTD: Tensor, real_BT: Tensor, kind: Align) -> Tensor:
    """Sum over real positions of the distance between a mixer's output and the teacher's attention.

    l2: sqrt(||t - y||^2 + 1e-12) / sqrt(D); mse: ||t - y||^2 / D; relative: the number of real positions times
    sum ||t - y||^2 / sum ||t||^2, the one that depends on how a batch is split.
    """
    real = real_BT.bool()
    # chosen, not multiplied: padding may hold anything
    error_BTD = (target_BTD.float() - output_BTD.float()).masked_fill(~real[:, :, None], 0.0)
    square_BT = error_BTD.square().sum(-1)
    width = target_BTD.shape[-1]
    if kind == "l2":
        distance_BT = (square_BT + 1e-12).sqrt().masked_fill(~real, 0.0)
        return distance_BT.sum() / math.sqrt(width)
    if kind == "mse":
        return square_BT.sum() / width
    energy = target_BTD.float().square().sum(-1).masked_fill(~real, 0.0).sum()
    return real.sum() * square_BT.sum() / energy.clamp(min=1e-30)


def kl(
    z_s: Tensor, z_t: Tensor, mask: Tensor | None = None, tau: float = 1.0, direction: Literal["forward", "reverse", "adaptive"] = "forward"
) -> Tensor:
    """tau^2 times the mean divergence of the student's logits z_s from the teacher's z_t (both [..., V]) over the positions of `mask`.

    What `linear_kl` computes without the logits; columns that only one side has are left out.
    """
    columns = min(z_s.shape[-1], z_t.shape[-1])
    log_q, log_p = ((z[..., :columns].to(torch.promote_types(z.dtype, torch.float32)) / tau).log_softmax(-1) for z in (z_s, z_t.detach()))
    found = divergence(log_p.flatten(0, -2), log_q.flatten(0, -2), direction)
    real = torch.ones_like(found, dtype=torch.bool) if mask is None else mask.flatten().bool()
    return tau**2 * found.masked_fill(~real, 0.0).sum() / real.sum().clamp(min=1)

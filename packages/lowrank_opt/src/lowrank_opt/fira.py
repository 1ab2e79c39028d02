"""Fira: GaLore's step, plus what GaLore drops (the gradient outside the basis) at the scale Adam would give it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.lowrank.channel_update_ import limit
from lowrank_opt import sharding
from lowrank_opt.apollo import channel_norms, check_channels, last_norm, scaling, uncorrected_rate
from lowrank_opt.base import Group
from lowrank_opt.galore import GaLoreAdamW
from lowrank_opt.matrix import UNCORRECTED, Change, normalised_step


class FiraAdamW(GaLoreAdamW):
    """Fira for parameters of groups with a `rank`; AdamW for the others. Arguments are those of GaLoreAdamW.

    With L = proj(G), N0 Adam's step on L without bias correction, and the residual S = G - back(L) whose channels
    are scaled by |N0| / |L|: W changes by scale back(N0) + S. The norm of S may grow by `norm_growth` per step.
    """

    _needs_gradient = True
    _mirrors = False

    def __init__(self, params: Iterable[Any], *args: Any, norm_growth: float = 1.01, **settings: Any) -> None:
        self._more = {"norm_growth": norm_growth}
        super().__init__(params, *args, **settings)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_channels(group)

    def _update_matrix(self, group: Group, parameter: Tensor, gradient: Tensor) -> None:
        self._begin(group, parameter, gradient)
        state = self.state[parameter]
        low, bases = self._low(group, parameter, gradient), self._bases(group, parameter)
        minus_n0 = normalised_step(low, state, UNCORRECTED, group)
        sigma = scaling(low, minus_n0)
        norm = sharding.norm(sigma * residual_norms(channel_norms(gradient, state["side"]), low, bases[0]), parameter)
        factor = limit(norm, last_norm(state, sigma), group["norm_growth"]) * sigma
        rate = uncorrected_rate(group, state["step"] - state["reset_step"])
        # minus scale back(N0) + factor (G - back(L)), with the two products in the basis made one
        change = Change(state["side"], rate).add_back(low.mul_(factor).add_(minus_n0, alpha=group["scale"]), bases)
        self._write(group, parameter, change.add_gradient(gradient, -factor))


def residual_norms(norms: Tensor, low: Tensor, basis: Tensor) -> Tensor:
    """|G_j - P^T L_j| for every channel from |G_j| and L, without the residual: |G|^2 - 2 |L|^2 + L^T P P^T L.

    The last term is |L|^2 for an orthonormal basis; one stored in bfloat16 is only nearly so.
    """
    basis = basis.to(low.dtype)
    inside = (low * torch.mm(torch.mm(basis, basis.t()), low)).sum(dim=0)
    return (norms.square() - 2 * low.square().sum(dim=0) + inside).clamp_min(0).sqrt()

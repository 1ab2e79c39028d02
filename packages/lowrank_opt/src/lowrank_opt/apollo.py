"""APOLLO: the whole gradient, each channel scaled by how Adam would scale it in a random low-rank space."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.lowrank.channel_update_ import limit
from lm_core.errors import ConfigError
from lowrank_opt import sharding
from lowrank_opt.base import CHUNK, BaseOptimizer, Group, State, choice, is_shared, rate
from lowrank_opt.galore import GaLoreAdamW
from lowrank_opt.matrix import UNCORRECTED, Change, matrix_shape, normalised_step
from lowrank_opt.projector import gaussian, project, rank_of

# Settings of APOLLO-Mini: one factor for a whole matrix from a single random direction.
MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}


def column_norms(matrix: Tensor) -> Tensor:
    """Norms of the columns, in float32 or float64; some rows at a time, since torch.linalg.vector_norm is ten times slower along rows."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    sums = torch.zeros(matrix.shape[1], dtype=dtype, device=matrix.device)
    for part in matrix.split(max(1, CHUNK // max(1, matrix.shape[1]))):
        sums.add_(part.to(dtype).square().sum(dim=0))
    return sums.sqrt_()


def scaling(low: Tensor, step: Tensor) -> Tensor:
    """How much longer Adam's step N0 (of either sign) is than L, for each of the d columns."""
    return column_norms(step) / (column_norms(low) + 1e-8)


def last_norm(state: State, like: Tensor) -> Tensor:
    """The norm that an update may grow from; 0, which limits nothing, before the first."""
    if "prev_norm" not in state:
        state["prev_norm"] = torch.zeros((), dtype=like.dtype, device=like.device)
    norm: Tensor = state["prev_norm"]
    return norm


def uncorrected_rate(group: Group, step: int) -> float:
    """Learning rate with Adam's bias correction in it, since N0 has none."""
    beta1, beta2 = group["betas"]
    return rate(group) * math.sqrt(1 - float(beta2) ** step) / (1 - float(beta1) ** step)


def channel_norms(gradient: Tensor, side: str) -> Tensor:
    """Norms of the d channels of a gradient: its rows for side right, its columns for side left; float32."""
    if side == "left":
        return column_norms(gradient)
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norms


class ApolloAdamW(GaLoreAdamW):
    """APOLLO for parameters of groups with a `rank`; AdamW for the others. Moments are as small as GaLore's, and
    random projections are drawn anew from their address at every step instead of being stored.

    ApolloAdamW(build_param_groups(model, rank=256), lr=1e-2)
    ApolloAdamW(build_param_groups(model, **MINI), lr=1e-2)           # APOLLO-Mini

    scale_type: a factor per "channel", or one for the "tensor". The update is multiplied by sqrt(scale), and its
    norm may grow by `norm_growth` per step; scale_front multiplies before that limit. proj_method: random, or svd
    (which is stored). A rank that reaches the smaller side gives plain AdamW without `scale`.
    """

    _identity: tuple[str, ...] = (*GaLoreAdamW._identity, "proj_method", "scale_type")
    _needs_gradient = True
    _mirrors = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        norm_growth: float = 1.01,
        scale_front: bool = False,
        proj_type: str = "std",
        proj_method: str = "random",
        stagger: bool = True,
        full_rank_policy: str = "identity",
        proj_dtype: str = "param",
        compat: str = "none",
        seed: int = 0,
        stochastic_rounding: bool = True,
        state_bits: int | None = None,
        block_size: int = 256,
        min_8bit_size: int = 4096,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        settings["state_bits"] = state_bits or self._state_bits
        settings["eps"] = eps if eps is not None else 1e-6 if compat == "galore_torch" else 1e-8
        # a new random space has nothing to do with the old one, so neither moments nor gaps depend on it
        settings.update(moment_transfer="none", adaptive=False, oversample=0, power_iters=0)
        self._refreshed, self.found = {}, {}
        BaseOptimizer.__init__(self, params, settings)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        choice("scale_type", group["scale_type"], ("channel", "tensor"))
        choice("proj_method", group["proj_method"], ("random", "svd"))
        check_channels(group)

    def _identity_group(self, group: Group) -> Group:
        return group

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        layout = super()._layout(group, parameter)
        return layout if group["proj_method"] == "svd" else {name: shape for name, shape in layout.items() if not name.startswith("proj")}

    def _refresh(self, group: Group, parameter: Tensor, gradient: Tensor, state: State) -> None:
        if group["proj_method"] == "svd":
            super()._refresh(group, parameter, gradient, state)
        else:
            self._schedule_next(group, parameter, state)

    def _random(self, group: Group, parameter: Tensor, state: State) -> Tensor:
        """The present projection, r x k, with entries of variance 1/r."""
        shape = matrix_shape(parameter)
        rank, size = rank_of(group["rank"], shape), shape[1] if state["side"] == "right" else shape[0]
        draw = gaussian(group["seed"], self._address(parameter).index, state["refreshes"] - 1)
        return draw(rank, size, parameter.device).div_(math.sqrt(rank)).to(parameter.dtype)

    def _update_matrix(self, group: Group, parameter: Tensor, gradient: Tensor) -> None:
        self._begin(group, parameter, gradient)
        state = self.state[parameter]
        bases = self._bases(group, parameter) or (self._random(group, parameter, state),)
        low = project(gradient, bases, state["side"])
        minus_n0 = normalised_step(low, state, UNCORRECTED, group)
        if group["scale_type"] == "channel":
            sigma = scaling(low, minus_n0)
        else:
            sigma = (sharding.norm(minus_n0, parameter) / (sharding.norm(low, parameter) + 1e-8)).view(1)
        size, strength = uncorrected_rate(group, state["step"]), math.sqrt(group["scale"])
        if group["scale_front"]:
            sigma = sigma * strength
        else:
            size *= strength
        change, last = Change(state["side"], -size), last_norm(state, sigma)
        if is_shared(parameter):
            # the operator would see the norm of this process's rows
            norm = sharding.norm(sigma * channel_norms(gradient, state["side"]), parameter)
            change.add_gradient(gradient, sigma * limit(norm, last, group["norm_growth"]))
        else:
            change.add_gradient(gradient, sigma, last, group["norm_growth"])
        self._write(group, parameter, change)


def check_channels(group: Group) -> None:
    """Refuse what has no channels, or cannot grow."""
    if group["proj_type"] == "full":
        raise ConfigError("proj_type: full has no channels to scale; use std, reverse_std, right or left")
    if not group["norm_growth"] >= 1:
        raise ConfigError(f"norm_growth: {group['norm_growth']} would let updates only shrink; use for example 1.01")

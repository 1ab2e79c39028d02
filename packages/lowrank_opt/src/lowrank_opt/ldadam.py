"""LDAdam: Adam in a subspace that follows the gradient at every step, and what falls outside comes back at the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lm_core.errors import ConfigError, RunFailed
from lowrank_opt.base import BaseOptimizer, Group, State, rate
from lowrank_opt.galore import GaLoreAdamW, has_basis
from lowrank_opt.matrix import Change, matrix_shape, normalised_step
from lowrank_opt.projector import basis, canonical_sign, factors, gaussian, largest_magnitude, orth, project, rank_of, transfer


class LDAdamW(GaLoreAdamW):
    """LDAdam for parameters of groups with a `rank`; AdamW for the others.

    With A = G + E: the basis is one power iteration on B = rho back(M) + (1 - rho) A from that of the step before
    (the first one is that of A), both moments are carried into it, and the update is Adam's on L = proj(A). E is what
    the step left out: A - back(L), and the part of the momentum that the new basis lost. It takes as much memory as a
    float32 gradient; error_feedback=False does without it.
    """

    _identity: tuple[str, ...] = (*GaLoreAdamW._identity, "error_feedback")
    _takes_shares = False
    _needs_gradient = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        rho: float = 0.908,
        error_feedback: bool = True,
        proj_type: str = "std",
        full_rank_policy: str = "identity",
        proj_dtype: str = "param",
        seed: int = 0,
        stochastic_rounding: bool = True,
        state_bits: int | None = None,
        block_size: int = 256,
        min_8bit_size: int = 4096,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        settings["state_bits"] = state_bits or self._state_bits
        # what GaLore's groups have and this optimizer fixes: every step refreshes, and L's step is taken whole
        settings.update(update_proj_gap=1, scale=1.0, proj_method="gram", moment_transfer="project", stagger=False, adaptive=False)
        settings.update(oversample=0, power_iters=1, compat="none")
        self._refreshed, self.found = {}, {}
        BaseOptimizer.__init__(self, params, settings)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["proj_type"] == "full":
            raise ConfigError("proj_type: full has two bases, and a power iteration follows one; use std, reverse_std, right or left")
        if group["rank"] is not None and group["state_bits"] != 32:
            raise ConfigError("state_bits: the moments of LDAdam change their basis at every step and stay float32; use 32, or galore8bit")
        if not 0 <= group["rho"] < 1:
            raise ConfigError(f"rho: {group['rho']} must lie in [0, 1); use for example 0.908")

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        layout = super()._layout(group, parameter)
        if self._is_matrix(group, parameter) and group["error_feedback"]:
            layout["error"] = matrix_shape(parameter)
        return layout

    def _update_matrix(self, group: Group, parameter: Tensor, gradient: Tensor) -> None:
        state = self._matrix_state(group, parameter)
        state["step"] += 1
        side, target = state["side"], state["exp_avg"].dtype
        if not largest_magnitude(gradient) < torch.inf:
            name = self._address(parameter).name
            raise RunFailed(f"{name}: its gradient is not finite at step {state['step']}; lower the learning rate or clip")
        # the buffer of the error becomes A, and then the new error
        whole = state["error"].add_(gradient) if group["error_feedback"] else gradient.to(target)
        lost = self._follow(group, parameter, whole, state)
        bases = tuple(b.to(target) for b in self._bases(group, parameter))
        low = project(whole, bases, side)
        if group["error_feedback"]:
            add_back_(whole, low, bases, side, -1.0)
            for momentum, its_bases, sign in lost:
                add_back_(whole, momentum, its_bases, side, sign * group["betas"][0] / (1 - group["betas"][0]))
        minus_n = normalised_step(low, state, state["step"], group)
        self._write(group, parameter, Change(side, rate(group)).add_back(minus_n, self._bases(group, parameter)))

    def _follow(self, group: Group, parameter: Tensor, whole: Tensor, state: State) -> list[tuple[Tensor, tuple[Tensor, ...], float]]:
        """New basis, with the moments carried into it; the momentum before (+) and after (-), each with its basis."""
        side, before = state["side"], state["step"] - 1
        state["refreshes"] += 1
        state["refresh_step"], state["next_refresh"] = state["step"], state["step"] + 1
        if not has_basis(state):
            rank = rank_of(group["rank"], matrix_shape(parameter))
            draw = gaussian(group["seed"], self._address(parameter).index, 0)
            self._store(group, parameter, state, basis(whole, side, rank, "gram", draw=draw)[:1])
            return []
        first, second = state["exp_avg"], state["exp_avg_sq"]
        old = tuple(b.to(first.dtype) for b in self._bases(group, parameter))
        scale = 1 - group["betas"][0] ** before if before else 1.0
        self._store(group, parameter, state, (power_iteration(whole, first / scale, old[0], side, group["rho"]),))
        new = tuple(b.to(first.dtype) for b in self._bases(group, parameter))
        momentum = first.clone()
        if before:
            transfer(first, second, (new[0] @ old[0].t(),), before, group["betas"])
        return [(momentum, old, 1.0), (first.clone(), new, -1.0)] if group["error_feedback"] else []

    def refresh(self, now: bool = True) -> None:
        """Nothing to do: every step computes its basis."""


def power_iteration(whole: Tensor, mean: Tensor, old: Tensor, side: str, rho: float) -> Tensor:
    """The basis (r x k) after one power iteration from `old` on B = rho back(mean) + (1 - rho) A, which is never formed."""
    matrix = whole if side == "left" else whole.t()
    # B^T old^T is d x r; its size does not matter, only its directions
    turned = torch.addmm(mean.t() @ (old @ old.t()), matrix.t(), old.t(), beta=rho, alpha=1 - rho)
    turned = turned / torch.linalg.vector_norm(turned).clamp_min(torch.finfo(turned.dtype).tiny)
    columns = torch.addmm(old.t() @ (mean @ turned), matrix, turned, beta=rho, alpha=1 - rho)
    return canonical_sign(orth(columns).t().contiguous())


def add_back_(whole: Tensor, low: Tensor, bases: tuple[Tensor, ...], side: Any, alpha: float) -> None:
    """whole <- whole + alpha back(low)."""
    whole.addmm_(*factors(low, bases, side), alpha=alpha)

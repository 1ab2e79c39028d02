"""GaLore: AdamW in a projected gradient space whose basis is refreshed every few hundred steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from kernels_cuda.lowrank import pack_int4, project_int4, unpack_int4
from lm_core.errors import ConfigError, InputError, RunFailed
from lowrank_opt import compat as galore_torch
from lowrank_opt import sharding
from lowrank_opt.base import BaseOptimizer, Group, State, choice, decay_factor, is_shared, local, rate, work_dtype
from lowrank_opt.int4 import PARTS, packed_layout
from lowrank_opt.matrix import (
    FULL_RANK_POLICIES,
    Change,
    MatrixOptimizer,
    check_full_rank,
    matrix_shape,
    normalised_step,
    reaches_full_rank,
)
from lowrank_opt.projector import (
    PROJ_METHODS,
    PROJ_TYPES,
    basis,
    gaussian,
    low_shape,
    project,
    rank_of,
    side_of,
    transfer,
)
from lowrank_opt.quant import Piece, moment_layout, zero_moments

log = logging.getLogger("lowrank_opt")

MOMENT_TRANSFERS = ("none", "project", "reset")
PROJ_DTYPES = ("param", "fp32", "bf16", "int4")
COMPATS = ("none", "galore_torch")
BASES = ("proj", "proj_right")


class GaLoreAdamW(MatrixOptimizer):
    """AdamW on L = proj(G) for parameters of groups with a `rank`; AdamW for the others.

    GaLoreAdamW(build_param_groups(model, rank=128, update_proj_gap=200, scale=0.25), lr=1e-2)

    rank: whole number, or a fraction of the smaller side. scale: factor of a low-rank update. The basis comes
    from the gradient every `update_proj_gap` steps by `proj_method`; with `stagger` the matrices take turns, so
    that no step pays for all refreshes. `proj_dtype` is that of the basis; products with one in bfloat16 are taken in bfloat16. `moment_transfer` says what happens to the moments at a refresh.
    `adaptive` doubles the gap of a matrix (up to `max_gap`, default 16 gaps) whose leading direction stays.
    compat="galore_torch" reproduces that library, for comparison.
    """

    _needs_gradient = False
    _takes_shares = True
    # Whether compat hands matrices to the module of that name, or changes details of this class's own update.
    _mirrors = True
    _refreshed: dict[Tensor, tuple[float, int]]
    # Bases for refreshes of the coming step that an engine has had computed elsewhere.
    found: dict[Tensor, tuple[Tensor, ...]]
    _identity: tuple[str, ...] = (*MatrixOptimizer._identity, "rank", "proj_type", "proj_dtype", "full_rank_policy", "compat")

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
        scale: float = 0.25,
        proj_type: str = "std",
        proj_method: str = "auto",
        oversample: int = 16,
        power_iters: int = 2,
        moment_transfer: str = "none",
        stagger: bool = True,
        adaptive: bool = False,
        adaptive_threshold: float = 0.4,
        adaptive_window: int = 5,
        max_gap: int | None = None,
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
        # galore-torch's own default differs
        settings["eps"] = eps if eps is not None else 1e-6 if compat == "galore_torch" else 1e-8
        self._refreshed, self.found = {}, {}
        BaseOptimizer.__init__(self, params, settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._refreshed, self.found = {}, {}

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        for name, allowed in (
            ("proj_type", PROJ_TYPES),
            ("proj_method", PROJ_METHODS),
            ("moment_transfer", MOMENT_TRANSFERS),
            ("full_rank_policy", FULL_RANK_POLICIES),
            ("proj_dtype", PROJ_DTYPES),
            ("compat", COMPATS),
        ):
            choice(name, group[name], allowed)
        if group["update_proj_gap"] < 1:
            raise ConfigError(f"update_proj_gap: {group['update_proj_gap']} is below 1; use the number of steps between two refreshes")
        shared = self._takes_shares and group["rank"] is not None and any(map(is_shared, group["params"]))
        if shared and group["proj_type"] in ("std", "reverse_std"):
            log.info("proj_type: right for all %d matrices of a group, since every process has some rows of each", len(group["params"]))
            group["proj_type"] = "right"
        if group["compat"] == "none":
            check_full_rank(group)
        elif group["state_bits"] != 32:
            raise ConfigError(f"compat: galore_torch has no state of {group['state_bits']} bits here; use state_bits 32")
        elif group["proj_dtype"] == "int4":
            raise ConfigError("compat: galore_torch keeps whole bases; use proj_dtype param")

    def _is_matrix(self, group: Group, parameter: Tensor) -> bool:
        """Whether a projection takes place: not for a rank that reaches the smaller side (unless it rotates)."""
        if not super()._is_matrix(group, parameter):
            return False
        return group["full_rank_policy"] == "rotate" or group["compat"] != "none" or not reaches_full_rank(group, parameter)

    def _identity_group(self, group: Group) -> Group:
        """Plain AdamW whose update is multiplied by `scale` while its decay stays."""
        return {**group, "lr": rate(group) * group["scale"], "weight_decay": group["weight_decay"] / group["scale"]}

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        if not self._is_matrix(group, parameter):
            return super()._layout(group, parameter)
        shape = matrix_shape(parameter)
        rank, side = rank_of(group["rank"], shape), side_of(shape, group["proj_type"])
        low = low_shape(shape, side, rank)
        if group["compat"] != "none" and self._mirrors and side == "right":
            low = low[1], low[0]
        layout = moment_layout(group, low, row_aligned=True, shares=sharding.shares(parameter))
        for name, size in self._basis_shapes(group, parameter).items():
            layout.update(packed_layout(name, size) if group["proj_dtype"] == "int4" else {name: size})
        return layout

    def _basis_shapes(self, group: Group, parameter: Tensor) -> dict[str, tuple[int, int]]:
        """r x k of the bases that a matrix has: one, or two for side "full"."""
        shape = matrix_shape(parameter)
        rank, side = rank_of(group["rank"], shape), side_of(shape, group["proj_type"])
        sizes = {"left": shape[:1], "right": shape[1:], "full": shape}[side]
        return {name: (rank, size) for name, size in zip(BASES, sizes, strict=False)}

    def _bases(self, group: Group, parameter: Tensor) -> tuple[Tensor, ...]:
        """The bases of a matrix as they enter products; none before the first refresh."""
        state = self.state[parameter]
        if "proj_q" not in state:
            return tuple(state[name] for name in BASES if name in state)
        # products of bfloat16 gradients are taken in bfloat16
        dtype = torch.bfloat16 if parameter.dtype == torch.bfloat16 else torch.float32
        shapes = self._basis_shapes(group, parameter)
        return tuple(unpack_int4(*packed(state, name), size, dtype) for name, size in shapes.items())

    # -- step -----------------------------------------------------------------------------------------------

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        if group["compat"] == "none":
            super()._update(group, parameters)
            return
        for parameter in parameters:
            matrix = self._has_rank(group, parameter)
            if matrix and not self._mirrors:
                self._update_matrix(group, parameter, self._matrix_gradient(parameter))
            else:
                galore_torch.update(group, parameter, self._gradient(parameter), self.state[parameter], matrix=matrix)

    def _update_matrix(self, group: Group, parameter: Tensor, gradient: Tensor) -> None:
        self._begin(group, parameter, gradient)
        self._apply(group, parameter, self._low(group, parameter, gradient))

    def _matrix_state(self, group: Group, parameter: Tensor) -> State:
        state: State = self.state[parameter]
        if not state:
            layout = self._layout(group, parameter)
            state.update(step=0, next_refresh=1, refreshes=0, gap=group["update_proj_gap"], reset_step=0, overlaps=[])
            state["refresh_step"] = 0
            state["side"] = side_of(matrix_shape(parameter), group["proj_type"])
            moments = {name: shape for name, shape in layout.items() if not name.startswith("proj")}
            if self.owns(parameter):
                state.update(zero_moments(moments, parameter, dimension=1))
            self._mark_cut(group, parameter, state)
        return state

    def _shared_along(self, parameter: Tensor, name: str) -> int | None:
        """Bases are everywhere; L lies column by column where the rows of the matrix do."""
        if name.startswith("proj"):
            return None
        return 1 if self._is_matrix(self._group_of(parameter), parameter) else super()._shared_along(parameter, name)

    def _accumulates_low(self, group: Group, parameter: Tensor) -> bool:
        low_only = not self._needs_gradient and group["compat"] == "none"
        return low_only and self._has_rank(group, parameter) and self._is_matrix(group, parameter)

    def _begin_low(self, group: Group, parameter: Tensor) -> None:
        self._begin(group, parameter, self._matrix_gradient(parameter))

    def _accumulate_low(self, group: Group, parameter: Tensor) -> Tensor:
        return self._low(group, parameter, self._matrix_gradient(parameter))

    def _low_shape(self, group: Group, parameter: Tensor) -> tuple[int, int]:
        shape = matrix_shape(parameter)
        return low_shape(shape, side_of(shape, group["proj_type"]), rank_of(group["rank"], shape))

    def refresh_is_due(self, parameter: Tensor) -> bool:
        """Whether the coming step computes a new basis for `parameter`."""
        state = self.state.get(parameter)
        return not state or state["step"] + 1 >= state["next_refresh"]

    def _begin(self, group: Group, parameter: Tensor, gradient: Tensor) -> None:
        """Count the step, and refresh the basis from `gradient` (m x n) if that is due."""
        state = self._matrix_state(group, parameter)
        state["step"] += 1
        if state["step"] >= state["next_refresh"]:
            self._refresh(group, parameter, gradient, state)

    def _low(self, group: Group, parameter: Tensor, gradient: Tensor) -> Tensor:
        """L of a gradient, m x n."""
        state = self.state[parameter]
        if "proj_q" in state and state["side"] != "full" and gradient.dtype in (torch.float32, torch.bfloat16):
            rank = self._basis_shapes(group, parameter)["proj"][0]
            low = torch.empty(rank, gradient.shape[0 if state["side"] == "right" else 1], device=gradient.device)
            dtype = torch.bfloat16 if parameter.dtype == torch.bfloat16 else torch.float32
            project_int4(low, gradient, *packed(state, "proj"), state["side"], dtype=dtype)
            return low
        return project(gradient, self._bases(group, parameter), state["side"], halves=True)

    def _apply(self, group: Group, parameter: Tensor, low: Tensor) -> None:
        """Finish the update with L: moments, then W <- (1 - lr decay) W - lr scale back(N)."""
        state = self.state[parameter]
        bases = self._bases(group, parameter)
        # products with a basis in bfloat16 take bfloat16 numbers
        dtype = torch.bfloat16 if bases[0].dtype == torch.bfloat16 else torch.float32
        minus_n = normalised_step(low, state, state["step"] - state["reset_step"], group, dtype)
        self._write(group, parameter, Change(state["side"], rate(group) * group["scale"]).add_back(minus_n, bases))

    def _write(self, group: Group, parameter: Tensor, change: Change) -> None:
        rounding = self._rounding(group, parameter, self.state[parameter]["step"])
        change.write(parameter, decay_factor(group), rounding, decay_after=group["compat"] != "none")

    # -- bases ----------------------------------------------------------------------------------------------

    def _refresh(self, group: Group, parameter: Tensor, gradient: Tensor, state: State) -> None:
        """New basis from `gradient` for the step `state["step"]`."""
        started = time.perf_counter()
        name, step = self._address(parameter).name, state["step"]
        largest = sharding.largest(gradient, parameter)
        if not largest < torch.inf:
            raise RunFailed(f"{name}: its gradient is not finite at step {step}; lower the learning rate or clip")
        if largest == 0:
            # nothing to learn a basis from: keep the one there is, and try again at the next step
            if not has_basis(state):
                self._store(group, parameter, state, self._find(group, parameter, gradient, state)[0])
            state["next_refresh"] = step + 1
            return
        new, failures = self._find(group, parameter, gradient, state)
        old = self._bases(group, parameter)
        self._store(group, parameter, state, new)
        if state["refreshes"] > 0:
            now = self._bases(group, parameter)
            if self.owns(parameter):
                self._carry_moments(group, state, old, now)
            if group["adaptive"]:
                adapt_gap(group, state, old[0], now[0])
        self._schedule_next(group, parameter, state)
        self._refreshed[parameter] = (time.perf_counter() - started, failures)

    def _schedule_next(self, group: Group, parameter: Tensor, state: State) -> None:
        """After the refresh of this step: the first one is followed after the matrix's share of the gap, if staggered."""
        phase = 0
        if state["refreshes"] == 0 and group["stagger"] and group["compat"] == "none":
            address = self._address(parameter)
            phase = address.index * group["update_proj_gap"] // address.matrices
        state["next_refresh"] = state["step"] + (phase or state["gap"])
        state["refreshes"] += 1
        state["refresh_step"] = state["step"]

    def find_bases(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The bases that the coming step would compute for a matrix whose refresh is due, from its present gradient."""
        group = self._group_of(parameter)
        gradient = self._matrix_gradient(parameter)
        return self._find(group, parameter, gradient, self._matrix_state(group, parameter))[0]

    def _find(self, group: Group, parameter: Tensor, gradient: Tensor, state: State) -> tuple[tuple[Tensor, ...], int]:
        if (given := self.found.pop(parameter, None)) is not None:
            return given, 0
        rank = rank_of(group["rank"], matrix_shape(parameter))
        sides = ("left", "right") if state["side"] == "full" else (state["side"],)
        draw = gaussian(group["seed"], self._address(parameter).index, state["refreshes"])
        previous = self._bases(group, parameter) if state["refreshes"] > 0 else (None, None)
        if is_shared(parameter):
            settings = {name: group[name] for name in ("oversample", "power_iters")}
            return (sharding.basis(gradient, parameter, rank, group["proj_method"], draw=draw, previous=previous[0], **settings),), 0
        found = [
            basis(
                gradient,
                cast(Literal["left", "right"], side),
                rank,
                group["proj_method"] if group["compat"] == "none" else "svd",
                draw=draw,
                previous=before,
                oversample=group["oversample"],
                power_iters=group["power_iters"],
                canonical=group["compat"] == "none",
            )
            for side, before in zip(sides, previous, strict=False)
        ]
        return tuple(new for new, _ in found), sum(failures for _, failures in found)

    def _store(self, group: Group, parameter: Tensor, state: State, new: tuple[Tensor, ...]) -> None:
        for name, tensor in zip(BASES, new, strict=False):
            if group["proj_dtype"] == "int4":
                state.update(zip((name + part for part in PARTS), pack_int4(tensor), strict=True))
            else:
                state[name] = tensor.to({"param": parameter.dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[group["proj_dtype"]])

    def _carry_moments(self, group: Group, state: State, previous: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> None:
        if group["moment_transfer"] == "none":
            return
        piece = Piece(state, group["block_size"]) if "exp_avg_q" in state else None
        first, second = piece.read() if piece else (local(state["exp_avg"]), local(state["exp_avg_sq"]))
        if group["moment_transfer"] == "reset":
            first.zero_()
            second.zero_()
            state["reset_step"] = state["step"] - 1
        elif (before := state["step"] - 1 - state["reset_step"]) > 0:
            changes = tuple(new.to(first.dtype) @ old.to(first.dtype).t() for new, old in zip(now, previous, strict=True))
            transfer(first, second, changes, before, group["betas"])
        if piece:
            piece.write(first, second)

    @torch.no_grad()
    def refresh(self, now: bool = True) -> None:
        """Every basis anew: from the present gradients (`now`), or from those of the next step.

        With `now`, the next refresh of each is one gap after the coming step.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["compat"] != "none" or not self._is_matrix(group, parameter):
                    continue
                state = self._matrix_state(group, parameter)
                if not now or parameter.grad is None:
                    state["next_refresh"] = state["step"] + 1
                    continue
                state["step"] += 1
                self._refresh(group, parameter, self._matrix_gradient(parameter), state)
                state["step"] -= 1

    @torch.no_grad()
    def set_basis(self, parameter: Tensor, *new: Tensor) -> None:
        """Use `new` (r x k with orthonormal rows; two of them, left and right, for proj_type full) until the next refresh."""
        group = self._group_of(parameter)
        shapes = self._basis_shapes(group, parameter) if self._is_matrix(group, parameter) else {}
        if [tuple(tensor.shape) for tensor in new] != list(shapes.values()):
            needed = " and ".join(str(shape) for shape in shapes.values()) or "none: it is dense"
            raise InputError(f"basis of {self._address(parameter).name}: it has shape {[tuple(t.shape) for t in new]}; needed is {needed}")
        state = self._matrix_state(group, parameter)
        self._store(group, parameter, state, tuple(tensor.to(parameter.device, copy=True) for tensor in new))
        state["next_refresh"] = state["step"] + 1 + state["gap"]
        state["refreshes"] += 1
        state["refresh_step"] = state["step"]

    @torch.no_grad()
    def stats(self) -> dict[str, dict[str, float | None]]:
        """By parameter name: `energy` = ||L||^2 / ||G||^2 of the present gradient (None without one), `age` of the
        basis in steps, `seconds` of the last refresh and `fallbacks` of its method (None after loading)."""
        found: dict[str, dict[str, float | None]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if not has_basis(state):
                    continue
                energy = None
                if parameter.grad is not None:
                    gradient = self._matrix_gradient(parameter).to(work_dtype(parameter.dtype))
                    bases = tuple(b.to(gradient.dtype) for b in self._bases(group, parameter))
                    low = project(gradient, bases, state["side"])
                    energy = float(sharding.norm(low, parameter) / sharding.norm(gradient, parameter)) ** 2
                seconds, fallbacks = self._refreshed.get(parameter, (None, None))
                age = state["step"] - state["refresh_step"]
                found[self._address(parameter).name] = {"energy": energy, "age": age, "seconds": seconds, "fallbacks": fallbacks}
        return found


class GaLoreAdamW8bit(GaLoreAdamW):
    """GaLore whose moments take 8 bits, in blocks that restart at every row of L."""

    _state_bits = 8


def has_basis(state: State) -> bool:
    """Whether a parameter's state holds a basis, whole or in 4 bits."""
    return "proj" in state or "proj_q" in state


def packed(state: State, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and offsets of a basis in 4 bits."""
    codes, scale, zero = (state[name + part] for part in PARTS)
    return codes, scale, zero


def adapt_gap(group: Group, state: State, old: Tensor, new: Tensor) -> None:
    """Double the gap of a matrix whose leading direction has stayed for `adaptive_window` refreshes."""
    cosine = torch.nn.functional.cosine_similarity(new[0].float(), old[0].float(), dim=0)
    overlaps = [*state["overlaps"], abs(float(cosine))][-group["adaptive_window"] :]
    if len(overlaps) == group["adaptive_window"] and sum(overlaps) / len(overlaps) >= group["adaptive_threshold"]:
        largest = group["max_gap"] or 16 * group["update_proj_gap"]
        state["gap"] = max(state["gap"], min(2 * state["gap"], largest))
        overlaps = []
    state["overlaps"] = overlaps

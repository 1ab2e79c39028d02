"""What optimizers with a low-rank update of matrices share: which parameters those are, and how a weight is written."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

from kernels_cuda.lowrank import adam_step_, channel_update_, lowrank_update_
from kernels_cuda.lowrank.channel_update_ import reference as channel_definition
from kernels_cuda.lowrank.lowrank_update_ import reference as lowrank_definition
from lm_core.errors import ConfigError
from lowrank_opt.adamw import AdamW, normalised
from lowrank_opt.base import Group, Rounding, State, UnsupportedDistributedError, is_shared, local
from lowrank_opt.projector import Side, rank_of
from lowrank_opt.quant import MOMENTS, Piece
from lowrank_opt.sharding import by_rows

log = logging.getLogger("lowrank_opt")

FULL_RANK_POLICIES = ("identity", "rotate", "error")
# Number of a step at which Adam's bias correction has become one: N is then N0 = M / (sqrt(V) + eps).
UNCORRECTED = 2**62


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight; a convolution is seen as output channels x the rest."""
    return parameter.shape[0], math.prod(parameter.shape[1:])


class MatrixOptimizer(AdamW):
    """AdamW for groups without a rank; `_update_matrix` of a subclass for the matrices of groups with one."""

    _takes_rank = True
    # Whether matrices may be shared out over processes by rows.
    _takes_shares = False

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        rank = group["rank"]
        if rank is None:
            return
        if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else isinstance(rank, float) and 0 < rank < 1):
            raise ConfigError(f"rank: {rank!r} is not a rank; use a whole number >= 1, or a fraction of the smaller side between 0 and 1")
        if "scale" in group and not group["scale"] > 0:
            raise ConfigError(f"scale: {group['scale']} is not above 0; use for example 0.25")

    def _has_rank(self, group: Group, parameter: Tensor) -> bool:
        if group["rank"] is None:
            return False
        name = self._address(parameter).name
        if parameter.ndim < 2:
            raise UnsupportedDistributedError(
                f"rank: {name} is {parameter.ndim}-dimensional, and a low-rank update needs a matrix; engines that "
                "flatten parameters destroy it. Use --engine replicated, or put the parameter into a group without rank"
            )
        if is_shared(parameter):
            self._check_shares(group, parameter, name)
        return True

    def _check_shares(self, group: Group, parameter: Any, name: str) -> None:
        """Refuse a DTensor that this optimizer cannot update from the rows of each process."""
        instead = "use --engine replicated, or put the parameter into a group without rank"
        if not self._takes_shares:
            raise UnsupportedDistributedError(f"rank: {name} is a DTensor, and {type(self).__name__} needs the whole matrix; {instead}")
        if not by_rows(parameter):
            raise UnsupportedDistributedError(
                f"rank: {name} is a DTensor shared out by {parameter.placements}; low-rank updates know rows (Shard(0)) alone, so {instead}"
            )
        if group["proj_type"] != "right" or group["compat"] != "none":
            found = f"proj_type {group['proj_type']}" if group["compat"] == "none" else f"compat {group['compat']}"
            raise UnsupportedDistributedError(
                f"rank: {name} is a DTensor, of which every process has some rows, and {found} needs the whole matrix; "
                "use proj_type right and compat none, or --engine replicated"
            )

    def _is_matrix(self, group: Group, parameter: Tensor) -> bool:
        return group["rank"] is not None and parameter.ndim >= 2

    def _identity_group(self, group: Group) -> Group:
        """The group for parameters whose rank reaches the smaller side: plain AdamW."""
        return group

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        dense = []
        for parameter in parameters:
            if self._has_rank(group, parameter) and self._is_matrix(group, parameter):
                self._update_matrix(group, parameter, self._matrix_gradient(parameter))
            else:
                dense.append(parameter)
        if dense:
            super()._update(group if group["rank"] is None else self._identity_group(group), dense)

    def _matrix_gradient(self, parameter: Tensor) -> Tensor:
        """The gradient as m x n; this process's rows of one that is shared out."""
        gradient = local(self._gradient(parameter))
        return gradient.reshape(matrix_shape(gradient))

    def _update_matrix(self, group: Group, parameter: Tensor, gradient: Tensor) -> None:
        """One update of a matrix with its gradient, m x n."""
        raise NotImplementedError


def reaches_full_rank(group: Group, parameter: Tensor) -> bool:
    """Whether the group's rank is no smaller than the parameter's smaller side, so that projecting does nothing."""
    shape = matrix_shape(parameter)
    return rank_of(group["rank"], shape) >= min(shape)


def check_full_rank(group: Group) -> None:
    """Apply full_rank_policy to a group: refuse, or say what happens."""
    full = [p for p in group["params"] if group["rank"] is not None and p.ndim >= 2 and reaches_full_rank(group, p)]
    if full and group["full_rank_policy"] == "error":
        raise ConfigError(f"rank: {group['rank']} reaches the smaller side of a {matrix_shape(full[0])} matrix; use a smaller rank")
    if full and group["full_rank_policy"] == "identity":
        log.info("rank %s reaches the smaller side of %d matrices: projection has no effect there", group["rank"], len(full))


def normalised_step(low: Tensor, state: State, step: int, group: Group, dtype: torch.dtype = torch.float32) -> Tensor:
    """Update the moments with L and return minus Adam's normalised step, r x d: in `dtype`, or float64 for a float64 L.

    `step` is the number of this update, 1 for the first, or UNCORRECTED.
    """
    first, second = (local(state[name]) if name in state else None for name in MOMENTS)
    if low.dtype == torch.float64 and first is not None and second is not None:
        return normalised(low, first, second, step, group)
    if first is not None and second is not None:
        out, (beta1, beta2) = torch.empty_like(low, dtype=dtype, memory_format=torch.contiguous_format), group["betas"]
        adam_step_(low, first, second, out, beta1, beta2, group["eps"], step, alpha=1.0)
        return out
    out = torch.empty_like(low, memory_format=torch.contiguous_format)
    Piece(state, group["block_size"]).adam_(low.contiguous(), out, step, group, decay=0.0, alpha=1.0)
    return out.to(dtype)


class Change:
    """What is added to a weight, alpha times: back(low), and the gradient with each channel times a factor.

    Channels are the rows of the weight for side right and its columns for side left; `factor` holds one number
    for each of them, or one for all.
    """

    def __init__(self, side: Side, alpha: float) -> None:
        self.side: Side = side
        self.alpha = alpha
        self.low: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self.scaled: tuple[Tensor, Tensor, Tensor | None, float] | None = None

    def add_back(self, low: Tensor, bases: tuple[Tensor, ...]) -> Change:
        self.low = low, bases
        return self

    def add_gradient(self, gradient: Tensor, factor: Tensor, last: Tensor | None = None, growth: float = 1.0) -> Change:
        """With `last`, the norm of the step before, this part grows by `growth` at most, and `last` becomes its norm."""
        self.scaled = gradient, factor, last, growth
        return self

    def write(self, parameter: Tensor, decay: float, rounding: Rounding | None, decay_after: bool = False) -> None:
        """W <- decay W + alpha change, or decay (W + alpha change)."""
        alpha = -self.alpha * (decay if decay_after else 1.0)
        parameter = local(parameter.detach())
        # a weight that is not contiguous goes through a copy
        weight = parameter.contiguous().view(matrix_shape(parameter))
        key = rounding.key if rounding else (-1, 0)
        basis, low = (None, None) if self.low is None else (self.low[1][0], self.low[0])
        if self.low is not None and self.side == "full":
            low = torch.mm(self.low[0], self.low[1][1].to(self.low[0].dtype))
        taken = [tensor.dtype for tensor in (weight, low, self.scaled and self.scaled[0]) if tensor is not None]
        # the operators take no other types; their definitions do, and need some copies of the weight
        whole = {torch.float32, torch.bfloat16}.issuperset(taken)
        if self.scaled is not None:
            update = channel_update_ if whole else channel_definition.channel_update_
            gradient, factor, last, growth = self.scaled
            axis = 0 if self.side == "right" else 1
            update(weight, gradient, factor, axis, last, growth, alpha, decay, *key, P=basis, N=low)
        elif low is not None and basis is not None:
            side: Literal["left", "right"] = "right" if self.side == "right" else "left"
            (lowrank_update_ if whole else lowrank_definition.lowrank_update_)(weight, basis, low, side, alpha, decay, *key)
        if not parameter.is_contiguous():
            parameter.copy_(weight.view(parameter.shape))

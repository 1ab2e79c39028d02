"""The definition of the op, in plain PyTorch. m rows and n columns of a weight, r rank."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.lowrank.lowrank_update_.reference import round_at_random


def limit(norm: Tensor, prev_norm: Tensor, gamma: float) -> Tensor:
    """The factor that keeps an update of norm `norm` within `gamma` times the last one, which it then replaces; stays on the device.

    A last norm of zero limits nothing: otherwise one step without gradient would stop the weight for ever.
    """
    factor = torch.where((prev_norm > 0) & (norm > gamma * prev_norm), gamma * prev_norm / norm, torch.ones_like(norm))
    prev_norm.copy_(norm * factor)
    return factor


def channel_update_(
    W: Tensor,
    G: Tensor,
    sigma: Tensor,
    axis: int,
    prev_norm: Tensor | None,
    gamma: float,
    alpha: float,
    decay: float = 1.0,
    seed: int = -1,
    offset: int = 0,
    *,
    P: Tensor | None = None,
    N: Tensor | None = None,
) -> None:
    """See the public function of the same name; arithmetic is float32 or wider."""
    wide = torch.promote_types(W.dtype, torch.float32)
    change = G.to(wide) * (sigma[:, None] if axis == 0 else sigma)
    if prev_norm is not None:
        change = change * limit(torch.linalg.vector_norm(change), prev_norm, gamma)
    if P is not None and N is not None:
        left, right = (N.t(), P) if axis == 0 else (P.t(), N)
        change = change + left.to(wide) @ right.to(wide)
    value = -alpha * change if decay == 0 else decay * W.to(wide) - alpha * change
    W.copy_(round_at_random(value, seed, offset) if seed >= 0 and W.dtype == torch.bfloat16 else value)

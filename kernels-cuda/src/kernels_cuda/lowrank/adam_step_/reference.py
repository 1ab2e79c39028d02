"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_step_(
    L: Tensor,
    m: Tensor,
    v: Tensor,
    out: Tensor,
    b1: float,
    b2: float,
    eps: float,
    step: int,
    *,
    decay: float = 0.0,
    alpha: float = -1.0,
) -> None:
    """See the public function of the same name. Every factor is rounded to the dtype of the moments, as kernels do."""

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=m.dtype, device=m.device)

    L = L.to(m.dtype)

    m.copy_(_fused(scalar(b1), m, scalar(1 - b1) * L))
    v.copy_(_fused(scalar(b2), v, scalar(1 - b2) * L * L))
    # torch's own float32 root may be off by a rounding
    root = (v * scalar(1 / (1 - b2**step))).double().sqrt().to(m.dtype)
    normalised = m * scalar(1 / (1 - b1**step)) / (root + scalar(eps))
    out.copy_(scalar(-alpha) * normalised if decay == 0 else _fused(scalar(-alpha), normalised, scalar(decay) * out.to(m.dtype)))


def _fused(factor: Tensor, value: Tensor, addend: Tensor) -> Tensor:
    """factor * value + addend, rounded once (in float32; float64 holds the product exactly)."""
    return (factor.double() * value.double() + addend.double()).to(value.dtype)

"""Adam's moments and normalised step in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.adam_step_ import binding, reference
from kernels_cuda.lowrank.blocks import check_adam, check_like

__all__ = ["adam_step_"]


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
    """One update of Adam: m <- b1 m + (1 - b1) L, v <- b2 v + (1 - b2) L^2, out <- decay out - alpha N.

    N = (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps) with the new moments; `step` counts from 1. As it stands, out
    becomes N; where out is a weight, decay = 1 - lr * weight decay and alpha = lr make it AdamW. With decay 0, what out held
    before is not read.

    L and out are float32 or bfloat16, the moments float32, and so is the arithmetic; a bfloat16 out is rounded to nearest. All are of
    one shape; m, v and out are contiguous and overlap neither each other nor L, but a bfloat16 L may be out itself.

    Raises ValueError for shapes, dtypes, devices or settings that do not fit.

    >>> L, m, v, out = torch.tensor([3.0]), torch.zeros(1), torch.zeros(1), torch.empty(1)
    >>> adam_step_(L, m, v, out, 0.9, 0.999, 1e-8, 1)
    >>> round(out.item(), 5)
    1.0
    """
    for name, tensor in (("L", L), ("out", out)):
        check.dtype(name, tensor, (torch.float32, torch.bfloat16))
    for name, tensor in (("m", m), ("v", v)):
        check.dtype(name, tensor, (torch.float32,))
    check_like("L", L, m=m, v=v, out=out)
    check_adam(b1, b2, eps, step)
    library = choice.library(binding.OP, L.device.type)
    if not library:
        reference.adam_step_(L, m, v, out, b1, b2, eps, step, decay=decay, alpha=alpha)
    elif L.numel() > 0:
        getattr(torch.ops, library).adam_step_(L.contiguous(), m, v, out, b1, b2, eps, step, decay, alpha)

"""Numbers in 4 bits, for bases of low-rank spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.pack_int4 import binding, reference

__all__ = ["pack_int4"]


def pack_int4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and offsets of x, seen flat and cut into groups of 256 (the last may be short).

    Every group is cut into 15 equal steps from its least number to its greatest, and each number gets the nearest of the 16 levels.
    codes: uint8, two to a byte, the even one in the lower half; scale and zero: float16, the step and the least number of each group.

    x: float32 or bfloat16, finite, of any shape.

    Raises ValueError for a dtype that does not fit.

    >>> codes, scale, zero = pack_int4(torch.tensor([0.0, 1.0, 15.0]))
    >>> codes.tolist(), scale.item(), zero.item()
    ([16, 15], 1.0, 0.0)
    """
    check.dtype("x", x, (torch.float32, torch.bfloat16))
    library = choice.library(binding.OP, x.device.type)
    if not library or x.numel() == 0:
        return reference.pack_int4(x)
    groups = (x.numel() + reference.GROUP - 1) // reference.GROUP
    codes = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8, device=x.device)
    scale, zero = (torch.empty(groups, dtype=torch.float16, device=x.device) for _ in range(2))
    getattr(torch.ops, library).pack_int4(x.contiguous(), codes, scale, zero)
    return codes, scale, zero

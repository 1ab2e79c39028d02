"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels_cuda.lowrank.pack_int4.reference import GROUP


def unpack_int4(codes: Tensor, scale: Tensor, zero: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """See the public function of the same name."""
    size = math.prod(shape)
    flat = torch.stack((codes & 15, codes >> 4), dim=1).view(-1)[:size].float()
    steps, offsets = (part.float().repeat_interleave(GROUP)[:size] for part in (scale, zero))
    return (flat * steps + offsets).view(tuple(shape)).to(dtype)

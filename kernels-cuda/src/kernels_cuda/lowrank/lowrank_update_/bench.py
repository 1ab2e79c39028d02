"""Shapes to time, and what they are compared with. m rows and n columns of a weight, r rank."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.lowrank import lowrank_update_
from kernels_cuda.lowrank.lowrank_update_ import reference
from kernels_cuda.lowrank.lowrank_update_.cases import make


def plain(W: Tensor, P: Tensor, N: Tensor, side: str, alpha: float, decay: float, seed: int, offset: int) -> None:
    """What people write: back(N) whole, and random bits from torch's generator."""
    value = W.float().mul_(decay).sub_((P.t() @ N.to(P.dtype)).float(), alpha=alpha)
    if seed < 0 or W.dtype != torch.bfloat16:
        W.copy_(value)
        return
    noise = torch.randint(0, 2**16, W.shape, dtype=torch.int32)
    W.copy_(value.view(torch.int32).add_(noise).bitwise_and_(-(2**16)).view(torch.float32))


def shape(size: int, rank: int, dtype: torch.dtype) -> Shape:
    """A square weight, rounded at random where it is bfloat16."""
    return Shape(
        name=f"{size} x {size} rank {rank}",
        dtype=dtype,
        make=partial(make, dtype, size, size, rank, alpha=1e-4, decay=0.9999, seed=1),
        function=lowrank_update_,
        baseline=plain,
        baseline_name="decay W - alpha P.T @ N, with torch.randint where W is bfloat16",
        flops=2 * size * size * rank,
        bytes=2 * dtype.itemsize * size * size,
        peers={"the reference": reference.lowrank_update_},
    )


SHAPES = [shape(2048, 512, dtype) for dtype in (torch.bfloat16, torch.float32)]

"""Shapes to time, and what they are compared with. m rows and n columns of a weight, r rank."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.lowrank import channel_update_
from kernels_cuda.lowrank.channel_update_ import reference
from kernels_cuda.lowrank.channel_update_.cases import make


def plain(
    W: Tensor,
    G: Tensor,
    sigma: Tensor,
    axis: int,
    prev_norm: Tensor,
    gamma: float,
    alpha: float,
    decay: float,
    seed: int,
    offset: int,
    P: Tensor | None = None,
    N: Tensor | None = None,
) -> None:
    """What people write: the update whole, and random bits from torch's generator."""
    update = G.float() * (sigma[:, None] if axis == 0 else sigma)
    norm = update.norm()
    update *= torch.where(norm > gamma * prev_norm, gamma * prev_norm / norm, 1.0)
    prev_norm.copy_(torch.minimum(norm, gamma * prev_norm))
    if P is not None and N is not None:
        update += (N.t().to(P.dtype) @ P).float() if axis == 0 else (P.t() @ N.to(P.dtype)).float()
    value = W.float().mul_(decay).sub_(update, alpha=alpha)
    if W.dtype == torch.bfloat16:
        noise = torch.randint(0, 2**16, W.shape, dtype=torch.int32)
        value = value.view(torch.int32).add_(noise).bitwise_and_(-(2**16)).view(torch.float32)
    W.copy_(value)


def shape(size: int, rank: int, dtype: torch.dtype) -> Shape:
    """A square weight, rounded at random where it is bfloat16, with and without a low-rank term."""
    return Shape(
        name=f"{size} x {size}" + (f" and rank {rank}" if rank else ""),
        dtype=dtype,
        make=partial(make, dtype, size, size, r=rank, alpha=1e-6, decay=0.9999, seed=1),
        function=channel_update_,
        baseline=plain,
        baseline_name="the same in torch, with torch.randint where W is bfloat16",
        flops=2 * size * size * rank,
        bytes=4 * dtype.itemsize * size * size,
        peers={"the reference": reference.channel_update_},
    )


SHAPES = [shape(2048, rank, dtype) for rank in (0, 512) for dtype in (torch.bfloat16, torch.float32)]

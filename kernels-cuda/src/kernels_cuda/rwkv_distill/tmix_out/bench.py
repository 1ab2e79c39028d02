"""Shapes to time, and what they are compared with. T time, H heads, N head size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.rwkv_distill import tmix_out
from kernels_cuda.rwkv_distill.tmix_out import reference
from kernels_cuda.rwkv_distill.tmix_out.cases import make


def function(**arguments: Any) -> Tensor:
    """The op, as one number to differentiate."""
    return tmix_out(**arguments).sum()


def reference_sum(**arguments: Any) -> Tensor:
    """The reference."""
    return reference.tmix_out(**arguments).sum()


def plain(y: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor, gn_w: Tensor, gn_b: Tensor, gate: Tensor, eps: float) -> Tensor:
    """What people write."""
    batch, time, heads, size = y.shape
    normalised = F.group_norm(y.view(batch * time, heads * size), heads, gn_w.flatten(), gn_b.flatten(), eps).view(y.shape)
    return ((normalised + (r * k * r_k).sum(-1, keepdim=True) * v) * gate).sum()


def shape(time: int, heads: int, size: int) -> Shape:
    """Forward and backward."""
    return Shape(
        name=f"fwd+bwd  T={time} H={heads} N={size}",
        dtype=torch.float32,
        make=lambda: make(torch.float32, 1, time, heads, size),
        function=function,
        baseline=plain,
        baseline_name="F.group_norm + (r * k * r_k).sum(-1) * v, times gate",
        flops=0,
        # five are read and one is written; then six are read and five written
        bytes=(6 + 11) * 4 * time * heads * size,
        peers={"the reference": reference_sum},
    )


SHAPES = [shape(2048, 9, 64)]

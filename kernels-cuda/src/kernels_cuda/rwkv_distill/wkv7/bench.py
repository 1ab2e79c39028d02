"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.rwkv_distill.wkv7 import reference, wkv7
from kernels_cuda.rwkv_distill.wkv7.cases import make


def _y(**arguments: Any) -> Tensor:
    return wkv7(**arguments)[0]


def _reference_y(**arguments: Any) -> Tensor:
    return reference.wkv7(**arguments)[0]


def shape(batch: int, time: int, heads: int, size: int, dtype: torch.dtype) -> Shape:
    """Forward and backward."""
    values = batch * time * heads * size
    return Shape(
        name=f"B={batch} T={time} H={heads} N={size}",
        dtype=dtype,
        make=lambda: make(dtype, time, batch=batch, heads=heads, size=size),
        function=_y,
        baseline=_reference_y,
        baseline_name="the recurrence in PyTorch",
        # multiply-adds with each element of the state: 5 forward, 4 to have it again, 10 backward
        flops=2 * 19 * values * size,
        # six inputs read twice, y written, dy read, six gradients written
        bytes=20 * dtype.itemsize * values,
    )


SHAPES = [shape(1, 512, 14, 64, dtype) for dtype in (torch.float32, torch.bfloat16)]

"""Shapes to time, and what they are compared with."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.rwkv_distill.recurrence_bench import on_tensor_cores
from kernels_cuda.rwkv_distill.wkv6 import reference, wkv6
from kernels_cuda.rwkv_distill.wkv6.cases import make

FLA = importlib.util.find_spec("fla") is not None


def _y(**arguments: Any) -> Tensor:
    return wkv6(**arguments)[0]


def _reference_y(**arguments: Any) -> Tensor:
    return reference.wkv6(**arguments)[0]


def _fla_naive_y(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, **_: Any) -> Tensor:
    """flash-linear-attention's recurrence in PyTorch, [B, H, T, N], which takes the logarithm of the decay."""
    naive = importlib.import_module("fla.ops.rwkv6.recurrent_naive").naive_recurrent_rwkv6
    found: Tensor = naive(*(value.transpose(1, 2) for value in (r, k, v, -w.exp())), u, scale=1.0)[0]
    return found.transpose(1, 2)


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
        # multiply-adds with each element of the state: 3 forward, 2 to have it again, 6 backward
        flops=2 * 11 * values * size,
        # four inputs read twice, y written, dy read, four gradients written
        bytes=14 * dtype.itemsize * values,
        peers={"flash-linear-attention's naive recurrence": _fla_naive_y} if FLA else {},
    )


def _fla_y(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, **_: Any) -> Tensor:
    """flash-linear-attention's kernels, which take the logarithm of the decay."""
    chunk_rwkv6 = importlib.import_module("fla.ops.rwkv6").chunk_rwkv6
    found: Tensor = chunk_rwkv6(r, k, v, -w.exp(), u, scale=1.0, output_final_state=False)[0]
    return found


SHAPES = [
    *(shape(1, 512, 14, 64, dtype) for dtype in (torch.float32, torch.bfloat16)),
    on_tensor_cores(shape(8, 4096, 64, 64, torch.bfloat16), {"flash-linear-attention's chunk_rwkv6": _fla_y} if FLA else {}),
]

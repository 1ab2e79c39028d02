"""Shapes to time, and what they are compared with."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.rwkv_distill.recurrence_bench import on_tensor_cores
from kernels_cuda.rwkv_distill.wkv7 import reference, wkv7
from kernels_cuda.rwkv_distill.wkv7.cases import make

FLA = importlib.util.find_spec("fla") is not None


def _y(**arguments: Any) -> Tensor:
    return wkv7(**arguments)[0]


def _reference_y(**arguments: Any) -> Tensor:
    return reference.wkv7(**arguments)[0]


def _log_decay(w: Tensor) -> Tensor:
    return -math.exp(-0.5) * torch.sigmoid(w)


def _fla_naive_y(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
    """flash-linear-attention's recurrence in PyTorch, [B, H, T, N], which divides r by sqrt(N)."""
    naive = importlib.import_module("fla.ops.generalized_delta_rule.dplr.naive").dplr_recurrence
    found: Tensor = naive(*(value.transpose(1, 2) for value in (r * r.shape[-1] ** 0.5, k, v, a, b, _log_decay(w))))[0]
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
        # multiply-adds with each element of the state: 5 forward, 3 to have it again (S a is kept), 10 backward
        flops=2 * 18 * values * size,
        # six inputs read twice, y written, dy read, six gradients written
        bytes=20 * dtype.itemsize * values,
        peers={"flash-linear-attention's naive recurrence": _fla_naive_y} if FLA else {},
    )


def _fla_y(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
    """flash-linear-attention's kernels, which take the logarithm of the decay."""
    chunk_rwkv7 = importlib.import_module("fla.ops.rwkv7").chunk_rwkv7
    found: Tensor = chunk_rwkv7(r=r, w=_log_decay(w), k=k, v=v, a=a, b=b, output_final_state=False)[0]
    return found


SHAPES = [
    *(shape(1, 512, 14, 64, dtype) for dtype in (torch.float32, torch.bfloat16)),
    on_tensor_cores(shape(8, 4096, 64, 64, torch.bfloat16), {"flash-linear-attention's chunk_rwkv7": _fla_y} if FLA else {}),
]

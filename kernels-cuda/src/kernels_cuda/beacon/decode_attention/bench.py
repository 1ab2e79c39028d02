"""Shapes to time, and what they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_cuda.beacon.decode_attention import decode_attention, reference
from kernels_cuda.beacon.decode_attention.cases import make
from kernels_cuda.bench import Shape


def expanded(q: Tensor, k_mem: Tensor, v_mem: Tensor, k_raw: Tensor, v_raw: Tensor, scale: float, **lengths: Tensor) -> Tensor:
    """What is usual without the op: join the segments, expand keys to all heads, one fused attention."""
    keys, values = (torch.cat(pair, 2).repeat_interleave(q.shape[1] // k_mem.shape[1], 1) for pair in ((k_mem, k_raw), (v_mem, v_raw)))
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def shape(entries: int, dtype: torch.dtype, heads: int, groups: int, size: int) -> Shape:
    """One token over a memory and half a window of 1024."""
    return Shape(
        name=f"M={entries} W=512 H={heads} G={groups} d={size}",
        dtype=dtype,
        make=lambda: make(dtype, heads, groups, entries, 512, size, [(entries, 512)]),
        function=decode_attention,
        baseline=reference.decode_attention,
        baseline_name="the reference",
        flops=0,
        # keys and values are read
        bytes=2 * groups * (entries + 512) * size * dtype.itemsize,
        peers={"joined, expanded keys and values in torch's fused attention": expanded},
    )


SHAPES = [
    shape(4096, torch.float32, 9, 3, 64),
    shape(4096, torch.bfloat16, 9, 3, 64),
    shape(16384, torch.float32, 32, 8, 128),
    shape(16384, torch.bfloat16, 32, 8, 128),
]

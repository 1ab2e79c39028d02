"""Shapes to time, and what they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.beacon.rope_gather import reference, rope_gather
from kernels_cuda.beacon.rope_gather.cases import make
from kernels_cuda.bench import Shape


def function(**given: Tensor) -> Tensor:
    """The op, as one number to differentiate."""
    return sum(x.sum() for x in rope_gather(**given))  # type: ignore[return-value]


def reference_sum(**given: Tensor) -> Tensor:
    """The reference."""
    return sum(x.sum() for x in reference.rope_gather(**given))  # type: ignore[return-value]


def shape(entries: int, dtype: torch.dtype) -> Shape:
    """Forward and backward of the memory copies of a text, 4 heads of 64."""
    moved = 2 * 4 * entries * 64 * dtype.itemsize
    return Shape(
        name=f"fwd+bwd  N={entries}",
        dtype=dtype,
        make=lambda: make(dtype, 1, 4, entries, entries, 64, by_token=True),
        function=function,
        baseline=reference_sum,
        baseline_name="the reference",
        flops=0,
        # keys and values are read and written, then their gradients
        bytes=4 * moved,
    )


SHAPES = [shape(4096, torch.float32), shape(4096, torch.bfloat16)]

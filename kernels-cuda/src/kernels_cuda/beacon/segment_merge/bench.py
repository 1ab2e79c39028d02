"""Shapes to time, and what they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.beacon.segment_merge import reference, segment_merge
from kernels_cuda.beacon.segment_merge.cases import make
from kernels_cuda.bench import Shape


def function(**given: Tensor) -> Tensor:
    """The op, as one number to differentiate."""
    return sum(x.sum() for x in segment_merge(**given))  # type: ignore[return-value]


def reference_sum(**given: Tensor) -> Tensor:
    """The reference."""
    return sum(x.sum() for x in reference.segment_merge(**given))  # type: ignore[return-value]


def shape(rows: int, dtype: torch.dtype) -> Shape:
    """Forward and backward of all heads of a text, 9 heads of 64."""
    return Shape(
        name=f"fwd+bwd  N={rows} H=9 d=64",
        dtype=dtype,
        make=lambda: make(dtype, rows, 9, 64),
        function=function,
        baseline=reference_sum,
        baseline_name="the reference",
        flops=0,
        # two outputs are read and one is written; then three are read and two are written
        bytes=8 * rows * 9 * 64 * dtype.itemsize,
    )


SHAPES = [shape(1024, torch.float32), shape(1024, torch.bfloat16)]

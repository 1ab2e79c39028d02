"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.bench import Shape
from kernels_cuda.lowrank import unpack_int4
from kernels_cuda.lowrank.unpack_int4 import reference
from kernels_cuda.lowrank.unpack_int4.cases import make

RANK, SIZE = 512, 2048
SHAPES = [
    Shape(
        name=f"{RANK} x {SIZE}",
        dtype=dtype,
        make=partial(make, dtype, RANK, SIZE),
        function=unpack_int4,
        baseline=reference.unpack_int4,
        baseline_name="the reference",
        flops=0,
        bytes=RANK * SIZE // 2 + RANK * SIZE * dtype.itemsize,
    )
    for dtype in (torch.bfloat16, torch.float32)
]

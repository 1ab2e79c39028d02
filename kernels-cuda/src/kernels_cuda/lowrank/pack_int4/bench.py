"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.bench import Shape
from kernels_cuda.lowrank import pack_int4
from kernels_cuda.lowrank.pack_int4 import reference
from kernels_cuda.lowrank.pack_int4.cases import make

RANK, SIZE = 512, 2048
SHAPES = [
    Shape(
        name=f"{RANK} x {SIZE}",
        dtype=torch.float32,
        make=partial(make, torch.float32, RANK, SIZE),
        function=pack_int4,
        baseline=reference.pack_int4,
        baseline_name="the reference",
        flops=0,
        bytes=RANK * SIZE * 9 // 2,
    )
]

"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.bench import Shape
from kernels_cuda.lowrank.dequantize_blockwise import dequantize_blockwise, reference
from kernels_cuda.lowrank.dequantize_blockwise.cases import make

SIZE = 2048
SHAPES = [
    Shape(
        name=f"{SIZE} x {SIZE}",
        dtype=torch.float32,
        make=partial(make, torch.float32, SIZE, SIZE),
        function=dequantize_blockwise,
        baseline=reference.dequantize_blockwise,
        baseline_name="plain PyTorch",
        flops=0,
        bytes=SIZE * SIZE * 5,
    )
]

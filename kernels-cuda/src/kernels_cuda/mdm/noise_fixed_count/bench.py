"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.bench import Shape
from kernels_cuda.mdm.noise_fixed_count import noise_fixed_count, reference
from kernels_cuda.mdm.noise_fixed_count.cases import make

ROWS, SIZE = 64, 2048
SHAPES = [
    Shape(
        name=f"{ROWS} x {SIZE}",
        dtype=torch.float32,
        make=partial(make, torch.float32, ROWS, SIZE),
        function=noise_fixed_count,
        baseline=reference.noise_fixed_count,
        baseline_name="plain PyTorch",
        flops=0,
        # ids read and written, eligible read, masks written and read
        bytes=ROWS * SIZE * (8 + 8 + 3),
    )
]

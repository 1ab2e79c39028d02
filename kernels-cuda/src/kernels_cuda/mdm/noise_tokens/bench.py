"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.bench import Shape
from kernels_cuda.mdm.noise_tokens import noise_tokens, reference
from kernels_cuda.mdm.noise_tokens.cases import make

ROWS, SIZE = 64, 2048
SHAPES = [
    Shape(
        name=f"{ROWS} x {SIZE}",
        dtype=torch.float32,
        make=partial(make, torch.float32, ROWS, SIZE),
        function=noise_tokens,
        baseline=reference.noise_tokens,
        baseline_name="plain PyTorch",
        flops=0,
        # ids read and written, eligible read, masks written and read
        bytes=ROWS * SIZE * (8 + 8 + 3),
    )
]

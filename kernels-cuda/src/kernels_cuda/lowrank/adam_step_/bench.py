"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.bench import Shape
from kernels_cuda.lowrank import adam_step_
from kernels_cuda.lowrank.adam8bit_step_.bench import FUSED, optimizer
from kernels_cuda.lowrank.adam_step_ import reference
from kernels_cuda.lowrank.adam_step_.cases import make

SIZE = 2048
SHAPES = [
    Shape(
        name=f"{SIZE} x {SIZE}",
        dtype=torch.float32,
        make=partial(make, torch.float32, SIZE, SIZE, decay=1 - 1e-5, alpha=1e-3),
        function=adam_step_,
        baseline=optimizer(torch.optim.AdamW, fused=True),
        baseline_name=FUSED,
        flops=0,
        bytes=SIZE * SIZE * 28,
        peers={"the reference": reference.adam_step_},
    )
]

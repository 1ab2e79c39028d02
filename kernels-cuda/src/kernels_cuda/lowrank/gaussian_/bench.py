"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.lowrank import gaussian_
from kernels_cuda.lowrank.gaussian_ import reference
from kernels_cuda.lowrank.gaussian_.cases import make


def plain(out: Tensor, seed: int, param: int, index: int) -> None:
    """What people write: torch's own numbers, which differ from device to device."""
    torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(seed), out=out)


RANK, SIZE = 256, 2048
SHAPES = [
    Shape(
        name=f"{RANK} x {SIZE}",
        dtype=torch.float32,
        make=partial(make, torch.float32, RANK, SIZE),
        function=gaussian_,
        baseline=plain,
        baseline_name="torch.randn with a generator",
        flops=0,
        bytes=4 * RANK * SIZE,
        peers={"the reference": reference.gaussian_},
    )
]

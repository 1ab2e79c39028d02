"""Shapes to time, and what they are compared with. B batch, T time, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.rwkv_distill import tmix_shift
from kernels_cuda.rwkv_distill.tmix_shift import reference
from kernels_cuda.rwkv_distill.tmix_shift.cases import make


def function(h: Tensor, prev: Tensor | None, seg: Tensor | None, mus: Tensor) -> Tensor:
    """The op, as one number to differentiate."""
    return tmix_shift(h, prev, seg, mus).sum()


def reference_sum(h: Tensor, prev: Tensor | None, seg: Tensor | None, mus: Tensor) -> Tensor:
    """The reference."""
    return reference.tmix_shift(h, prev, seg, mus).sum()


def plain(h: Tensor, prev: Tensor | None, seg: Tensor | None, mus: Tensor) -> Tensor:
    """What people write."""
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
    return torch.stack([(h + (before - h) * mu).sum() for mu in mus]).sum()


def shape(time: int, width: int, dtype: torch.dtype) -> Shape:
    """Forward and backward of the six mixes of RWKV-7."""
    return Shape(
        name=f"fwd+bwd  T={time} D={width}",
        dtype=dtype,
        make=lambda: make(dtype, 1, time, width, mus_dtype=torch.float32),
        function=function,
        baseline=plain,
        baseline_name="h + (before - h) * mu, six times",
        flops=0,
        # h is read and six mixes are written; then seven are read and one is written
        bytes=(7 + 8) * dtype.itemsize * time * width,
        peers={"the reference": reference_sum},
    )


SHAPES = [shape(2048, 576, torch.float32), shape(2048, 576, torch.bfloat16)]

"""Shapes to time, and what they are compared with. T tokens, N experts, K of them for a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.moe.noisy_load import noisy_load, reference
from kernels_cuda.moe.noisy_load.cases import make


def differentiated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op, as one number to differentiate."""

    def run(**arguments: Any) -> Tensor:
        return function(**arguments).square().sum()

    return run


def shape(tokens: int, experts: int, k: int) -> Shape:
    """Forward and backward."""
    return Shape(
        name=f"fwd+bwd  T={tokens} N={experts} K={k}",
        dtype=torch.float32,
        make=lambda: make(torch.float32, tokens, experts, k),
        function=differentiated(noisy_load),
        baseline=differentiated(reference.noisy_load),
        baseline_name="plain PyTorch: sort, scatter, ndtr",
        flops=0,
        # three are read, and read again where their gradients are written
        bytes=4 * tokens * experts * (3 + 6),
    )


SHAPES = [shape(2048, 16, 4), shape(32768, 64, 8)]

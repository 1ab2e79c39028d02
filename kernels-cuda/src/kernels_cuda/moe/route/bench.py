"""Shapes to time, and what they are compared with. T tokens, N experts, K of them for a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.moe.route import reference, route
from kernels_cuda.moe.route.cases import make


def differentiated(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """The op, as one number to differentiate."""

    def run(**arguments: Any) -> Tensor:
        _, score, _, importance = function(**arguments)
        return score.square().sum() + importance.square().sum()

    return run


def shape(tokens: int, experts: int, k: int) -> Shape:
    """Forward and backward."""
    return Shape(
        name=f"fwd+bwd  T={tokens} N={experts} K={k}",
        dtype=torch.float32,
        make=lambda: make(torch.float32, tokens, experts, k),
        function=differentiated(route),
        baseline=differentiated(reference.route),
        baseline_name="plain PyTorch: sort, softmax, scatter",
        flops=0,
        # logits are read and their gradient written; idx and score are written and read, the gradient of score is read
        bytes=4 * tokens * (2 * experts + 5 * k),
    )


SHAPES = [shape(2048, 16, 4), shape(32768, 64, 8)]

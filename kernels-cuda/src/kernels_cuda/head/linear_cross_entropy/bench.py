"""Shapes to time, and what they are compared with. N rows, D hidden width, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.head.linear_cross_entropy import linear_cross_entropy
from kernels_cuda.head.linear_cross_entropy.cases import make


def plain(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, **_: object) -> Tensor:
    """What people write."""
    return F.cross_entropy(F.linear(hidden_ND, weight_VD), labels_N, reduction="sum")


def shape(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> Shape:
    """Forward and backward."""
    size = dtype.itemsize
    return Shape(
        name=f"fwd+bwd  M={rows} D={width} V={vocabulary}",
        dtype=dtype,
        make=lambda: make(dtype, rows, width, vocabulary, ignored=0),
        function=linear_cross_entropy,
        baseline=plain,
        baseline_name="F.cross_entropy(F.linear(...))",
        flops=3 * 2 * rows * width * vocabulary,
        # inputs are read and gradients written, each once
        bytes=2 * size * width * (rows + vocabulary),
    )


# the vocabulary and width of SmolLM2-135M
SHAPES = [shape(4096, 576, 49152, dtype) for dtype in (torch.bfloat16, torch.float32)]

"""Shapes to time, and what they are compared with. N rows, D hidden width, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.head import linear_kl
from kernels_cuda.head.linear_kl import reference
from kernels_cuda.testing import Arguments


def make(dtype: torch.dtype, rows: int, width: int, vocabulary: int) -> Arguments:
    """A student and a teacher of the same width."""
    generator = torch.Generator().manual_seed(0)

    def random(count: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(count, width, generator=generator) * scale).to(dtype)

    return {
        "h_s": random(rows).requires_grad_(),
        "W_s": random(vocabulary, width**-0.5).requires_grad_(),
        "teacher": (random(rows), random(vocabulary, width**-0.5)),
    }


def loss(h_s: Tensor, W_s: Tensor, teacher: Sequence[Tensor], chunk: int = 128, direction: str = "forward") -> Tensor:
    """The op."""
    return linear_kl(h_s, W_s, teacher, chunk=chunk, direction=direction)[0]  # type: ignore[arg-type]


def reference_loss(h_s: Tensor, W_s: Tensor, teacher: Sequence[Tensor]) -> Tensor:
    """The reference."""
    return reference.linear_kl(h_s, W_s, teacher)[0]


def plain(h_s: Tensor, W_s: Tensor, teacher: Sequence[Tensor]) -> Tensor:
    """What people write."""
    log_p = F.log_softmax(F.linear(*teacher).float(), -1)
    log_q = F.log_softmax(F.linear(h_s, W_s).float(), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def shape(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> Shape:
    """Forward and backward."""
    return Shape(
        name=f"fwd+bwd  M={rows} D={width} V={vocabulary}",
        dtype=dtype,
        make=lambda: make(dtype, rows, width, vocabulary),
        function=loss,
        baseline=plain,
        baseline_name="F.kl_div(log_softmax(F.linear(...)), log_softmax(F.linear(...)))",
        flops=4 * 2 * rows * width * vocabulary,
        # inputs are read and gradients written, each once
        bytes=3 * dtype.itemsize * width * (rows + vocabulary),
        peers={"the reference": reference_loss},
    )


SHAPES = [shape(1024, 128, 32768, torch.float32), shape(4096, 128, 32768, torch.float32), shape(1024, 576, 49152, torch.bfloat16)]

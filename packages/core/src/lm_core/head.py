"""Cross entropy of an output head in plain PyTorch, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lm_core.method import IGNORE

# N rows (positions), D hidden size, V vocabulary
CHUNK = 2**24  # logits held at a time: 64 MiB in float32


def chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[label]; rows labelled -100 count nothing.

    Logits are made a few rows at a time, in the forward and again in the backward pass, so the extra memory is
    CHUNK floats plus one gradient of the weight. Products run in autocast's type where autocast is on; everything
    after them in float32 (float64 for float64 inputs).

    >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
    >>> round(float(chunked_cross_entropy(hidden, weight, torch.tensor([1, -100, 5]))), 4)  # 2 log 8
    4.1589
    """
    total: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_N)  # type: ignore[no-untyped-call]
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        kind = hidden_ND.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
        weight = weight_VD.to(ctx.dtype)
        total = torch.zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32), device=hidden_ND.device)
        lse_N = torch.empty(len(hidden_ND), dtype=total.dtype, device=hidden_ND.device)
        for rows in _chunks(len(hidden_ND), len(weight)):
            logits = F.linear(hidden_ND[rows].to(ctx.dtype), weight).to(total.dtype)
            label, counted = _split(labels_N[rows])
            picked = logits.gather(1, label[:, None])[:, 0]
            top = logits.amax(1, keepdim=True)
            lse_N[rows] = logits.sub_(top).exp_().sum(1).log_().add_(top[:, 0])
            total += ((lse_N[rows] - picked) * counted).sum()
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, lse_N)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_ND, weight_VD, labels_N, lse_N = ctx.saved_tensors
        weight = weight_VD.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden_ND), len(weight)):
            hidden = hidden_ND[rows].to(ctx.dtype)
            label, counted = _split(labels_N[rows])
            slope = F.linear(hidden, weight).to(lse_N.dtype).sub_(lse_N[rows, None]).exp_()
            slope.scatter_add_(1, label[:, None], torch.full_like(slope[:, :1], -1.0))
            slope = slope.mul_((counted * grad)[:, None]).to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if grad_weight is not None and grad_weight.dtype == ctx.dtype:
                grad_weight.addmm_(slope.T, hidden)
            elif grad_weight is not None:
                grad_weight += slope.T @ hidden
        return grad_hidden, grad_weight, None


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK // vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that can be looked up, and which of them count."""
    counted = labels != IGNORE
    return labels.where(counted, 0), counted

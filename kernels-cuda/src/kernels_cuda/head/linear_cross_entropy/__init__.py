"""Cross entropy of an output head in chunks of rows: the logits of the whole batch never exist.

N rows (positions), D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.head.linear_cross_entropy import binding, reference

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["sum", "none"] = "sum",
    vocabulary: int | None = None,
) -> Tensor:
    """Cross entropy of `hidden_ND @ weight_VD.T` against `labels_N`: the sum over rows, or one loss per row.

    loss[n] = weights[n] * (logsumexp(logits[n]) - logits[n, labels[n]]), and 0 where labels[n] == ignore_index.

    hidden_ND and weight_VD share a dtype: float32, bfloat16, float64, or float16, which is computed in float32. Under autocast both
    are cast to its dtype (float32 for float16). labels_N is int64 or int32, weights_N (optional, any sign, differentiable) any float
    type. The result is float32 (float64 for float64): a scalar for "sum", N values for "none". With `vocabulary` only the first so many
    rows of the weight take part (the others are padding, and their gradient is zero), without a copy of the gradient that a slice of the
    weight would cost.

    Time is three matrix products, or one where no gradient is needed. "sum" computes the gradients together with the loss
    and holds them until backward; "none" learns the gradient of each row only in backward and makes a fourth product there.
    Rows with an ignored label cost nothing on a CPU. Memory beyond the gradients: for bfloat16 as much again as weight_VD, plus
    the logits of about max(256, D // 2) rows, at most half as many again.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for labels outside the vocabulary; on a GPU, where
    looking would stall, such a label gives a NaN loss.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    >>> round(linear_cross_entropy(hidden, weight, torch.tensor([0])).item(), 4)
    0.6931
    """
    if torch.is_autocast_enabled(hidden_ND.device.type):
        low = torch.get_autocast_dtype(hidden_ND.device.type)
        # the kernels have no float16, whose range holds no gradient of many rows
        low = torch.float32 if low == torch.float16 else low
        hidden_ND, weight_VD = hidden_ND.to(low), weight_VD.to(low)
    elif hidden_ND.dtype == weight_VD.dtype == torch.float16:
        hidden_ND, weight_VD = hidden_ND.float(), weight_VD.float()
    check.shapes(hidden=(hidden_ND, "ND"), weight=(weight_VD, "VD"), labels=(labels_N, "N"), weights=(weights, "N"))
    check.dtype("hidden", hidden_ND, (torch.float32, torch.bfloat16, torch.float64))
    check.dtype("labels", labels_N, (torch.int64, torch.int32))
    check.dtype("weights", weights, (torch.float32, torch.bfloat16, torch.float64))
    check.same("dtype", hidden=hidden_ND, weight=weight_VD)
    check.same("device", hidden=hidden_ND, weight=weight_VD, labels=labels_N, weights=weights)
    check.one_of("reduction", reduction, ("sum", "none"))
    size = len(weight_VD) if vocabulary is None else vocabulary
    if not 0 <= size <= len(weight_VD):
        check.fail("vocabulary", size, f"is not a number of rows of a weight that has {len(weight_VD)}", f"use 1 to {len(weight_VD)}")
    if not choice.library(binding.OP, hidden_ND.device.type):
        return reference.linear_cross_entropy(
            hidden_ND, weight_VD, labels_N, weights=weights, ignore_index=ignore_index, reduction=reduction, vocabulary=size
        )
    if weights is not None:
        weights = weights.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    if reduction == "none":
        losses_N: Tensor = binding.rows(hidden_ND, weight_VD, labels_N, ignore_index, size)
        return losses_N if weights is None else losses_N * weights
    grad = torch.is_grad_enabled()
    need = grad and hidden_ND.requires_grad, grad and weight_VD.requires_grad
    loss: Tensor = binding.total(hidden_ND, weight_VD, labels_N, weights, ignore_index, size, *need)[0]
    return loss

"""The op for torch: schemas, the loop over chunks, shapes for tracing, gradients.

Matrix products are torch's; what lies between them is compiled (op.cpp, op.cu). A chunk's logits turn into their gradient in
place, and both products that need it follow at once, so logits are computed once and live briefly.

N rows, D hidden width, V vocabulary; R rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels_cuda import check, choice
from kernels_cuda.head.chunks import WeightGradient, check_labels

OP = "head/linear_cross_entropy"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("head", "head_emulated"):
    torch.library.define(
        f"{_library}::softmax_gradient_",
        "(Tensor(a!) logits, Tensor labels, Tensor? weights, Tensor(b!) losses, int ignore_index, bool gradient) -> ()",
    )
    torch.library.define(f"{_library}::add_split_", "(Tensor(a!) high, Tensor(b!) low, Tensor part) -> ()")
    torch.library.define(f"{_library}::round_split_", "(Tensor(a!) high, Tensor low) -> ()")


@torch.library.custom_op("head::linear_cross_entropy", mutates_args=())
def total(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    vocabulary: int,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, losses of the rows before weighting, and the gradients asked for (the others are empty)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _total(hidden, weight, labels, weights, ignore_index, vocabulary, hidden_gradient, weight_gradient)


def _total(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    ignore_index: int,
    vocabulary: int,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = getattr(torch.ops, choice.library(OP, hidden_ND.device.type))
    num_rows, width = hidden_ND.shape
    labels_N = labels_N.long()
    losses_N = hidden_ND.new_zeros(num_rows, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
    grad_hidden_ND = hidden_ND.new_zeros(hidden_ND.shape if hidden_gradient else 0)
    grad_weight = WeightGradient(weight_VD) if weight_gradient else None
    head_VD = weight_VD[:vocabulary]

    rows_N = _rows_with_target(labels_N, vocabulary, ignore_index)
    # a chunk's logits then take about half the memory of the weight's gradient, whatever the vocabulary; alike, since each passes over it
    size = max(256, width // 2)
    size = -(-len(rows_N) // max(1, round(len(rows_N) / size)))
    buffer_RV = hidden_ND.new_empty(min(size, len(rows_N)), vocabulary)
    for rows_R in rows_N.split(max(1, size)):
        logits_RV = buffer_RV[: len(rows_R)]
        hidden_RD = hidden_ND.index_select(0, rows_R)
        torch.mm(hidden_RD, head_VD.t(), out=logits_RV)
        losses_R = losses_N.new_empty(len(rows_R))
        weights_R = None if weights_N is None else weights_N.index_select(0, rows_R)
        gradient = hidden_gradient or weight_gradient
        kernels.softmax_gradient_(logits_RV, labels_N.index_select(0, rows_R), weights_R, losses_R, ignore_index, gradient)
        losses_N.index_copy_(0, rows_R, losses_R)
        if hidden_gradient:
            grad_hidden_ND.index_copy_(0, rows_R, torch.mm(logits_RV, head_VD))
        if grad_weight is not None:
            grad_weight.add(logits_RV, hidden_RD)
    loss = losses_N.sum() if weights_N is None else (losses_N * weights_N).sum()
    return loss, losses_N, grad_hidden_ND, weight_VD.new_empty(0) if grad_weight is None else grad_weight.total()


def _rows_with_target(labels_N: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Numbers of the rows that count. On a GPU all rows, since finding out would wait for the device."""
    if labels_N.device.type != "cpu":
        return torch.arange(len(labels_N), device=labels_N.device)
    check_labels(labels_N, vocabulary, ignore_index)
    return (labels_N != ignore_index).nonzero().squeeze(1)


@total.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    vocabulary: int,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    grad_hidden = hidden.new_empty(hidden.shape if hidden_gradient else 0)
    grad_weight = weight.new_empty(weight.shape if weight_gradient else 0)
    return losses.new_empty(()), losses, grad_hidden, grad_weight


@register_flop_formula(torch.ops.head.linear_cross_entropy)
def _(
    hidden: tuple[int, int],
    weight: tuple[int, int],
    labels: Any,
    weights: Any,
    ignore_index: int,
    vocabulary: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    **_: Any,
) -> int:
    """From shapes: one product, and one for each gradient."""
    return 2 * hidden[0] * hidden[1] * vocabulary * (1 + hidden_gradient + weight_gradient)


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward_total(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check.refuse_second_derivative("linear_cross_entropy")
    losses_N, grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
    hidden, weight, _, weights, *_ = ctx.needs_input_grad
    if gradient is None:
        return (None,) * 8
    return (
        grad_hidden_ND * gradient if hidden else None,
        grad_weight_VD * gradient if weight else None,
        None,
        losses_N * gradient if weights else None,
        None,
        None,
        None,
        None,
    )


total.register_autograd(_backward_total, setup_context=_save_total)


@torch.library.custom_op("head::linear_cross_entropy_rows", mutates_args=())
def rows(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """The loss of each row. Backward knows the gradient of each row and is `total` with these as weights."""
    losses: Tensor = total(hidden, weight, labels, None, ignore_index, vocabulary, False, False)[1]
    return losses


@rows.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


@register_flop_formula(torch.ops.head.linear_cross_entropy_rows)
def _(hidden: tuple[int, int], weight: tuple[int, int], labels: Any, ignore_index: int, vocabulary: int, **_: Any) -> int:
    return 2 * hidden[0] * hidden[1] * vocabulary


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index, ctx.vocabulary = inputs
    ctx.save_for_backward(*tensors)


def _backward_rows(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
    check.refuse_second_derivative("linear_cross_entropy")
    hidden, weight, *_ = ctx.needs_input_grad
    _, _, grad_hidden_ND, grad_weight_VD = total(
        *ctx.saved_tensors, gradient_N.contiguous(), ctx.ignore_index, ctx.vocabulary, hidden, weight
    )
    return grad_hidden_ND if hidden else None, grad_weight_VD if weight else None, None, None, None


rows.register_autograd(_backward_rows, setup_context=_save_rows)

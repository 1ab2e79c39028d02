"""The op for torch: schemas, memory, shapes for tracing, gradients. T tokens, N experts, K selected ones, S slices of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.slices import num_slices

OP = "moe/route"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("moe", "moe_emulated"):
    torch.library.define(
        f"{_library}::route_forward_",
        "(Tensor logits, Tensor? mask, bool softmax, Tensor(a!) idx, Tensor(b!) score, Tensor(c!) count, Tensor(d!) importance) -> ()",
    )
    torch.library.define(
        f"{_library}::route_backward_",
        "(Tensor idx, Tensor score, Tensor? mask, bool softmax, Tensor dscore, Tensor dimportance, Tensor(a!) dlogits) -> ()",
    )


@torch.library.custom_op("moe::route", mutates_args=())
def forward(logits: Tensor, mask: Tensor | None, k: int, softmax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """score [T, K] and importance [N], then idx [T, K] and count [N]: torch's own checks add outputs up from the first one on."""
    tokens, experts = logits.shape
    idx_TK, score_TK = logits.new_empty(tokens, k, dtype=torch.int32), logits.new_empty(tokens, k)
    count_SN = logits.new_empty(num_slices(tokens), experts, dtype=torch.int32)
    importance_SN = logits.new_empty(num_slices(tokens), experts)
    kernels = getattr(torch.ops, choice.library(OP, logits.device.type))
    kernels.route_forward_(logits.contiguous(), mask, softmax, idx_TK, score_TK, count_SN, importance_SN)
    return score_TK, importance_SN.sum(0), idx_TK, count_SN.sum(0, dtype=torch.int32)


@forward.register_fake
def _(logits: Tensor, mask: Tensor | None, k: int, softmax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    idx_TK, count_N = logits.new_empty(tokens, k, dtype=torch.int32), logits.new_empty(experts, dtype=torch.int32)
    return logits.new_empty(tokens, k), logits.new_empty(experts), idx_TK, count_N


@torch.library.custom_op("moe::route_backward", mutates_args=())
def backward(idx: Tensor, score: Tensor, mask: Tensor | None, softmax: bool, dscore: Tensor, dimportance: Tensor) -> Tensor:
    """Gradient of the logits [T, N]."""
    dlogits_TN = score.new_empty(score.shape[0], dimportance.shape[0])
    kernels = getattr(torch.ops, choice.library(OP, score.device.type))
    kernels.route_backward_(idx, score, mask, softmax, dscore.contiguous(), dimportance.contiguous(), dlogits_TN)
    return dlogits_TN


@backward.register_fake
def _(idx: Tensor, score: Tensor, mask: Tensor | None, softmax: bool, dscore: Tensor, dimportance: Tensor) -> Tensor:
    return score.new_empty(score.shape[0], dimportance.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, mask, _, ctx.softmax = inputs
    ctx.experts = logits.shape[1]
    score, _, idx, count = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(idx, count)
    ctx.save_for_backward(idx, score, mask)


def _backward(ctx: Any, dscore: Tensor | None, dimportance: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    check.refuse_second_derivative("route")
    idx, score, mask = ctx.saved_tensors
    dscore = torch.zeros_like(score) if dscore is None else dscore
    dimportance = score.new_zeros(ctx.experts) if dimportance is None else dimportance
    return backward(idx, score, mask, ctx.softmax, dscore, dimportance), None, None, None


forward.register_autograd(_backward, setup_context=_save)

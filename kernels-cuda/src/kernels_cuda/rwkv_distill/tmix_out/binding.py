"""The op for torch: schemas, memory, shapes for tracing, gradients. S tokens, H heads, N head size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.rwkv_distill.sequences import contiguous
from kernels_cuda.slices import num_slices

OP = "rwkv_distill/tmix_out"

_INPUTS = "Tensor y, Tensor? r, Tensor? k, Tensor? v, Tensor? bonus, Tensor? weight, Tensor? bias, Tensor? gate, float eps"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("rwkv_distill", "rwkv_distill_emulated"):
    torch.library.define(f"{_library}::tmix_out_forward_", f"({_INPUTS}, Tensor(a!) out) -> ()")
    torch.library.define(
        f"{_library}::tmix_out_backward_",
        f"({_INPUTS}, Tensor dout, Tensor(a!) dy, Tensor(b!) dr, Tensor(c!) dk, Tensor(d!) dv, Tensor(e!) dgate, Tensor(f!) partial) -> ()",
    )


@torch.library.custom_op("rwkv_distill::tmix_out", mutates_args=())
def forward(
    y: Tensor,
    r: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bonus: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> Tensor:
    """[S, H, N], like y; parameters are [H, N] in float32."""
    out = y.new_empty(y.shape)
    kernels = getattr(torch.ops, choice.library(OP, y.device.type))
    kernels.tmix_out_forward_(*contiguous(y, r, k, v, bonus, weight, bias, gate), eps, out)
    return out


@forward.register_fake
def _(
    y: Tensor,
    r: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bonus: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("rwkv_distill::tmix_out_backward", mutates_args=())
def backward(
    y: Tensor,
    r: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bonus: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, r, k, v and gate (empty where there is none), and of the parameters: [3, H, N]."""
    outputs = _gradients(y, r, gate)
    partial = y.new_empty(num_slices(y.shape[0]), 3, *y.shape[1:], dtype=torch.float32)
    kernels = getattr(torch.ops, choice.library(OP, y.device.type))
    kernels.tmix_out_backward_(*contiguous(y, r, k, v, bonus, weight, bias, gate), eps, dout.contiguous(), *outputs, partial)
    return *outputs, partial.sum(0)


@backward.register_fake
def _(
    y: Tensor,
    r: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bonus: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_gradients(y, r, gate), y.new_empty(3, *y.shape[1:], dtype=torch.float32)


def _gradients(y: Tensor, r: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_bonus, with_gate = 0 if r is None else y.shape, 0 if gate is None else y.shape
    return y.new_empty(y.shape), *(y.new_empty(with_bonus) for _ in range(3)), y.new_empty(with_gate)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    check.refuse_second_derivative("tmix_out")
    # once: activation checkpointing gives each saved tensor once
    saved = ctx.saved_tensors
    dy, dr, dk, dv, dgate, parameters = backward(*saved, ctx.eps, dout)
    found = dy, dr, dk, dv, *parameters.unbind(), dgate
    present = [None if value is None else gradient for value, gradient in zip(saved, found, strict=True)]
    return *present, None


forward.register_autograd(_backward, setup_context=_save)

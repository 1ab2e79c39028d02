"""The op for torch: schemas, memory, shapes for tracing, gradients.

B batch, T time, H heads, N head size, Q sequences, C states kept for backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels_cuda import choice
from kernels_cuda.rwkv_distill.recurrence import arriving, new_history, new_kept, new_states, save
from kernels_cuda.rwkv_distill.sequences import check_starts, contiguous

OP = "rwkv_distill/wkv6"

_INPUTS = "Tensor r, Tensor k, Tensor v, Tensor w, Tensor u"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("rwkv_distill", "rwkv_distill_emulated"):
    torch.library.define(
        f"{_library}::wkv6_forward_",
        f"({_INPUTS}, Tensor? initial, Tensor? mask, Tensor? starts, Tensor(a!) y, Tensor(b!) final, Tensor(c!) kept) -> ()",
    )
    torch.library.define(
        f"{_library}::wkv6_backward_",
        f"({_INPUTS}, Tensor? mask, Tensor? starts, Tensor kept, Tensor dy, Tensor? dfinal, Tensor(a!) history,"
        " Tensor(b!) dr, Tensor(c!) dk, Tensor(d!) dv, Tensor(e!) dw, Tensor(f!) du, Tensor(g!) dinitial) -> ()",
    )
    torch.library.define(f"{_library}::wkv6_step_", f"({_INPUTS}, Tensor(a!) state, Tensor(b!) y) -> ()")


@torch.library.custom_op("rwkv_distill::wkv6", mutates_args=())
def forward(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial: Tensor | None,
    mask: Tensor | None,
    starts: Tensor | None,
    output_final: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final states, and the states kept for backward; what was not asked for is empty."""
    check_starts(starts, r.shape[1])
    outputs = _forward_outputs(r, starts, output_final, gradient)
    kernels = getattr(torch.ops, choice.library(OP, r.device.type))
    kernels.wkv6_forward_(*contiguous(r, k, v, w, u, initial, mask, starts), *outputs)
    return outputs


@forward.register_fake
def _(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial: Tensor | None,
    mask: Tensor | None,
    starts: Tensor | None,
    output_final: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_outputs(r, starts, output_final, gradient)


def _forward_outputs(r: Tensor, starts: Tensor | None, output_final: bool, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    return r.new_empty(r.shape), new_states(r, starts, output_final), new_kept(r, starts, gradient)


@torch.library.custom_op("rwkv_distill::wkv6_backward", mutates_args=())
def backward(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    initial_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs (that of u for every sequence, in float32) and of the initial state (empty if not asked for)."""
    outputs = _backward_outputs(r, starts, initial_gradient)
    library = choice.library(OP, r.device.type)
    kernels = getattr(torch.ops, library)
    kernels.wkv6_backward_(*contiguous(r, k, v, w, u, mask, starts, kept, dy, dfinal), new_history(r, starts, library), *outputs)
    return outputs


@backward.register_fake
def _(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    initial_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_outputs(r, starts, initial_gradient)


def _backward_outputs(r: Tensor, starts: Tensor | None, initial_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dk, dv, dw = (r.new_empty(r.shape) for _ in range(4))
    du = r.new_empty((r.shape[0] if starts is None else starts.shape[0] - 1, *r.shape[2:]), dtype=torch.float32)
    return dr, dk, dv, dw, du, new_states(r, starts, initial_gradient)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    # once: activation checkpointing gives each saved tensor once
    saved = ctx.saved_tensors
    given = arriving("wkv6", ctx, saved, dy, dfinal)
    if given is None:
        return (None,) * 10
    *gradients, du, initial = backward(*saved, *given, ctx.initial)
    return *gradients, du.sum(0).to(saved[0].dtype), initial if ctx.initial else None, None, None, None, None


forward.register_autograd(_backward, setup_context=partial(save, "wkv6", 5))

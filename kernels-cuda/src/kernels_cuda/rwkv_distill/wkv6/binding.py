"""The op for torch: schemas, memory, shapes for tracing, gradients.

B batch, T time, H heads, N head size, Q sequences, C states kept for backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels_cuda import choice
from kernels_cuda.rwkv_distill.recurrence import (
    aligned,
    arriving,
    new_history,
    new_kept,
    new_segment_history,
    new_states,
    num_sequences,
    save,
)
from kernels_cuda.rwkv_distill.sequences import check_starts, contiguous

OP = "rwkv_distill/wkv6"
SHARED_BYTES = {32: 25_600, 64: 55_040, 128: 138_496}  # of a block in backward, by head size: Memory<N> in chunked.cu

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
    # by chunks on tensor cores: CUDA and its emulation only
    torch.library.define(
        f"{_library}::wkv6_chunked_forward_",
        f"({_INPUTS}, Tensor? initial, Tensor? mask, Tensor? starts, Tensor(a!) y, Tensor(b!) final, Tensor(c!) kept) -> ()",
    )
    torch.library.define(
        f"{_library}::wkv6_chunked_backward_",
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
    chunked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final states, and the states kept for backward; what was not asked for is empty."""
    check_starts(starts, r.shape[1])
    outputs = _forward_outputs(r, starts, output_final, gradient, chunked)
    kernels = getattr(torch.ops, choice.library(OP, r.device.type))
    arguments = (r, k, v, w, u, initial, mask, starts)
    if chunked:
        kernels.wkv6_chunked_forward_(*aligned(*arguments), *outputs)
    else:
        kernels.wkv6_forward_(*contiguous(*arguments), *outputs)
    return outputs


@forward.register_fake
def _(r: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_outputs(r, *others[-4:])


def _forward_outputs(r: Tensor, starts: Tensor | None, output_final: bool, gradient: bool, chunked: bool) -> tuple[Tensor, Tensor, Tensor]:
    return r.new_empty(r.shape), new_states(r, starts, output_final), new_kept(r, starts, gradient, chunked)


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
    chunked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs (that of u for every sequence, in float32) and of the initial state (empty if not asked for)."""
    outputs = _backward_outputs(r, starts, initial_gradient)
    library = choice.library(OP, r.device.type)
    kernels = getattr(torch.ops, library)
    arguments = (r, k, v, w, u, mask, starts, kept, dy, dfinal)
    if chunked:
        kernels.wkv6_chunked_backward_(*aligned(*arguments), new_segment_history(r, starts), *outputs)
    else:
        kernels.wkv6_backward_(*contiguous(*arguments), new_history(r, starts, library), *outputs)
    return outputs


@backward.register_fake
def _(r: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, starts, _, _, _, initial_gradient, _ = others
    return _backward_outputs(r, starts, initial_gradient)


def _backward_outputs(r: Tensor, starts: Tensor | None, initial_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dk, dv, dw = (r.new_empty(r.shape) for _ in range(4))
    du = r.new_empty((num_sequences(r, starts), *r.shape[2:]), dtype=torch.float32)
    return dr, dk, dv, dw, du, new_states(r, starts, initial_gradient)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    # once: activation checkpointing gives each saved tensor once
    saved = ctx.saved_tensors
    given = arriving("wkv6", ctx, saved, dy, dfinal)
    if given is None:
        return (None,) * 11
    *gradients, du, initial = backward(*saved, *given, ctx.initial, ctx.chunked)
    return *gradients, du.sum(0).to(saved[0].dtype), initial if ctx.initial else None, None, None, None, None, None


forward.register_autograd(_backward, setup_context=partial(save, "wkv6", 5))

"""The op for torch: schemas, memory, shapes for tracing, gradients.

B batch, T time, H heads, N head size, Q sequences, C states kept for backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels_cuda import choice
from kernels_cuda.rwkv_distill.recurrence import aligned, arriving, new_history, new_kept, new_segment_history, new_states, save
from kernels_cuda.rwkv_distill.sequences import check_starts, contiguous

OP = "rwkv_distill/wkv7"
SHARED_BYTES = {32: 31_232, 64: 61_952, 128: 147_968}  # of a block in backward, by head size: Memory<N> in chunked.cu

_INPUTS = "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("rwkv_distill", "rwkv_distill_emulated"):
    torch.library.define(
        f"{_library}::wkv7_forward_",
        f"({_INPUTS}, Tensor? initial, Tensor? mask, Tensor? starts, Tensor(a!) y, Tensor(b!) final, Tensor(c!) kept, Tensor(d!) removed)"
        " -> ()",
    )
    torch.library.define(
        f"{_library}::wkv7_backward_",
        f"({_INPUTS}, Tensor? mask, Tensor? starts, Tensor kept, Tensor removed, Tensor dy, Tensor? dfinal, Tensor(a!) history,"
        " Tensor(b!) dr, Tensor(c!) dw, Tensor(d!) dk, Tensor(e!) dv, Tensor(f!) da, Tensor(g!) db, Tensor(h!) dinitial) -> ()",
    )
    # by chunks on tensor cores: CUDA and its emulation only
    torch.library.define(
        f"{_library}::wkv7_chunked_forward_",
        f"({_INPUTS}, Tensor? initial, Tensor? mask, Tensor? starts, Tensor(a!) y, Tensor(b!) final, Tensor(c!) kept) -> ()",
    )
    torch.library.define(
        f"{_library}::wkv7_chunked_backward_",
        f"({_INPUTS}, Tensor? mask, Tensor? starts, Tensor kept, Tensor dy, Tensor? dfinal, Tensor(a!) history, Tensor(b!) dr,"
        " Tensor(c!) dw, Tensor(d!) dk, Tensor(e!) dv, Tensor(f!) da, Tensor(g!) db, Tensor(h!) dinitial) -> ()",
    )
    torch.library.define(f"{_library}::wkv7_step_", f"({_INPUTS}, Tensor(a!) state, Tensor(b!) y) -> ()")


@torch.library.custom_op("rwkv_distill::wkv7", mutates_args=())
def forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial: Tensor | None,
    mask: Tensor | None,
    starts: Tensor | None,
    output_final: bool,
    gradient: bool,
    chunked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, final states, and for backward the states kept and S a of every token (not `chunked`); what was not asked for is empty."""
    check_starts(starts, r.shape[1])
    outputs = _forward_outputs(r, starts, output_final, gradient, chunked)
    kernels = getattr(torch.ops, choice.library(OP, r.device.type))
    arguments = (r, w, k, v, a, b, initial, mask, starts)
    if chunked:
        kernels.wkv7_chunked_forward_(*aligned(*arguments), *outputs[:3])
    else:
        kernels.wkv7_forward_(*contiguous(*arguments), *outputs)
    return outputs


@forward.register_fake
def _(r: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(r, *others[-4:])


def _forward_outputs(
    r: Tensor, starts: Tensor | None, output_final: bool, gradient: bool, chunked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    removed = r.new_empty(r.shape if gradient and not chunked else 0, dtype=torch.float32)
    return r.new_empty(r.shape), new_states(r, starts, output_final), new_kept(r, starts, gradient, chunked), removed


@torch.library.custom_op("rwkv_distill::wkv7_backward", mutates_args=())
def backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    kept: Tensor,
    removed: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    initial_gradient: bool,
    chunked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six inputs and of the initial state (empty if not asked for)."""
    outputs = _backward_outputs(r, starts, initial_gradient)
    library = choice.library(OP, r.device.type)
    kernels = getattr(torch.ops, library)
    if chunked:
        arguments = aligned(r, w, k, v, a, b, mask, starts, kept, dy, dfinal)
        kernels.wkv7_chunked_backward_(*arguments, new_segment_history(r, starts), *outputs)
    else:
        arguments = contiguous(r, w, k, v, a, b, mask, starts, kept, removed, dy, dfinal)
        kernels.wkv7_backward_(*arguments, new_history(r, starts, library), *outputs)
    return outputs


@backward.register_fake
def _(r: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, starts, _, _, _, _, initial_gradient, _ = others
    return _backward_outputs(r, starts, initial_gradient)


def _backward_outputs(
    r: Tensor, starts: Tensor | None, initial_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dw, dk, dv, da, db = (r.new_empty(r.shape) for _ in range(6))
    return dr, dw, dk, dv, da, db, new_states(r, starts, initial_gradient)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    # once: activation checkpointing gives each saved tensor once
    saved = ctx.saved_tensors
    given = arriving("wkv7", ctx, saved, dy, dfinal)
    if given is None:
        return (None,) * 12
    *gradients, initial = backward(*saved, *given, ctx.initial, ctx.chunked)
    return *gradients, initial if ctx.initial else None, None, None, None, None, None


forward.register_autograd(_backward, setup_context=partial(save, "wkv7", 6))

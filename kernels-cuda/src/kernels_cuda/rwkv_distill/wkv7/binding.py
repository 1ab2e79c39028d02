"""The op for torch: schemas, memory, shapes for tracing, gradients.

B batch, T time, H heads, N head size, Q sequences, C states kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import choice
from kernels_cuda.rwkv_distill.sequences import check_starts, contiguous

OP = "rwkv_distill/wkv7"
CHUNK_TOKENS = 32  # as in recurrence.h

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, final states, and for backward the states kept and S a of every token; what was not asked for is empty."""
    check_starts(starts, r.shape[1])
    outputs = _forward_outputs(r, starts, output_final, gradient)
    kernels = getattr(torch.ops, choice.library(OP, r.device.type))
    kernels.wkv7_forward_(*contiguous(r, w, k, v, a, b, initial, mask, starts), *outputs)
    return outputs


@forward.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(r, starts, output_final, gradient)


def _forward_outputs(r: Tensor, starts: Tensor | None, output_final: bool, gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, time, heads, size = r.shape
    sequences = batch if starts is None else starts.shape[0] - 1
    chunks = batch * time // CHUNK_TOKENS + sequences
    new = torch.float32
    return (
        r.new_empty(r.shape),
        r.new_empty((sequences, heads, size, size) if output_final else 0, dtype=new),
        r.new_empty((chunks, heads, size, size) if gradient else 0, dtype=new),
        r.new_empty(r.shape if gradient else 0, dtype=new),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six inputs and of the initial state (empty if not asked for)."""
    outputs = _backward_outputs(r, starts, initial_gradient)
    library = choice.library(OP, r.device.type)
    sequences = r.shape[0] if starts is None else starts.shape[0] - 1
    # the twin keeps its states of one chunk in the cache
    needed = (sequences, r.shape[2], CHUNK_TOKENS + 1, r.shape[3], r.shape[3]) if r.is_cuda or library.endswith("_emulated") else 0
    history = kept.new_empty(needed)
    kernels = getattr(torch.ops, library)
    kernels.wkv7_backward_(*contiguous(r, w, k, v, a, b, mask, starts, kept, removed, dy, dfinal), history, *outputs)
    return outputs


@backward.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_outputs(r, starts, initial_gradient)


def _backward_outputs(
    r: Tensor, starts: Tensor | None, initial_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, size = r.shape
    sequences = batch if starts is None else starts.shape[0] - 1
    dr, dw, dk, dv, da, db = (r.new_empty(r.shape) for _ in range(6))
    return dr, dw, dk, dv, da, db, r.new_empty((sequences, heads, size, size) if initial_gradient else 0, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, initial, mask, starts, ctx.output_final, gradient = inputs
    if not gradient:
        raise RuntimeError("wkv7: gradient=False is wrong because an input requires a gradient; call kernels_cuda.rwkv_distill.wkv7")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.initial = initial is not None
    ctx.save_for_backward(*inputs[:6], mask, starts, *output[2:])


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("wkv7: create_graph=True is wrong because the op has no second derivative; use kernels_cuda.use('reference')")
    saved = ctx.saved_tensors
    if not ctx.output_final:
        dfinal = None
    if dy is None and dfinal is None:
        return (None,) * 11
    dy = torch.zeros_like(saved[0]) if dy is None else dy
    *gradients, initial = backward(*saved, dy, dfinal, ctx.initial)
    return *gradients, initial if ctx.initial else None, None, None, None, None


forward.register_autograd(_backward, setup_context=_save)


def step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """One token; a contiguous state changes where it lies."""
    kernels = getattr(torch.ops, choice.library(OP, r.device.type))
    y, place = r.new_empty(r.shape), state.contiguous()
    kernels.wkv7_step_(*contiguous(r, w, k, v, a, b), place, y)
    if place is not state:
        state.copy_(place)
    return y

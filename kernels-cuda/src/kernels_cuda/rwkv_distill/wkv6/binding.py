"""The op for torch: schemas, memory, shapes for tracing, gradients.

B batch, T time, H heads, N head size, Q sequences, C states kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import choice
from kernels_cuda.rwkv_distill.sequences import check_starts, contiguous

OP = "rwkv_distill/wkv6"
CHUNK_TOKENS = 32  # as in recurrence.h

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
    batch, time, heads, size = r.shape
    sequences = batch if starts is None else starts.shape[0] - 1
    chunks = batch * time // CHUNK_TOKENS + sequences
    new = torch.float32
    return (
        r.new_empty(r.shape),
        r.new_empty((sequences, heads, size, size) if output_final else 0, dtype=new),
        r.new_empty((chunks, heads, size, size) if gradient else 0, dtype=new),
    )


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
    sequences = r.shape[0] if starts is None else starts.shape[0] - 1
    # the twin keeps its states of one chunk in the cache
    needed = (sequences, r.shape[2], CHUNK_TOKENS + 1, r.shape[3], r.shape[3]) if r.is_cuda or library.endswith("_emulated") else 0
    history = kept.new_empty(needed)
    kernels = getattr(torch.ops, library)
    kernels.wkv6_backward_(*contiguous(r, k, v, w, u, mask, starts, kept, dy, dfinal), history, *outputs)
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
    batch, _, heads, size = r.shape
    sequences = batch if starts is None else starts.shape[0] - 1
    dr, dk, dv, dw = (r.new_empty(r.shape) for _ in range(4))
    du = r.new_empty((sequences, heads, size), dtype=torch.float32)
    return dr, dk, dv, dw, du, r.new_empty((sequences, heads, size, size) if initial_gradient else 0, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, initial, mask, starts, ctx.output_final, gradient = inputs
    if not gradient:
        raise RuntimeError("wkv6: gradient=False is wrong because an input requires a gradient; call kernels_cuda.rwkv_distill.wkv6")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.initial = initial is not None
    ctx.save_for_backward(*inputs[:5], mask, starts, *output[2:])


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("wkv6: create_graph=True is wrong because the op has no second derivative; use kernels_cuda.use('reference')")
    saved = ctx.saved_tensors
    if not ctx.output_final:
        dfinal = None
    if dy is None and dfinal is None:
        return (None,) * 10
    dy = torch.zeros_like(saved[0]) if dy is None else dy
    *gradients, du, initial = backward(*saved, dy, dfinal, ctx.initial)
    return *gradients, du.sum(0).to(saved[0].dtype), initial if ctx.initial else None, None, None, None, None


forward.register_autograd(_backward, setup_context=_save)


def step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """One token; a contiguous state changes where it lies."""
    kernels = getattr(torch.ops, choice.library(OP, r.device.type))
    y, place = r.new_empty(r.shape), state.contiguous()
    kernels.wkv6_step_(*contiguous(r, k, v, w, u), place, y)
    if place is not state:
        state.copy_(place)
    return y

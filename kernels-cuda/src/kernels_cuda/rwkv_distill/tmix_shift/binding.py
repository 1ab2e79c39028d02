"""The op for torch: schemas, memory, shapes for tracing, gradients. B batch, T time, D width, M mixes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.rwkv_distill.sequences import contiguous
from kernels_cuda.slices import num_slices

OP = "rwkv_distill/tmix_shift"

_INPUTS = "Tensor h, Tensor? prev, Tensor? source"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("rwkv_distill", "rwkv_distill_emulated"):
    torch.library.define(f"{_library}::tmix_shift_forward_", f"({_INPUTS}, Tensor mus, Tensor(a!) out) -> ()")
    torch.library.define(
        f"{_library}::tmix_shift_backward_",
        f"({_INPUTS}, Tensor? successor, Tensor mus, Tensor dout, Tensor(a!) dh, Tensor(b!) dprev, Tensor(c!) partial) -> ()",
    )


@torch.library.custom_op("rwkv_distill::tmix_shift", mutates_args=())
def forward(h: Tensor, prev: Tensor | None, source: Tensor | None, successor: Tensor | None, mus: Tensor) -> Tensor:
    """[M, B, T, D]; source and successor as in op.h, mus in float32."""
    out = h.new_empty(mus.shape[0], *h.shape)
    getattr(torch.ops, choice.library(OP, h.device.type)).tmix_shift_forward_(*contiguous(h, prev, source, mus), out)
    return out


@forward.register_fake
def _(h: Tensor, prev: Tensor | None, source: Tensor | None, successor: Tensor | None, mus: Tensor) -> Tensor:
    return h.new_empty(mus.shape[0], *h.shape)


@torch.library.custom_op("rwkv_distill::tmix_shift_backward", mutates_args=())
def backward(
    h: Tensor, prev: Tensor | None, source: Tensor | None, successor: Tensor | None, mus: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, prev (empty without it) and mus."""
    dh = h.new_empty(h.shape)
    dprev = h.new_zeros(0 if prev is None else prev.shape)
    partial = mus.new_empty(num_slices(h.shape[0] * h.shape[1]), *mus.shape)
    kernels = getattr(torch.ops, choice.library(OP, h.device.type))
    kernels.tmix_shift_backward_(*contiguous(h, prev, source, successor, mus, dout), dh, dprev, partial)
    return dh, dprev, partial.sum(0)


@backward.register_fake
def _(
    h: Tensor, prev: Tensor | None, source: Tensor | None, successor: Tensor | None, mus: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(0 if prev is None else prev.shape), mus.new_empty(mus.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    check.refuse_second_derivative("tmix_shift")
    # once: activation checkpointing gives each saved tensor once
    saved = ctx.saved_tensors
    dh, dprev, dmus = backward(*saved, dout)
    return dh, None if saved[1] is None else dprev, None, None, dmus


forward.register_autograd(_backward, setup_context=_save)

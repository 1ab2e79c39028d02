"""The op for torch: schemas, memory, shapes for tracing, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import check, choice

OP = "beacon/rope_gather"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("beacon", "beacon_emulated"):
    torch.library.define(
        f"{_library}::rope_gather_forward_",
        "(Tensor k, Tensor v, Tensor src, Tensor pos, Tensor cos, Tensor sin, Tensor(a!) k_out, Tensor(b!) v_out) -> ()",
    )
    torch.library.define(
        f"{_library}::rope_gather_backward_",
        "(Tensor dk_out, Tensor dv_out, Tensor order, Tensor begin, Tensor pos, Tensor cos, Tensor sin, Tensor(a!) dk, Tensor(b!) dv) -> ()",
    )


@torch.library.custom_op("beacon::rope_gather", mutates_args=())
def forward(k: Tensor, v: Tensor, src: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of [B, G, N, d]; places and positions are in their ranges, tables contiguous, head dimensions dense."""
    k_out, v_out = _entries(k, src), _entries(v, src)
    getattr(torch.ops, choice.library(OP, k.device.type)).rope_gather_forward_(k, v, src, pos, cos, sin, k_out, v_out)
    return k_out, v_out


def _entries(x: Tensor, src: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], src.shape[1], x.shape[3])


@forward.register_fake
def _(k: Tensor, v: Tensor, src: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _entries(k, src), _entries(v, src)


@torch.library.custom_op("beacon::rope_gather_backward", mutates_args=())
def backward(dk_out: Tensor, dv_out: Tensor, src: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, [B, G, length, d]."""
    # entries of each place, in a fixed order; places below 0 come first and are in no range
    places, order = src.sort(dim=1, stable=True)
    begin = torch.searchsorted(places, torch.arange(length + 1, device=src.device).expand(len(src), -1).contiguous())
    dk, dv = _places(dk_out, length), _places(dv_out, length)
    kernels = getattr(torch.ops, choice.library(OP, dk.device.type))
    kernels.rope_gather_backward_(dk_out.contiguous(), dv_out.contiguous(), order, begin, pos, cos, sin, dk, dv)
    return dk, dv


def _places(x: Tensor, length: int) -> Tensor:
    """Token by token, as the projections that made keys and values lay them out."""
    return x.new_empty(x.shape[0], length, x.shape[1], x.shape[3]).transpose(1, 2)


@backward.register_fake
def _(dk_out: Tensor, dv_out: Tensor, src: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return _places(dk_out, length), _places(dv_out, length)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.length = inputs[0].shape[2]
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, dk_out: Tensor, dv_out: Tensor) -> tuple[Tensor | None, ...]:
    check.refuse_second_derivative("rope_gather")
    return *backward(dk_out, dv_out, *ctx.saved_tensors, ctx.length), None, None, None, None


forward.register_autograd(_backward, setup_context=_save)

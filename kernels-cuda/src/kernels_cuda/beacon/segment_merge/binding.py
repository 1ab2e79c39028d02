"""The op for torch: schemas, memory, shapes for tracing, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import check, choice

OP = "beacon/segment_merge"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("beacon", "beacon_emulated"):
    torch.library.define(
        f"{_library}::segment_merge_forward_",
        "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse) -> ()",
    )
    torch.library.define(
        f"{_library}::segment_merge_backward_",
        "(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, "
        "Tensor(a!) dout_a, Tensor(b!) dlse_a, Tensor(c!) dout_b, Tensor(d!) dlse_b) -> ()",
    )


@torch.library.custom_op("beacon::segment_merge", mutates_args=())
def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of outputs [N, d] and their log-sums [N], all contiguous."""
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    getattr(torch.ops, choice.library(OP, out_a.device.type)).segment_merge_forward_(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse


@forward.register_fake
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)


@torch.library.custom_op("beacon::segment_merge_backward", mutates_args=())
def backward(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all four."""
    found = tuple(torch.empty_like(x) for x in (out_a, lse_a, out_b, lse_b))
    kernels = getattr(torch.ops, choice.library(OP, out_a.device.type))
    kernels.segment_merge_backward_(dout.contiguous(), dlse.contiguous(), out_a, lse_a, out_b, lse_b, *found)
    return found  # type: ignore[return-value]


@backward.register_fake
def _(dout: Tensor, dlse: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in parts)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    check.refuse_second_derivative("segment_merge")
    gradients: tuple[Tensor, ...] = backward(dout, dlse, *ctx.saved_tensors)
    return gradients


forward.register_autograd(_backward, setup_context=_save)

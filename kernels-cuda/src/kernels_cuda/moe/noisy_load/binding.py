"""The op for torch: schemas, memory, shapes for tracing, gradients. T tokens, N experts, S slices of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.slices import num_slices

OP = "moe/noisy_load"

_INPUTS = "Tensor logits, Tensor noisy, Tensor sigma, Tensor? mask, int k"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("moe", "moe_emulated"):
    torch.library.define(f"{_library}::noisy_load_forward_", f"({_INPUTS}, Tensor(a!) load) -> ()")
    torch.library.define(
        f"{_library}::noisy_load_backward_", f"({_INPUTS}, Tensor dload, Tensor(a!) dlogits, Tensor(b!) dnoisy, Tensor(c!) dsigma) -> ()"
    )


@torch.library.custom_op("moe::noisy_load", mutates_args=())
def forward(logits: Tensor, noisy: Tensor, sigma: Tensor, mask: Tensor | None, k: int) -> Tensor:
    """The load [N]."""
    tokens, experts = logits.shape
    load_SN = logits.new_empty(num_slices(tokens), experts)
    kernels = getattr(torch.ops, choice.library(OP, logits.device.type))
    kernels.noisy_load_forward_(logits.contiguous(), noisy.contiguous(), sigma.contiguous(), mask, k, load_SN)
    return load_SN.sum(0)


@forward.register_fake
def _(logits: Tensor, noisy: Tensor, sigma: Tensor, mask: Tensor | None, k: int) -> Tensor:
    return logits.new_empty(logits.shape[1])


@torch.library.custom_op("moe::noisy_load_backward", mutates_args=())
def backward(logits: Tensor, noisy: Tensor, sigma: Tensor, mask: Tensor | None, k: int, dload: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits, noisy logits and sigma, each [T, N]."""
    found = logits.new_empty(logits.shape), logits.new_empty(logits.shape), logits.new_empty(logits.shape)
    kernels = getattr(torch.ops, choice.library(OP, logits.device.type))
    kernels.noisy_load_backward_(logits.contiguous(), noisy.contiguous(), sigma.contiguous(), mask, k, dload.contiguous(), *found)
    return found


@backward.register_fake
def _(logits: Tensor, noisy: Tensor, sigma: Tensor, mask: Tensor | None, k: int, dload: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape), logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.k = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dload: Tensor) -> tuple[Tensor | None, ...]:
    check.refuse_second_derivative("noisy_load")
    return *backward(*ctx.saved_tensors, ctx.k, dload), None, None


forward.register_autograd(_backward, setup_context=_save)

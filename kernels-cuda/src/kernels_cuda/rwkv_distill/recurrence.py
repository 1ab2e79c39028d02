"""What the recurrences share behind their public functions: memory, the ends of autograd, steps, packing.

B batch, T time, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.rwkv_distill.sequences import contiguous

# as in recurrence.h: tokens between two states that are kept for backward, and the same where kernels go by chunks of 16 tokens
CHUNK_TOKENS = 32
SEGMENT_TOKENS = 64


def new_states(r: Tensor, starts: Tensor | None, wanted: bool) -> Tensor:
    """Room for the state of each sequence, empty unless wanted."""
    _, _, heads, size = r.shape
    return r.new_empty((num_sequences(r, starts), heads, size, size) if wanted else 0, dtype=torch.float32)


def new_kept(r: Tensor, starts: Tensor | None, wanted: bool, chunked: bool) -> Tensor:
    """Room for the states that backward starts from, one before every 32 or (`chunked`) 64 tokens of a sequence; empty unless wanted."""
    batch, time, heads, size = r.shape
    chunks = batch * time // (SEGMENT_TOKENS if chunked else CHUNK_TOKENS) + num_sequences(r, starts)
    return r.new_empty((chunks, heads, size, size) if wanted else 0, dtype=torch.float32)


def new_history(r: Tensor, starts: Tensor | None, library: str) -> Tensor:
    """Room for the states of one chunk of each sequence; the twin keeps them in the cache."""
    _, _, heads, size = r.shape
    needed = r.is_cuda or library.endswith("_emulated")
    return r.new_empty((num_sequences(r, starts), heads, CHUNK_TOKENS + 1, size, size) if needed else 0, dtype=torch.float32)


def new_segment_history(r: Tensor, starts: Tensor | None) -> Tensor:
    """Room for the states before the chunks of one segment of each sequence."""
    _, _, heads, size = r.shape
    return r.new_empty(num_sequences(r, starts), heads, SEGMENT_TOKENS // 16, size, size)


def aligned(*tensors: Tensor | None) -> list[Tensor | None]:
    """As kernels by chunks want them: contiguous, at multiples of 16 bytes, where views into larger tensors need not lie."""
    return [tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in contiguous(*tensors)]


def num_sequences(r: Tensor, starts: Tensor | None) -> int:
    """Those of a batch, or packed ones."""
    return r.shape[0] if starts is None else starts.shape[0] - 1


def save(op: str, num_inputs: int, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of an op with inputs, initial state, mask, starts and three switches, which returns y, final states and more."""
    *_, initial, mask, starts, ctx.output_final, gradient, ctx.chunked = inputs
    if not gradient:
        raise RuntimeError(f"{op}: gradient=False is wrong because an input requires a gradient; call kernels_cuda.rwkv_distill.{op}")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.initial = initial is not None
    ctx.save_for_backward(*inputs[:num_inputs], mask, starts, *output[2:])


def arriving(op: str, ctx: Any, saved: Sequence[Tensor], dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Gradients of y and of the final states as kernels take them; None if none arrives."""
    check.refuse_second_derivative(op)
    if not ctx.output_final:
        dfinal = None
    if dy is None and dfinal is None:
        return None
    return torch.zeros_like(saved[0]) if dy is None else dy, dfinal


def step(op: str, inputs: Sequence[Tensor], state: Tensor) -> Tensor:
    """One token; a contiguous state changes where it lies."""
    r = inputs[0]
    kernels = getattr(torch.ops, choice.library(f"rwkv_distill/{op}", r.device.type))
    y, place = r.new_empty(r.shape), state.contiguous()
    getattr(kernels, f"{op}_step_")(*contiguous(*inputs), place, y)
    if place is not state:
        state.copy_(place)
    return y


def over_sequences(
    recurrence: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    *,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`recurrence(*inputs, state=..., mask=...)` of a batch, or of packed sequences one after the other."""
    if cu_seqlens is None:
        y, state = recurrence(*inputs, state=initial_state, mask=mask)
        return y, state if output_final_state else None
    parts = [
        recurrence(
            *(value[:, start:end] for value in inputs),
            state=None if initial_state is None else initial_state[index : index + 1],
            mask=None if mask is None else mask[:, start:end],
        )
        for index, (start, end) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    state = torch.cat([state for _, state in parts])
    return torch.cat([y for y, _ in parts], 1), state if output_final_state else None

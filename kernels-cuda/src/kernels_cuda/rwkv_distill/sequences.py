"""Argument checks that the recurrences share. B batch, T time, H heads, N head size, Q packed sequences."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels_cuda import check

SIZES = (32, 64, 128)


def check_inputs(inputs: dict[str, Tensor]) -> None:
    """One dtype, one device, a head size that kernels have; the first input stands for all in messages."""
    name, first = next(iter(inputs.items()))
    check.dtype(name, first, (torch.float32, torch.bfloat16, torch.float64))
    check.same("dtype", **inputs)
    check.same("device", **inputs)
    size = first.shape[-1]
    if size not in SIZES:
        check.fail(name, f"head size {size}", "is not supported", f"use {' or '.join(map(str, SIZES))}")


def check_sequences(r: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """The number of sequences: B, or Q where they are packed."""
    if r.shape[1] < 1:
        check.fail("r", f"shape {tuple(r.shape)}", "has no tokens", "pass T of at least 1")
    check.same("device", r=r, mask=mask, cu_seqlens=cu_seqlens)
    check.dtype("mask", mask, (torch.bool, torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16))
    check.dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens is None:
        return r.shape[0]
    length = cu_seqlens.shape[0]
    if r.shape[0] != 1:
        check.fail("cu_seqlens", "given", f"with a batch of {r.shape[0]}", "pack the sequences into one row, B = 1")
    if length < 2:
        check.fail("cu_seqlens", f"length {length}", "names no sequence", "pass the start of each sequence and the end of the last")
    return length - 1


def check_starts(starts: Tensor | None, time: int) -> None:
    """The numbers of cu_seqlens. On a GPU, where looking would stall, the kernels clamp instead."""
    if starts is None or starts.device.type != "cpu":
        return
    values = starts.tolist()
    if values[0] != 0 or values[-1] != time or any(end < start for start, end in pairwise(values)):
        check.fail("cu_seqlens", values, f"does not divide {time} tokens", f"start with 0, never fall, and end with {time}")


def check_state(name: str, state: Tensor | None, r: Tensor, num_sequences: int) -> None:
    """[sequences, H, N, N] on the device of r, in float32 (float64 for float64)."""
    if state is None:
        return
    check.same("device", r=r, **{name: state})
    check.dtype(name, state, (torch.promote_types(r.dtype, torch.float32),))
    heads, size = r.shape[-2:]
    expected = (num_sequences, heads, size, size)
    if tuple(state.shape) != expected:
        check.fail(name, f"shape {tuple(state.shape)}", f"does not fit r of shape {tuple(r.shape)}", f"pass {expected}")


def check_no_gradient(tensors: dict[str, Tensor], instead: str) -> None:
    """A step in place records nothing, so nothing may wait for a gradient."""
    for name, value in tensors.items():
        if torch.is_grad_enabled() and value.requires_grad:
            check.fail(
                name, "requires_grad=True", "is wrong because a step changes the state in place", f"use {instead}, or torch.no_grad()"
            )


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """As kernels want them."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]

"""How a tensor is cut into blocks, and the checks that its ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels_cuda import check


def columns_of(x: Tensor, row_aligned: bool) -> int:
    """Length of a row: blocks restart there. Without `row_aligned` the tensor is one row."""
    return x.shape[-1] if row_aligned and x.dim() > 0 else x.numel()


def absmax_shape(x: Tensor, block: int, row_aligned: bool) -> tuple[int, ...]:
    """Rows x blocks of a row if `row_aligned`, else the blocks of all of x."""
    blocks = math.ceil(columns_of(x, row_aligned) / block)
    return (math.prod(x.shape[:-1]), blocks) if row_aligned else (blocks,)


def check_block(block: int) -> None:
    """A block holds something."""
    if block < 1:
        check.fail("block", block, "is below 1", "use for example 256")


def check_code(name: str, code: Tensor, like: Tensor) -> None:
    """A code book has 256 float32 values, on the device of the codes."""
    if code.shape != (256,):
        check.fail(name, f"shape {tuple(code.shape)}", "is not a code book", "pass 256 sorted values")
    check.dtype(name, code, (torch.float32,))
    check.same("device", codes=like, **{name: code})


def check_absmax(name: str, absmax: Tensor, x: Tensor, block: int, row_aligned: bool) -> None:
    """There is a maximum for every block."""
    expected = absmax_shape(x, block, row_aligned)
    if absmax.shape != expected:
        check.fail(name, f"shape {tuple(absmax.shape)}", f"does not fit {tuple(x.shape)} in blocks of {block}", f"pass {expected}")
    check.dtype(name, absmax, (torch.float32,))


def check_like(x_name: str, x: Tensor, **others: Tensor) -> None:
    """Tensors that are changed in place have the shape and device of x and lie in memory without gaps."""
    for name, other in others.items():
        if other.shape != x.shape:
            check.fail(name, f"shape {tuple(other.shape)}", f"differs from {x_name}, which has {tuple(x.shape)}", "make them the same")
    check.same("device", **{x_name: x}, **others)
    check_contiguous(**others)


def check_contiguous(**tensors: Tensor) -> None:
    """A tensor that is changed in place has no gaps."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            check.fail(name, f"strides {tensor.stride()}", "leave gaps or are out of order", "pass a contiguous tensor")


def check_adam(b1: float, b2: float, eps: float, step: int) -> None:
    """Settings that Adam can work with."""
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            check.fail(name, beta, "is outside [0, 1)", "use for example 0.9")
    if not eps >= 0:
        check.fail("eps", eps, "is negative", "use for example 1e-8")
    if step < 1:
        check.fail("step", step, "is below 1", "count updates from 1")

"""Inputs that the op is tested with."""

from __future__ import annotations

from typing import Any

import torch

from kernels_cuda.lowrank.blocks import columns_of
from kernels_cuda.lowrank.quantize_blockwise.cases import code_book, numbers
from kernels_cuda.lowrank.quantize_blockwise.reference import quantize_blockwise
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype, *shape: int, row_aligned: bool = False, block: int = 256, step: int = 3, decay: float = 0.0, alpha: float = -1.0
) -> Arguments:
    """Random gradients, and moments as they may come from them."""
    gradient, first = numbers(*shape, seed=1).to(dtype), numbers(*shape, seed=2).to(dtype)
    books = code_book(True).to(dtype), code_book(False).to(dtype)
    mq, m_absmax = quantize_blockwise(first, books[0], block, row_aligned)
    vq, v_absmax = quantize_blockwise(first * first, books[1], block, row_aligned, nonzero=True)
    return {
        "L": gradient,
        "mq": mq,
        "m_absmax": m_absmax,
        "vq": vq,
        "v_absmax": v_absmax,
        "code_s": books[0],
        "code_u": books[1],
        "out": numbers(*shape, seed=4).to(dtype),
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "step": step,
        "block": block,
        "row_aligned": row_aligned,
        "decay": decay,
        "alpha": alpha,
    }


FLOAT = (torch.float32,)
CASES = [
    Case("ordinary", lambda dtype: make(dtype, 5, 300), FLOAT),
    Case("rows", lambda dtype: make(dtype, 5, 300, row_aligned=True), FLOAT),
    Case("first step of a weight", lambda dtype: make(dtype, 600, step=1, decay=0.99, alpha=1e-3), FLOAT),
    Case("one", lambda dtype: make(dtype, 1), FLOAT),
    Case("short rows", lambda dtype: make(dtype, 17, 9, row_aligned=True), FLOAT),
    Case("small blocks", lambda dtype: make(dtype, 3, 50, row_aligned=True, block=16), FLOAT),
    Case("large blocks", lambda dtype: make(dtype, 3000, block=2048), FLOAT),
    Case("empty", lambda dtype: make(dtype, 0, 5, row_aligned=True), FLOAT),
    Case("strided gradient", lambda dtype: {**make(dtype, 20, 30), "L": numbers(30, 20).to(dtype).t()}, FLOAT),
    Case("no gradient", lambda dtype: {**make(dtype, 300), "L": torch.zeros(300, dtype=dtype)}, FLOAT),
    Case("out that holds NaN", lambda dtype: {**make(dtype, 20), "out": torch.full((20,), torch.nan, dtype=dtype)}, FLOAT),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 300), **changes}


REFUSED = [
    Refused("half", lambda: _changed(L=torch.ones(4, 300).half()), "L: torch.float16 is not supported; use float32"),
    Refused("float codes", lambda: _changed(vq=torch.ones(4, 300)), "vq: torch.float32 is not supported; use uint8"),
    Refused("other shape", lambda: _changed(out=torch.ones(300, 4)), r"out: shape \(300, 4\) differs from L, which has \(4, 300\)"),
    Refused("maxima of rows", lambda: _changed(row_aligned=True), r"m_absmax: shape \(5,\) does not fit \(4, 300\) .*; pass \(4, 2\)"),
    Refused("gaps", lambda: _changed(v_absmax=torch.ones(10)[::2]), r"v_absmax: strides \(2,\) leave gaps"),
    Refused("short book", lambda: _changed(code_u=torch.ones(16)), r"code_u: shape \(16,\) is not a code book"),
    Refused("step zero", lambda: _changed(step=0), "step: 0 is below 1"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found = []
    for arguments in (
        make(torch.float32, 20003),
        make(torch.float32, 3, 300, row_aligned=True, decay=0.99, alpha=1e-3),
        make(torch.float32, 5, 7, row_aligned=True),
    ):
        columns = columns_of(arguments["L"], arguments.pop("row_aligned"))
        *before, block, decay, alpha = arguments.values()
        found.append(Call("adam8bit_step_", (*before, columns, block, decay, alpha)))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

"""Inputs that the op is tested with, and the code books that its family is tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.testing import Arguments, Call, Case, Refused


def code_book(signed: bool) -> Tensor:
    """256 sorted values: seven decades, each with twice as many values as the one below, and 0 and 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers over many scales."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))


def make(dtype: torch.dtype, *shape: int, signed: bool = True, row_aligned: bool = False, block: int = 256) -> Arguments:
    """Random arguments; an unsigned book goes with numbers that are not negative."""
    x = numbers(*shape)
    return {
        "x": (x if signed else x * x).to(dtype),
        "code": code_book(signed).to(torch.promote_types(dtype, torch.float32)),
        "block": block,
        "row_aligned": row_aligned,
        "nonzero": not signed,
    }


def _of(x: Tensor, dtype: torch.dtype, **changes: Any) -> Arguments:
    return {**make(dtype, 1), "x": x.to(dtype), **changes}


FLOAT = (torch.float32,)
CASES = [
    Case("ordinary", partial(_of, numbers(5, 300)), dtypes=FLOAT),
    Case("rows", lambda dtype: make(dtype, 5, 300, row_aligned=True), dtypes=FLOAT),
    Case("second moments", lambda dtype: make(dtype, 5, 300, signed=False), dtypes=FLOAT),
    Case("rows of second moments", lambda dtype: make(dtype, 3, 2, 257, signed=False, row_aligned=True), dtypes=FLOAT),
    *(Case(f"{size} numbers", partial(lambda dtype, size: make(dtype, size), size=size), dtypes=FLOAT) for size in (1, 63, 64, 255, 256)),
    Case("small blocks", lambda dtype: make(dtype, 7, 50, row_aligned=True, block=16), dtypes=FLOAT),
    Case("large blocks", lambda dtype: make(dtype, 3000, block=2048), dtypes=FLOAT),
    Case("blocks of one", lambda dtype: make(dtype, 9, block=1), dtypes=FLOAT),
    Case("empty", lambda dtype: make(dtype, 0, 5, row_aligned=True), dtypes=FLOAT),
    Case("empty rows", lambda dtype: make(dtype, 3, 0, row_aligned=True), dtypes=FLOAT),
    Case("strided", lambda dtype: {**make(dtype, 1), "x": numbers(40, 30).to(dtype).t()[::2]}, dtypes=FLOAT),
    Case("zeros and denormals", partial(_of, torch.cat([torch.zeros(260), torch.tensor([1e-45, -3e-45, 1e-40])])), dtypes=FLOAT),
    Case("huge", partial(_of, torch.tensor([3e38, -3e38, 1.0])), dtypes=FLOAT),
    Case("evenly spaced book", lambda dtype: {**make(dtype, 700), "code": torch.linspace(-1, 1, 256).to(dtype)}, dtypes=FLOAT),
    # more values in a narrow place than a table of 512 cells can tell apart
    Case(
        "crowded book",
        lambda dtype: {**make(dtype, 700), "code": torch.cat([torch.linspace(0.5, 0.501, 255), torch.ones(1)]).to(dtype)},
        dtypes=FLOAT,
    ),
    Case(
        "book with equal values",
        lambda dtype: {**make(dtype, 700), "code": torch.linspace(-1, 1, 32).repeat_interleave(8).to(dtype)},
        FLOAT,
    ),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3), **changes}


REFUSED = [
    Refused("integers", lambda: _changed(x=torch.ones(3, dtype=torch.int64)), "x: torch.int64 is not supported; use float32 or"),
    Refused("block of none", lambda: _changed(block=0), "block: 0 is below 1; use for example 256"),
    Refused("short book", lambda: _changed(code=torch.ones(16)), r"code: shape \(16,\) is not a code book; pass 256 sorted values"),
    Refused("double book", lambda: _changed(code=torch.ones(256).double()), "code: torch.float64 is not supported; use float32"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found = []
    for rows, columns, signed in ((1, 1501, True), (3, 300, False), (2, 64, True)):
        x = numbers(rows, columns)
        absmax = torch.zeros(rows, -(-columns // 256))
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        arguments = (x if signed else x * x, code_book(signed), codes, absmax, columns, 256, not signed)
        found.append(Call("quantize_blockwise", arguments))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

"""Inputs that the op is tested with."""

from __future__ import annotations

from typing import Any

import torch

from kernels_cuda.lowrank.quantize_blockwise.cases import code_book, numbers
from kernels_cuda.lowrank.quantize_blockwise.reference import quantize_blockwise
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, *shape: int, row_aligned: bool = False, block: int = 256) -> Arguments:
    """Codes of random numbers."""
    wide = torch.promote_types(dtype, torch.float32)
    code = code_book(signed=True).to(wide)
    codes, absmax = quantize_blockwise(numbers(*shape).to(wide), code, block, row_aligned)
    return {"codes": codes, "absmax": absmax, "code": code, "block": block, "row_aligned": row_aligned}


FLOAT = (torch.float32,)
CASES = [
    Case("ordinary", lambda dtype: make(dtype, 5, 300), FLOAT),
    Case("rows", lambda dtype: make(dtype, 5, 300, row_aligned=True), FLOAT),
    Case("one", lambda dtype: make(dtype, 1), FLOAT),
    Case("small blocks", lambda dtype: make(dtype, 7, 50, row_aligned=True, block=16), FLOAT),
    Case("large blocks", lambda dtype: make(dtype, 3000, block=2048), FLOAT),
    Case("empty", lambda dtype: make(dtype, 0, 5, row_aligned=True), FLOAT),
    Case("empty rows", lambda dtype: make(dtype, 3, 0, row_aligned=True), FLOAT),
    Case("strided", lambda dtype: {**make(dtype, 40, 30), "codes": make(dtype, 30, 40)["codes"].t()}, FLOAT),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 300), **changes}


REFUSED = [
    Refused("float codes", lambda: _changed(codes=torch.ones(4, 300)), "codes: torch.float32 is not supported; use uint8"),
    Refused(
        "too few maxima",
        lambda: _changed(absmax=torch.ones(3)),
        r"absmax: shape \(3,\) does not fit \(4, 300\) in blocks of 256; pass \(5,\)",
    ),
    Refused("rows of maxima", lambda: _changed(row_aligned=True), r"absmax: shape .* does not fit .*; pass \(4, 2\)"),
    Refused("block of none", lambda: _changed(block=-1), "block: -1 is below 1"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found = []
    for columns in (300, 64, 7):
        arguments = make(torch.float32, 3, columns, row_aligned=True)
        values = torch.zeros(3, columns)
        found.append(Call("dequantize_blockwise", (arguments["codes"], arguments["absmax"], arguments["code"], values, columns, 256)))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

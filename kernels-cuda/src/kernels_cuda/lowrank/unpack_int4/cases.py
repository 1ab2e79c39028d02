"""Inputs that the op is tested with."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from kernels_cuda.lowrank.pack_int4 import reference as packing
from kernels_cuda.lowrank.pack_int4.cases import make as packed_make
from kernels_cuda.lowrank.quantize_blockwise.cases import numbers
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, *shape: int) -> Arguments:
    """Packed random numbers."""
    codes, scale, zero = packing.pack_int4(packed_make(torch.float32, *shape)["x"])
    return {"codes": codes, "scale": scale, "zero": zero, "shape": shape, "dtype": torch.float32 if dtype == torch.float64 else dtype}


def _of(dtype: torch.dtype, *, shape: tuple[int, ...]) -> Arguments:
    return make(dtype, *shape)


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 3, 300)
    return {name: value.repeat_interleave(2)[::2] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


CASES = [
    Case("ordinary", partial(_of, shape=(5, 300))),
    *(Case(f"{count} numbers", partial(_of, shape=(count,))) for count in (1, 2, 255, 256, 257, 9001)),
    Case("three dimensions", partial(_of, shape=(3, 5, 7))),
    Case("strided", _strided),
    Case("empty", partial(_of, shape=(0, 5))),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 100), **changes}


REFUSED = [
    Refused("other shape", lambda: _changed(shape=(4, 99)), r"codes: shape \(200,\) does not hold 396 numbers; pass \(198,\)"),
    Refused("float steps", lambda: _changed(scale=torch.ones(2)), "scale: torch.float32 is not supported; use float16"),
    Refused("half", lambda: _changed(dtype=torch.float16), "dtype: torch.float16 is not supported; use torch.float32 or torch.bfloat16"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found = []
    for shape, dtype in (((1501,), torch.float32), ((2, 256), torch.bfloat16)):
        codes, scale, zero = packing.pack_int4(packed_make(torch.float32, *shape)["x"])
        found.append(Call("unpack_int4", (codes, scale, zero, torch.zeros(math.prod(shape), dtype=dtype))))
    packed, matrix = packing.pack_int4(numbers(9, 37)), numbers(37, 541, seed=2)
    found += [
        Call("project_int4_", (numbers(9, 541, seed=3), *packed, matrix, True, False), ("cpu",)),
        Call("project_int4_", (numbers(9, 541, seed=3), *packed, matrix.bfloat16(), False, True), ("cpu",)),
    ]
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

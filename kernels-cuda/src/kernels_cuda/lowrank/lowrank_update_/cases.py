"""Inputs that the op is tested with. m rows and n columns of a weight, r rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.lowrank.quantize_blockwise.cases import numbers
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype,
    m: int,
    n: int,
    r: int,
    side: str = "left",
    *,
    alpha: float = 0.1,
    decay: float = 0.99,
    seed: int = -1,
    offset: int = 0,
    basis: torch.dtype | None = None,
) -> Arguments:
    """Random arguments."""
    k, d = (m, n) if side == "left" else (n, m)
    tensors = {"W": numbers(m, n, seed=1).to(dtype), "P": numbers(r, k, seed=2).to(basis or dtype), "N": numbers(r, d, seed=3)}
    return {**tensors, "side": side, "alpha": alpha, "decay": decay, "seed": seed, "offset": offset}


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 12, 31, 5)
    return {name: value.t().contiguous().t() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _fresh(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 7, 9, 2, decay=0.0, seed=1)
    return {**arguments, "W": torch.full_like(arguments["W"], torch.nan)}


def _half_step(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 12, 31, 5, seed=1)
    return {**arguments, "N": arguments["N"].to(dtype)}


CASES = [
    Case("left", partial(make, m=12, n=31, r=5)),
    Case("right", partial(make, m=31, n=12, r=5, side="right")),
    Case("at random", partial(make, m=12, n=31, r=5, seed=3, offset=7)),
    Case("at random, right", partial(make, m=9, n=7, r=3, side="right", seed=2**62 + 1, offset=2**40 + 1)),
    Case("basis in float32", partial(make, m=12, n=31, r=5, basis=torch.float32, seed=0), (torch.bfloat16,)),
    Case("basis in bfloat16", partial(make, m=12, n=31, r=5, basis=torch.bfloat16), (torch.float32,)),
    Case("step in bfloat16", partial(_half_step), (torch.bfloat16,)),
    Case("without decay", _fresh),
    Case("one of each", partial(make, m=1, n=1, r=1)),
    Case("no rows", partial(make, m=0, n=4, r=2, seed=1)),
    Case("many slices", partial(make, m=3, n=5461, r=2, seed=5)),
    Case("strided", _strided),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 6, 2), **changes}


REFUSED = [
    Refused("other rank", lambda: _changed(N=torch.ones(3, 6)), "N: shape .* has r = 3 where P has 2"),
    Refused("other side", lambda: _changed(side="right"), "P: shape .* has n = 4 where W has 6"),
    Refused("no side", lambda: _changed(side="full"), "side: 'full' is not known; use 'left' or 'right'"),
    Refused("half", lambda: _changed(W=torch.ones(4, 6).half()), "W: torch.float16 is not supported; use float32 or bfloat16"),
    Refused("half step", lambda: _changed(N=torch.ones(2, 6).half()), "N: torch.float16 is not supported; use float32 or bfloat16"),
    Refused("negative offset", lambda: _changed(offset=-1), "offset: -1 is negative"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    weight = numbers(37, 541, seed=1).bfloat16()
    back = numbers(37, 541, seed=2)
    return [
        Call("lowrank_write_", (weight, back, 0.9, 0.1, 5, 3, 0)),
        Call("lowrank_write_", (weight, back.bfloat16(), 0.9, 0.1, 5, 3, 541 * 3)),
        Call("lowrank_write_", (weight, back, 0.0, 0.1, -1, 0, 7)),
        Call("lowrank_write_", (weight.float(), back.bfloat16(), 0.9, 0.1, -1, 0, 0)),
        Call("lowrank_project_", (numbers(9, 541, seed=3), numbers(9, 37, seed=4), back, True, False), ("cpu",)),
        Call("lowrank_project_", (numbers(9, 541, seed=3), numbers(9, 37, seed=4).bfloat16(), back, False, True), ("cpu",)),
        Call("lowrank_product_", (weight, numbers(37, 9, seed=4), numbers(9, 541, seed=3), 0.9, 0.1, 5, 3, True), ("cpu",)),
        Call("lowrank_product_", (weight.float(), numbers(37, 9, seed=4), numbers(9, 541, seed=3), 0.9, 0.1, -1, 0, False), ("cpu",)),
    ]


def calls() -> list[Call]:
    """There are no others."""
    return []

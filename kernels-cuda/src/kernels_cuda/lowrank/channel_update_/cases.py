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
    axis: int = 0,
    *,
    r: int = 0,
    last: float | None = 1.0,
    one: bool = False,
    alpha: float = 0.1,
    decay: float = 0.99,
    seed: int = -1,
    offset: int = 0,
    gradient: torch.dtype | None = None,
    basis: torch.dtype | None = None,
) -> Arguments:
    """Random arguments; with a rank a low-rank term, too. `last` is the norm before, which limits unless it is 0 or None."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        "W": numbers(m, n, seed=1).to(dtype),
        "G": numbers(m, n, seed=2).to(gradient or dtype),
        "sigma": numbers(1 if one else (m, n)[axis], seed=3).abs().to(wide),
        "prev_norm": None if last is None else torch.tensor(last, dtype=wide),
    }
    if r:
        k, d = (n, m) if axis == 0 else (m, n)
        tensors |= {"P": numbers(r, k, seed=4).to(basis or dtype), "N": numbers(r, d, seed=5)}
    return {**tensors, "axis": axis, "gamma": 1.01, "alpha": alpha, "decay": decay, "seed": seed, "offset": offset}


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 12, 31, 1, r=5)
    turned = {name: arguments[name].t().contiguous().t() for name in ("W", "G", "P", "N")}
    return {**arguments, **turned, "sigma": numbers(62, seed=3).abs()[::2].to(arguments["sigma"])}


def _fresh(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 7, 9, decay=0.0, seed=1)
    return {**arguments, "W": torch.full_like(arguments["W"], torch.nan)}


CASES = [
    Case("rows", partial(make, m=12, n=31)),
    Case("columns", partial(make, m=12, n=31, axis=1)),
    Case("one factor", partial(make, m=31, n=12, one=True)),
    Case("first step", partial(make, m=31, n=12, last=0.0)),
    Case("no limit", partial(make, m=31, n=12, last=None)),
    Case("a limit that does nothing", partial(make, m=12, n=31, axis=1, last=1e9)),
    Case("at random", partial(make, m=12, n=31, seed=3, offset=7)),
    Case("at random, columns", partial(make, m=40, n=37, axis=1, seed=2**62 + 1, offset=2**40 + 1)),
    Case("low rank, rows", partial(make, m=31, n=12, r=5)),
    Case("low rank, columns", partial(make, m=12, n=31, axis=1, r=5, seed=9)),
    Case("basis in bfloat16", partial(make, m=12, n=31, axis=1, r=5, basis=torch.bfloat16), (torch.float32,)),
    Case("basis in float32", partial(make, m=12, n=31, r=5, basis=torch.float32), (torch.bfloat16,)),
    Case("gradient in bfloat16", partial(make, m=12, n=31, gradient=torch.bfloat16), (torch.float32,)),
    Case("gradient in float32", partial(make, m=12, n=31, gradient=torch.float32), (torch.bfloat16,)),
    Case("without decay", _fresh),
    Case("one of each", partial(make, m=1, n=1, r=1)),
    Case("no rows", partial(make, m=0, n=4, seed=1)),
    Case("many columns", partial(make, m=3, n=5461, r=2, seed=5)),
    Case("one column", partial(make, m=5461, n=1, seed=5)),
    Case("strided", _strided),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 6, r=2), **changes}


REFUSED = [
    Refused("other gradient", lambda: _changed(G=torch.ones(4, 5)), r"G: shape .* has n = 5 where W has 6"),
    Refused("no axis", lambda: _changed(axis=2), "axis: 2 is not known; use 0 for rows or 1 for columns"),
    Refused("sigma of the other axis", lambda: _changed(sigma=torch.ones(6)), r"sigma: shape \(6,\) does not fit \(4, 6\) along axis 0"),
    Refused("norms", lambda: _changed(prev_norm=torch.ones(4)), r"prev_norm: shape \(4,\) is no single number; pass torch.zeros"),
    Refused("half", lambda: _changed(W=torch.ones(4, 6).half()), "W: torch.float16 is not supported; use float32 or bfloat16"),
    Refused("sigma in bfloat16", lambda: _changed(sigma=torch.ones(4).bfloat16()), "sigma: torch.bfloat16 is not supported"),
    Refused("other rank", lambda: _changed(N=torch.ones(3, 4)), "N: shape .* has r = 3 where P has 2"),
    Refused("a basis alone", lambda: _changed(N=None), "N: None is missing; give both P and N, or neither"),
    Refused("no growth", lambda: _changed(gamma=0.0), "gamma: 0.0 is not above 0; use for example 1.01"),
    Refused("negative offset", lambda: _changed(offset=-1), "offset: -1 is negative"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    weight, back, gradient = (numbers(37, 541, seed=seed) for seed in (1, 2, 3))
    rows, columns, one = (numbers(size, seed=4).abs() for size in (37, 541, 1))
    half, left, right = weight.bfloat16(), numbers(37, 9, seed=5), numbers(9, 541, seed=6)
    return [
        Call("channel_squares_", (gradient, rows, 0, torch.zeros(37))),
        Call("channel_squares_", (gradient.bfloat16(), columns, 1, torch.zeros(37))),
        Call("channel_write_", (half, None, gradient.bfloat16(), columns, 1, 0.9, 0.1, 5, 3, 0)),
        Call("channel_write_", (half, back.bfloat16(), gradient, one, 0, 0.9, 0.1, 5, 3, 541 * 3)),
        Call("channel_write_", (weight, back, gradient, rows, 0, 0.9, 0.1, -1, 0, 7)),
        Call("channel_product_", (half, left, right, gradient, rows, 0, 0.9, 0.1, 5, 3, True), ("cpu",)),
        Call("channel_product_", (weight, left, right, gradient.bfloat16(), columns, 1, 0.9, 0.1, -1, 0, False), ("cpu",)),
    ]


def calls() -> list[Call]:
    """There are no others."""
    return []

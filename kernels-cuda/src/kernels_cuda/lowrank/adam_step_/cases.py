"""Inputs that the op is tested with."""

from __future__ import annotations

from typing import Any

import torch

from kernels_cuda.lowrank.quantize_blockwise.cases import numbers
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, *shape: int, step: int = 3, eps: float = 1e-8, decay: float = 0.0, alpha: float = -1.0) -> Arguments:
    """Random gradients and moments."""
    tensors = {
        "L": numbers(*shape, seed=1),
        "m": numbers(*shape, seed=2),
        "v": numbers(*shape, seed=3).abs(),
        "out": numbers(*shape, seed=4),
    }
    settings = {"b1": 0.9, "b2": 0.999, "eps": eps, "step": step, "decay": decay, "alpha": alpha}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | settings


FLOAT = (torch.float32,)


def _halves(dtype: torch.dtype, *shape: int, decay: float = 0.0) -> Arguments:
    arguments = make(torch.float32, *shape, decay=decay)
    return arguments | {name: arguments[name].to(dtype) for name in ("L", "out")}


CASES = [
    Case("ordinary", lambda dtype: make(dtype, 5, 300), FLOAT),
    Case("first step of a weight", lambda dtype: make(dtype, 500, step=1, decay=0.99, alpha=1e-3), FLOAT),
    Case("late", lambda dtype: make(dtype, 33, step=10**6), FLOAT),
    Case("several pieces", lambda dtype: make(dtype, 9001), FLOAT),
    Case("one", lambda dtype: make(dtype, 1), FLOAT),
    Case("empty", lambda dtype: make(dtype, 3, 0), FLOAT),
    Case("strided gradient", lambda dtype: {**make(dtype, 20, 30), "L": numbers(30, 20).to(dtype).t()}, FLOAT),
    Case("bfloat16", lambda dtype: _halves(dtype, 7, 611), (torch.bfloat16,)),
    Case("bfloat16 weight", lambda dtype: _halves(dtype, 300, decay=0.99), (torch.bfloat16,)),
    Case("out that holds NaN", lambda dtype: {**make(dtype, 20), "out": torch.full((20,), torch.nan, dtype=dtype)}, FLOAT),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3), **changes}


REFUSED = [
    Refused("half", lambda: _changed(L=torch.ones(4, 3).half()), "L: torch.float16 is not supported; use float32 or bfloat16"),
    Refused(
        "other shape", lambda: _changed(m=torch.ones(3, 4)), r"m: shape \(3, 4\) differs from L, which has \(4, 3\); make them the same"
    ),
    Refused(
        "gaps", lambda: _changed(out=torch.ones(4, 6)[:, ::2]), r"out: strides \(6, 2\) leave gaps or are out of order; pass a contiguous"
    ),
    Refused("beta of one", lambda: _changed(b1=1.0), r"b1: 1.0 is outside \[0, 1\)"),
    Refused("step zero", lambda: _changed(step=0), "step: 0 is below 1; count updates from 1"),
    Refused("negative eps", lambda: _changed(eps=-1.0), "eps: -1.0 is negative"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found = []
    for count, decay, alpha in ((20003, 0.0, -1.0), (37, 0.99, 1e-3)):
        arguments = make(torch.float32, count, decay=decay, alpha=alpha)
        found.append(Call("adam_step_", tuple(arguments.values())))
        halves = _halves(torch.bfloat16, count, decay=decay)
        found.append(Call("adam_step_", tuple({**arguments, "L": halves["L"], "out": halves["out"]}.values())))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

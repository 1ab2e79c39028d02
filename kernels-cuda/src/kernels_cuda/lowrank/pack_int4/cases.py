"""Inputs that the op is tested with."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.lowrank.quantize_blockwise.cases import numbers
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, *shape: int) -> Arguments:
    """Random numbers that half precision holds."""
    return {"x": numbers(*shape).clamp(-1000, 1000).to(dtype)}


def _of(dtype: torch.dtype, *, shape: tuple[int, ...]) -> Arguments:
    return make(dtype, *shape)


CASES = [
    Case("ordinary", partial(_of, shape=(5, 300))),
    *(Case(f"{count} numbers", partial(_of, shape=(count,))) for count in (1, 2, 255, 256, 257, 9001)),
    Case("three dimensions", partial(_of, shape=(3, 5, 7))),
    Case("equal", lambda dtype: {"x": torch.full((3, 100), 0.3, dtype=dtype)}),
    Case("zeros", lambda dtype: {"x": torch.zeros(3, 100, dtype=dtype)}),
    # steps and offsets that half precision holds as denormals, or rounds to zero
    Case("small", lambda dtype: {"x": (1e-6 * numbers(700)).clamp(-1, 1).to(dtype)}),
    Case("smaller", lambda dtype: {"x": (1e-9 * numbers(700)).clamp(-1, 1).to(dtype)}),
    Case("strided", lambda dtype: {"x": make(dtype, 40, 30)["x"].t()[::2]}),
    Case("empty", partial(_of, shape=(0, 5))),
]

REFUSED = [Refused("half", lambda: {"x": torch.ones(3).half()}, "x: torch.float16 is not supported; use float32 or bfloat16")]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    found = []
    for count, dtype in ((1501, torch.float32), (512, torch.bfloat16)):
        scale, zero = (torch.zeros(-(-count // 256), dtype=torch.float16) for _ in range(2))
        found.append(Call("pack_int4", (make(dtype, count)["x"], torch.zeros((count + 1) // 2, dtype=torch.uint8), scale, zero)))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

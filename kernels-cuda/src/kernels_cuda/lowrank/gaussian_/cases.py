"""Inputs that the op is tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, *shape: int, seed: int = 1, param: int = 3, index: int = 2) -> Arguments:
    """A tensor to fill, and an address."""
    return {"out": torch.full(shape, torch.nan, dtype=dtype), "seed": seed, "param": param, "index": index}


def _of(dtype: torch.dtype, *, shape: tuple[int, ...], **address: int) -> Arguments:
    return make(dtype, *shape, **address)


FLOAT = (torch.float32,)
CASES = [
    Case("ordinary", partial(_of, shape=(5, 300)), FLOAT),
    *(Case(f"{count} numbers", partial(_of, shape=(count,)), FLOAT) for count in (1, 2, 3, 4, 127, 128, 129, 9001)),
    Case("largest address", partial(_of, shape=(40,), seed=2**64 - 1, param=2**32 - 1, index=2**32 - 1), FLOAT),
    Case("negative seed", partial(_of, shape=(2, 3, 4), seed=-(2**63)), FLOAT),
    Case("empty", partial(_of, shape=(0, 5)), FLOAT),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3), **changes}


REFUSED = [
    Refused("half", lambda: _changed(out=torch.ones(3).half()), "out: torch.float16 is not supported; use float32"),
    Refused("gaps", lambda: _changed(out=torch.ones(4, 6)[:, ::2]), r"out: strides \(6, 2\) leave gaps or are out of order"),
    Refused("no parameter", lambda: _changed(param=-1), "param: -1 is no number of 32 bits; use one from 0 to 4294967295"),
    Refused("late refresh", lambda: _changed(index=2**32), "index: 4294967296 is no number of 32 bits"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    return [Call("gaussian_", (torch.zeros(count), seed, 5, 7)) for count, seed in ((20003, 11), (3, -1))]


def calls() -> list[Call]:
    """There are no others."""
    return []

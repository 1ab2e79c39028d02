"""Inputs that the op is tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.mdm import noise_cases
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, rows: int, size: int, **more: Any) -> Arguments:
    """Random sequences with any number of eligible tokens; `dtype` plays no part."""

    def any_number(generator: torch.Generator, eligible: torch.Tensor) -> torch.Tensor:
        return (torch.rand(len(eligible), generator=generator) * (eligible + 1)).to(torch.int32)

    return noise_cases.make("k", any_number, rows, size, **more)


def _ends(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 3, 40)
    return {**arguments, "k": torch.tensor([0, 1, int(arguments["eligible"][2].sum())], dtype=torch.int32)}


def _tie(dtype: torch.dtype) -> Arguments:
    """The 2814th and 2815th smallest draws of sequence 40 are equal: once the first of them is the last one masked, once both are."""
    arguments = make(dtype, 3, 3000, some=False)
    return {**arguments, "k": torch.tensor([2813, 2814, 2815], dtype=torch.int32), "slot": torch.full((3,), 40)}


FLOAT = (torch.float32,)
CASES = [
    *noise_cases.cases(make, "k"),
    Case("more tokens than threads", partial(make, rows=2, size=2500), FLOAT),
    Case("none, one and all", _ends, FLOAT),
    Case("equal draws", _tie, FLOAT),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3), **changes}


REFUSED = [
    Refused("long counts", lambda: _changed(k=torch.ones(4, dtype=torch.int64)), "k: torch.int64 is not supported; use torch.int32|k: "),
    Refused("counts of tokens", lambda: _changed(k=torch.ones(4, 3, dtype=torch.int32)), r"k: shape \(4, 3\) has 2 dimensions"),
    *noise_cases.refused(_changed, "k"),
    Refused(
        "more than there are",
        lambda: _changed(k=torch.tensor([0, 4, 0, 0], dtype=torch.int32), eligible=None),
        "k: 4 is no number of eligible tokens; use 0 to as many as there are",
    ),
    Refused("less than none", lambda: _changed(k=torch.tensor([0, 0, 0, -1], dtype=torch.int32)), "k: -1 is no number"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    return noise_cases.kernel_calls(make, "k", "mask_count", ((1, 1501, True), (3, 300, False), (50, 2, True)))


def calls() -> list[Call]:
    """There are no others."""
    return []

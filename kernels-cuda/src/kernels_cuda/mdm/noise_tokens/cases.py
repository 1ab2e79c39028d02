"""Inputs that the op is tested with."""

from __future__ import annotations

from typing import Any

import torch

from kernels_cuda.mdm import noise_cases
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, rows: int, size: int, **more: Any) -> Arguments:
    """Random sequences with any chances."""
    return noise_cases.make("p", lambda generator, eligible: torch.rand(len(eligible), generator=generator).to(dtype), rows, size, **more)


CASES = [
    *noise_cases.cases(make, "p"),
    Case("never and always", lambda dtype: {**make(dtype, 2, 40), "p": torch.tensor([0.0, 1.0], dtype=dtype)}, (torch.float32,)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3), **changes}


REFUSED = [
    Refused(
        "short words", lambda: _changed(ids=torch.ones(4, 3, dtype=torch.int32)), "ids: torch.int32 is not supported; use torch.int64|ids: "
    ),
    Refused("chances of tokens", lambda: _changed(p=torch.ones(4, 3)), r"p: shape \(4, 3\) has 2 dimensions"),
    *noise_cases.refused(_changed, "p"),
    Refused("no number", lambda: _changed(p=torch.tensor([0.5, float("nan"), 0.5, 0.5])), "p: nan is no chance; use numbers from 0 to 1"),
    Refused("more than certain", lambda: _changed(p=torch.tensor([0.5, 1.5, 0.5, 0.5])), "p: 1.5 is no chance"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    return noise_cases.kernel_calls(make, "p", "mask_tokens", ((1, 1501, True), (3, 300, False), (700, 2, True)))


def calls() -> list[Call]:
    """There are no others."""
    return []

"""Inputs that the op is tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, rows: int, size: int, *, some: bool = True, key: int = 1234) -> Arguments:
    """Random sequences, a third of whose tokens are not eligible."""
    generator = torch.Generator().manual_seed(rows + size)
    return {
        "ids": torch.randint(100, (rows, size), generator=generator),
        "p": torch.rand(rows, generator=generator).to(dtype),
        "key": key,
        "stream": 3,
        "slot": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "mask_id": 100,
        "eligible": torch.rand(rows, size, generator=generator) > 1 / 3 if some else None,
    }


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 6, 50)
    return {
        **arguments,
        **{name: arguments[name][::2, 1:] for name in ("ids", "eligible")},
        "p": arguments["p"][::2],
        "slot": arguments["slot"][::2],
    }


FLOAT = (torch.float32,)
CASES = [
    Case("ordinary", partial(make, rows=5, size=300), FLOAT),
    *(Case(f"{size} tokens", partial(make, rows=3, size=size), FLOAT) for size in (1, 3, 4, 5, 64, 65)),
    Case("all eligible", partial(make, rows=2, size=70, some=False), FLOAT),
    Case("negative key", partial(make, rows=2, size=70, key=-(2**63)), FLOAT),
    Case("never and always", lambda dtype: {**make(dtype, 2, 40), "p": torch.tensor([0.0, 1.0], dtype=dtype)}, FLOAT),
    Case("strided", _strided, FLOAT),
    Case("no sequence", partial(make, rows=0, size=5), FLOAT),
    Case("no token", partial(make, rows=2, size=0), FLOAT),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3), **changes}


REFUSED = [
    Refused(
        "short words", lambda: _changed(ids=torch.ones(4, 3, dtype=torch.int32)), "ids: torch.int32 is not supported; use torch.int64|ids: "
    ),
    Refused("chances of tokens", lambda: _changed(p=torch.ones(4, 3)), r"p: shape \(4, 3\) has 2 dimensions"),
    Refused("slots of others", lambda: _changed(slot=torch.zeros(5, dtype=torch.int64)), r"slot: shape \(5,\) has B = 5 where p has 4"),
    Refused("longer eligible", lambda: _changed(eligible=torch.ones(4, 5, dtype=torch.bool)), "size: 3 is not the number of tokens"),
    Refused("no number", lambda: _changed(p=torch.tensor([0.5, float("nan"), 0.5, 0.5])), "p: nan is no chance; use numbers from 0 to 1"),
    Refused("more than certain", lambda: _changed(p=torch.tensor([0.5, 1.5, 0.5, 0.5])), "p: 1.5 is no chance"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    found = []
    for rows, size, some in ((1, 1501, True), (3, 300, False), (700, 2, True)):
        given = make(torch.float32, rows, size, some=some)
        masked = torch.zeros(rows, size, dtype=torch.bool)
        found.append(Call("mask_tokens", (given["p"], given["slot"], given["eligible"], masked, given["key"], given["stream"])))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

"""Inputs that the op is tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, rows: int, size: int, *, some: bool = True, key: int = 1234) -> Arguments:
    """Random sequences, a third of whose tokens are not eligible, and any number of the others; `dtype` plays no part."""
    generator = torch.Generator().manual_seed(rows + size)
    eligible = torch.rand(rows, size, generator=generator) > 1 / 3 if some else torch.ones(rows, size, dtype=torch.bool)
    return {
        "ids": torch.randint(100, (rows, size), generator=generator),
        "k": (torch.rand(rows, generator=generator) * (eligible.sum(1) + 1)).to(torch.int32),
        "key": key,
        "stream": 3,
        "slot": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "mask_id": 100,
        "eligible": eligible if some else None,
    }


def _ends(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 3, 40)
    return {**arguments, "k": torch.tensor([0, 1, int(arguments["eligible"][2].sum())], dtype=torch.int32)}


def _tie(dtype: torch.dtype) -> Arguments:
    """The 2814th and 2815th smallest draws of sequence 40 are equal: once the first of them is the last one masked, once both are."""
    arguments = make(dtype, 3, 3000, some=False)
    return {**arguments, "k": torch.tensor([2813, 2814, 2815], dtype=torch.int32), "slot": torch.full((3,), 40)}


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 6, 50)
    half = {name: arguments[name][::2, 1:] for name in ("ids", "eligible")}
    return {**arguments, **half, "k": (arguments["k"] // 2)[::2], "slot": arguments["slot"][::2]}


FLOAT = (torch.float32,)
CASES = [
    Case("ordinary", partial(make, rows=5, size=300), FLOAT),
    *(Case(f"{size} tokens", partial(make, rows=3, size=size), FLOAT) for size in (1, 3, 4, 5, 64, 65)),
    Case("all eligible", partial(make, rows=2, size=70, some=False), FLOAT),
    Case("more tokens than threads", partial(make, rows=2, size=2500), FLOAT),
    Case("negative key", partial(make, rows=2, size=70, key=-(2**63)), FLOAT),
    Case("none, one and all", _ends, FLOAT),
    Case("equal draws", _tie, FLOAT),
    Case("strided", _strided, FLOAT),
    Case("no sequence", partial(make, rows=0, size=5), FLOAT),
    Case("no token", partial(make, rows=2, size=0), FLOAT),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3), **changes}


REFUSED = [
    Refused("long counts", lambda: _changed(k=torch.ones(4, dtype=torch.int64)), "k: torch.int64 is not supported; use torch.int32|k: "),
    Refused("counts of tokens", lambda: _changed(k=torch.ones(4, 3, dtype=torch.int32)), r"k: shape \(4, 3\) has 2 dimensions"),
    Refused("slots of others", lambda: _changed(slot=torch.zeros(5, dtype=torch.int64)), r"slot: shape \(5,\) has B = 5 where k has 4"),
    Refused("longer eligible", lambda: _changed(eligible=torch.ones(4, 5, dtype=torch.bool)), "size: 3 is not the number of tokens"),
    Refused(
        "more than there are",
        lambda: _changed(k=torch.tensor([0, 4, 0, 0], dtype=torch.int32), eligible=None),
        "k: 4 is no number of eligible tokens; use 0 to as many as there are",
    ),
    Refused("less than none", lambda: _changed(k=torch.tensor([0, 0, 0, -1], dtype=torch.int32)), "k: -1 is no number"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    found = []
    for rows, size, some in ((1, 1501, True), (3, 300, False), (50, 2, True)):
        given = make(torch.float32, rows, size, some=some)
        masked = torch.zeros(rows, size, dtype=torch.bool)
        found.append(Call("mask_count", (given["k"], given["slot"], given["eligible"], masked, given["key"], given["stream"])))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

"""Inputs that the op is tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, rows: int, size: int, **changes: Any) -> Arguments:
    """Random logits, of which the last three columns are padding where there is room, at random addresses."""
    generator = torch.Generator().manual_seed(rows + size)
    return {
        "logits": (3 * torch.randn(rows, size, generator=generator)).to(dtype),
        "valid_vocab": size - 3 if size > 3 else size,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "key": 1234,
        "stream": 5,
        "slot": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "pos": torch.randint(2**31, (rows,), generator=generator),
        **changes,
    }


def _equal(dtype: torch.dtype, **changes: Any) -> Arguments:
    """Two values alone, one of them zero of either sign."""
    logits = torch.randint(2, (6, 90), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, ::3] *= -1
    return {**make(dtype, 6, 90, **changes), "logits": logits}


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 6, 101, top_k=20)
    return {
        **arguments,
        "logits": arguments["logits"][::2, ::2],
        "valid_vocab": 50,
        **{name: arguments[name][::2] for name in ("slot", "pos")},
    }


def _closed(dtype: torch.dtype) -> Arguments:
    """Tokens that are ruled out, in a restriction that would have room for them."""
    arguments = make(dtype, 3, 40, top_k=30)
    arguments["logits"][:, 5:] = -torch.inf
    return arguments


CASES = [
    Case("ordinary", partial(make, rows=5, size=1300)),
    Case("likeliest", partial(make, rows=5, size=600, temperature=0.0)),
    Case("likeliest of equal ones", partial(_equal, temperature=0.0)),
    *(Case(f"{size} tokens", partial(make, rows=3, size=size)) for size in (1, 2, 3, 5, 513)),
    Case("cold", partial(make, rows=4, size=300, temperature=1e-3)),
    Case("hot", partial(make, rows=4, size=300, temperature=50.0)),
    Case("top 7", partial(make, rows=5, size=700, top_k=7)),
    Case("top 1", partial(make, rows=5, size=70, top_k=1)),
    Case("more than all", partial(make, rows=5, size=70, top_k=500)),
    Case("half of the probability", partial(make, rows=5, size=700, top_p=0.5, temperature=2.0)),
    Case("both", partial(make, rows=5, size=700, top_k=50, top_p=0.9, temperature=2.0)),
    Case("equal ones, some of them", partial(_equal, top_k=60)),
    Case("equal ones, a share", partial(_equal, top_p=0.3)),
    Case("strided", _strided),
    Case("ruled out", _closed),
    Case("negative key", partial(make, rows=2, size=70, key=-(2**63))),
    Case("no row", partial(make, rows=0, size=70)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 9), **changes}


REFUSED = [
    Refused("halves", lambda: _changed(logits=torch.ones(4, 9, dtype=torch.float16)), "logits: torch.float16 is not supported"),
    Refused(
        "slots of others", lambda: _changed(slot=torch.zeros(5, dtype=torch.int64)), r"slot: shape \(5,\) has M = 5 where logits has 4"
    ),
    Refused("short places", lambda: _changed(pos=torch.zeros(4, dtype=torch.int32)), "pos: torch.int32 is not supported; use int64"),
    Refused("far place", lambda: _changed(pos=torch.full((4,), 2**31)), "pos: 2147483648 is no word of a sample's places"),
    Refused("no token", lambda: _changed(valid_vocab=0), "valid_vocab: 0 is no number of columns of 9"),
    Refused("more than there are", lambda: _changed(valid_vocab=10), "valid_vocab: 10 is no number of columns of 9"),
    Refused("below zero", lambda: _changed(temperature=-1.0), "temperature: -1.0 divides no logits"),
    Refused("no number", lambda: _changed(temperature=float("nan")), "temperature: nan divides no logits"),
    Refused("negative count", lambda: _changed(top_k=-1), "top_k: -1 is no number of tokens"),
    Refused("no share", lambda: _changed(top_p=0.0), "top_p: 0.0 is no share of the probability"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    found = []
    for dtype, changes in (
        (torch.float32, {}),
        (torch.bfloat16, {"top_k": 9, "top_p": 0.7}),
        (torch.float64, {"top_p": 0.4}),
        (torch.float32, {"temperature": 0.0}),
    ):
        given = make(dtype, 3, 530, **changes)
        outputs = tuple(torch.zeros(3, dtype=kind) for kind in (torch.int64, torch.float32, torch.float32))
        settings = tuple(given[name] for name in ("valid_vocab", "temperature", "top_k", "top_p", "key", "stream"))
        found.append(Call("reveal", (given["logits"], given["slot"], given["pos"], *outputs, *settings)))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

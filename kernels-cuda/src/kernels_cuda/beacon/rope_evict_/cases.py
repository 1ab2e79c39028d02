"""Inputs that the op is tested with. B batch, G heads, C capacity, d head size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, G: int, C: int, d: int, rows: list[tuple[int, int, int]]) -> Arguments:
    """A random memory; `rows` are length, first entry to go, and how many."""
    generator = torch.Generator().manual_seed(G + C + d)
    wide = torch.promote_types(dtype, torch.float32)
    angle = torch.arange(C + 1)[:, None] * 10_000 ** -(torch.arange(d // 2) / max(1, d // 2)).double()
    memory = torch.randn(2, len(rows), G, C, d, generator=generator).to(dtype)
    numbers = torch.tensor(rows, dtype=torch.int32).view(-1, 3)
    return {
        "k_mem": memory[0],
        "v_mem": memory[1],
        "mem_len": numbers[:, 0].clone(),
        "first": numbers[:, 1].clone(),
        "count": numbers[:, 2].clone(),
        "cos": angle.cos().to(wide),
        "sin": angle.sin().to(wide),
    }


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 2, 9, 8, [(9, 1, 3), (7, 0, 2)])
    wide = torch.randn(2, 9, 2, 30, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    return {
        **arguments,
        "k_mem": wide[..., 3:11],
        "v_mem": wide[..., 15:23].clone(),
        "count": torch.stack([arguments["count"]] * 2, 1)[:, 0],
    }


CASES = [
    Case("ordinary", partial(make, G=2, C=12, d=16, rows=[(12, 1, 4), (9, 2, 4)])),
    Case("one at a time", partial(make, G=1, C=30, d=8, rows=[(30, 0, 1), (29, 28, 1)])),
    Case("nothing, everything", partial(make, G=2, C=10, d=8, rows=[(10, 3, 0), (10, 0, 10), (0, 0, 0), (6, 6, 0)])),
    Case("many waves", partial(make, G=2, C=90, d=80, rows=[(90, 5, 7), (70, 0, 33)])),
    Case("no row", partial(make, G=2, C=4, d=8, rows=[])),
    Case("strided", _strided),
    Case("half precision", partial(make, G=1, C=9, d=8, rows=[(9, 2, 3)]), (torch.float16,)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 2, 6, 8, [(6, 1, 2), (5, 0, 3)]), **changes}


def _pair(first: int, second: int) -> torch.Tensor:
    return torch.tensor([first, second], dtype=torch.int32)


REFUSED = [
    Refused("other values", lambda: _changed(v_mem=torch.ones(2, 2, 7, 8)), "v_mem: shape .* has C = 7 where k_mem has 6"),
    Refused("mixed", lambda: _changed(v_mem=torch.ones(2, 2, 6, 8).bfloat16()), "v_mem: dtype torch.bfloat16 differs from k_mem"),
    Refused("long words", lambda: _changed(first=torch.zeros(2, dtype=torch.int64)), "first: torch.int64 is not supported"),
    Refused("more than there is", lambda: _changed(count=_pair(2, 6)), "count: 6 entries from 0 of row 1 are not in its 5 entries"),
    Refused("longer than memory", lambda: _changed(mem_len=_pair(7, 5)), "count: 2 entries from 1 of row 0"),
    Refused("before the beginning", lambda: _changed(first=_pair(-1, 0)), "count: 2 entries from -1 of row 0"),
    Refused("short tables", lambda: _changed(cos=torch.ones(3, 4), sin=torch.ones(3, 4)), "count: 3 .* and 3 angles"),
    Refused("spread", lambda: _changed(v_mem=torch.ones(2, 2, 8, 6).transpose(2, 3)), "v_mem: strides .* spread the numbers of a head"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    rows = [(150, 1, 30), (120, 0, 120), (7, 2, 1)]
    return [Call("rope_evict_", tuple(make(dtype, 2, 150, 16, rows).values())) for dtype in (torch.float32, torch.bfloat16, torch.float64)]


def calls() -> list[Call]:
    """There are no others."""
    return []

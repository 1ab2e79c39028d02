"""Inputs that the op is tested with. B batch, G heads, T places, N entries, C positions, d head size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, B: int, G: int, T: int, N: int, d: int, *, absent: float = 0.0, by_token: bool = False) -> Arguments:
    """Random keys and values; `absent` is the share of entries without a place, `by_token` lays them out as [B, T, G, d]."""
    generator = torch.Generator().manual_seed(B + G + T + N + d)
    wide, C = torch.promote_types(dtype, torch.float32), N + 3
    angle = torch.arange(C)[:, None] * 10_000 ** -(torch.arange(d // 2) / max(1, d // 2)).double()

    def random() -> torch.Tensor:
        x = torch.randn((B, T, G, d) if by_token else (B, G, T, d), generator=generator).to(dtype)
        return (x.transpose(1, 2) if by_token else x).requires_grad_()

    src = torch.randint(0, max(1, T), (B, N), generator=generator)
    return {
        "k": random(),
        "v": random(),
        "src": src.masked_fill(torch.rand(B, N, generator=generator) < absent, -1),
        "pos": torch.randint(0, C, (B, N), generator=generator),
        "cos": (1.5 * angle.cos()).to(wide),
        "sin": (1.5 * angle.sin()).to(wide),
    }


def strided(dtype: torch.dtype) -> Arguments:
    """Numbers that do not lie side by side."""
    arguments = make(dtype, 2, 3, 9, 6, 16, absent=0.3)
    wide = torch.randn(2, 3, 18, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {
        **arguments,
        "k": wide[:, :, ::2, 3:19].detach().requires_grad_(),
        "v": wide[:, :, 1::2, ::2][..., :16].detach().requires_grad_(),
        "src": arguments["src"].T.contiguous().T,
        "cos": arguments["cos"].T.contiguous().T,
    }


CASES = [
    Case("ordinary", partial(make, B=2, G=2, T=12, N=9, d=16)),
    Case("token by token", partial(make, B=2, G=3, T=20, N=33, d=32, by_token=True)),
    Case("absent entries", partial(make, B=3, G=1, T=7, N=20, d=8, absent=0.4)),
    Case("every entry absent", partial(make, B=1, G=2, T=4, N=5, d=8, absent=1.1)),
    Case("one of each", partial(make, B=1, G=1, T=1, N=1, d=2)),
    Case("many blocks", partial(make, B=2, G=2, T=70, N=90, d=64)),
    Case("no entries", partial(make, B=2, G=2, T=4, N=0, d=8)),
    Case("no row", partial(make, B=0, G=2, T=4, N=3, d=8)),
    Case("strided", strided),
    Case("half precision", partial(make, B=1, G=2, T=5, N=7, d=8, absent=0.2), (torch.float16,)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 2, 2, 4, 3, 8), **changes}


REFUSED = [
    Refused("three dimensions", lambda: _changed(k=torch.ones(2, 4, 8)), "k: shape .* has 3 dimensions; pass 4: B, G, T, d"),
    Refused("other places", lambda: _changed(v=torch.ones(2, 2, 5, 8)), "v: shape .* has T = 5 where k has 4"),
    Refused("other batch", lambda: _changed(src=torch.zeros(3, 3, dtype=torch.int64)), "src: shape .* has B = 3 where k has 2"),
    Refused("short words", lambda: _changed(pos=torch.zeros(2, 3, dtype=torch.int32)), "pos: torch.int32 is not supported"),
    Refused("mixed", lambda: _changed(v=torch.ones(2, 2, 4, 8).bfloat16()), "v: dtype torch.bfloat16 differs from k"),
    Refused("narrow tables", lambda: _changed(cos=torch.ones(6, 4).bfloat16()), "cos: torch.bfloat16 is not supported; use float32"),
    Refused("whole heads", lambda: _changed(cos=torch.ones(6, 8), sin=torch.ones(6, 8)), "cos: .* does not hold 8 / 2 angles"),
    Refused("behind the end", lambda: _changed(src=torch.full((2, 3), 4)), "src: 4 is beyond the 4 places"),
    Refused("no such position", lambda: _changed(pos=torch.full((2, 3), 6)), "pos: 6 is beyond the 6 positions; give longer tables"),
    Refused("before the first position", lambda: _changed(pos=torch.full((2, 3), -1)), "pos: -1 is beyond"),
    Refused("integers", lambda: _changed(k=torch.ones(2, 2, 4, 8).int()), "k: torch.int32 is not supported"),
]


def _detached(dtype: torch.dtype) -> list[torch.Tensor]:
    return [value.detach() for value in make(dtype, 2, 2, 30, 150, 16, absent=0.1).values()]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        k, v, src, pos, cos, sin = _detached(dtype)
        places, order = src.sort(dim=1, stable=True)
        begin = torch.searchsorted(places, torch.arange(31).expand(2, -1).contiguous())
        gradient = torch.ones(2, 2, 150, 16, dtype=dtype)
        found += [
            Call("rope_gather_forward_", (k, v, src, pos, cos, sin, torch.zeros_like(gradient), torch.zeros_like(gradient))),
            Call("rope_gather_backward_", (gradient, gradient, order, begin, pos, cos, sin, torch.zeros_like(k), torch.zeros_like(v))),
        ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        k, v, src, pos, cos, sin = make(dtype, 2, 2, 5, 6, 8, absent=0.2).values()
        gradient = torch.ones(2, 2, 6, 8, dtype=dtype)
        found += [
            Call("rope_gather", (k, v, src, pos, cos, sin)),
            Call("rope_gather_backward", (gradient, gradient, src, pos, cos, sin, 5)),
        ]
    return found

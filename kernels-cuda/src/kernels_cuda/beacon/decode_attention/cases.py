"""Inputs that the op is tested with. B batch, H heads, G key heads, M and W places, d head size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kernels_cuda.beacon.decode_attention import binding
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype,
    H: int,
    G: int,
    M: int,
    W: int,
    d: int,
    lengths: Sequence[tuple[int, int]],
    *,
    learns: bool = False,
    size: float = 1.0,
) -> Arguments:
    """Random queries, keys and values; `lengths` are entries of memory and of the window by row. What lies behind them is NaN."""
    generator = torch.Generator().manual_seed(H + M + W + d)
    B = len(lengths)
    mem_len, raw_len = torch.tensor(lengths, dtype=torch.int32).view(-1, 2).unbind(1)

    def segment(places: int, length: torch.Tensor) -> torch.Tensor:
        x = torch.randn(B, G, places, d, generator=generator).to(dtype)
        return x.masked_fill((torch.arange(places) >= length[:, None])[:, None, :, None], torch.nan).requires_grad_(learns)

    return {
        "q": (size * torch.randn(B, H, 1, d, generator=generator)).to(dtype).requires_grad_(learns),
        "k_mem": segment(M, mem_len),
        "v_mem": segment(M, mem_len),
        "mem_len": mem_len.contiguous(),
        "k_raw": segment(W, raw_len),
        "v_raw": segment(W, raw_len),
        "raw_len": raw_len.contiguous(),
        "scale": d**-0.5,
    }


def _strided(dtype: torch.dtype) -> Arguments:
    """A memory with room behind it, a window token by token, and numbers that do not lie side by side."""
    given = make(dtype, 6, 2, 20, 9, 16, [(20, 4), (11, 9)])
    wide = torch.randn(2, 9, 2, 40, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    room = torch.randn(2, 3, 30, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {
        **given,
        "q": torch.randn(6, 2, 16, 1, generator=torch.Generator().manual_seed(2)).to(dtype).permute(1, 0, 3, 2),
        "k_mem": room[:, 1:, 3:23, 5:21],
        "v_mem": room[:, :2, :20, ::2],
        "k_raw": wide[..., 3:19],
        "v_raw": wide[..., 20:36],
    }


CASES = [
    Case("ordinary", partial(make, H=4, G=2, M=40, W=20, d=32, lengths=[(40, 20), (40, 20)])),
    Case("ragged", partial(make, H=3, G=1, M=37, W=11, d=16, lengths=[(37, 1), (0, 11), (5, 0), (0, 0), (16, 3)])),
    Case("many splits", partial(make, H=4, G=4, M=600, W=300, d=8, lengths=[(600, 300), (257, 0)])),
    Case("seven heads share a key, odd size", partial(make, H=7, G=1, M=50, W=5, d=72, lengths=[(50, 5)])),
    Case("one of each", partial(make, H=1, G=1, M=1, W=1, d=2, lengths=[(1, 1)])),
    Case("no memory", partial(make, H=4, G=2, M=0, W=7, d=8, lengths=[(0, 7), (0, 2)])),
    Case("no key at all", partial(make, H=4, G=2, M=0, W=0, d=8, lengths=[(0, 0)])),
    Case("no row", partial(make, H=4, G=2, M=3, W=2, d=8, lengths=[])),
    Case("large scores", partial(make, H=2, G=1, M=60, W=10, d=32, lengths=[(60, 10)], size=100.0)),
    Case("strided", _strided),
    Case("gradients", partial(make, H=4, G=2, M=9, W=5, d=8, lengths=[(9, 5), (3, 0), (2, 1)], learns=True)),
    Case("half precision", partial(make, H=2, G=1, M=9, W=3, d=8, lengths=[(7, 3)]), (torch.float16,)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 2, 6, 3, 8, [(6, 3), (5, 1)]), **changes}


def _pair(first: int, second: int) -> torch.Tensor:
    return torch.tensor([first, second], dtype=torch.int32)


REFUSED = [
    Refused("two tokens", lambda: _changed(q=torch.ones(2, 4, 2, 8)), "q: shape .* holds 2 tokens; give one"),
    Refused("uneven heads", lambda: _changed(q=torch.ones(2, 5, 1, 8)), "q: 5 heads do not share 2 key heads evenly"),
    Refused("other values", lambda: _changed(v_mem=torch.ones(2, 2, 7, 8)), "v_mem: shape .* has M = 7 where k_mem has 6"),
    Refused("other groups", lambda: _changed(k_raw=torch.ones(2, 4, 3, 8)), "k_raw: shape .* has G = 4 where k_mem has 2"),
    Refused("mixed", lambda: _changed(v_raw=torch.ones(2, 2, 3, 8).bfloat16()), "v_raw: dtype torch.bfloat16 differs from q"),
    Refused("long words", lambda: _changed(raw_len=torch.zeros(2, dtype=torch.int64)), "raw_len: torch.int64 is not supported"),
    Refused("longer than memory", lambda: _changed(mem_len=_pair(7, 5)), "mem_len: 7 is not in the 6 places"),
    Refused("below nothing", lambda: _changed(raw_len=_pair(2, -1)), "raw_len: -1 is not in the 3 places"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = make(dtype, 6, 2, 300, 70, 16, [(300, 70), (20, 0)])
        # what lies behind a row is never read, but must not be mistaken for a guard band
        values = [x.nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given.values()]
        grouped = values[0].view(2, 2, 3, 16)
        made = [x.zero_() for x in binding.buffers(grouped, values[1], values[4])]
        found.append(Call("decode_attention_", (grouped, *values[1:], *made)))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

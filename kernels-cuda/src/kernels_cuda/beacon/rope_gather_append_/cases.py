"""Inputs that the op is tested with. B batch, G heads, T places, N entries, d head size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.beacon.rope_gather import cases as gather
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, B: int, G: int, T: int, N: int, d: int, *, skipped: float = 0.0, held: int = 3) -> Arguments:
    """A memory of up to `held` entries a row with room for N more; `skipped` is the share of entries that are not written."""
    return _with_memory(gather.make(dtype, B, G, T, N, d, absent=skipped), held)


def _with_memory(given: Arguments, held: int) -> Arguments:
    (B, G, _, d), N = given["k"].shape, given["src"].shape[1]
    generator = torch.Generator().manual_seed(N)
    memory = torch.randn(2, B, G, N + held, d, generator=generator).to(given["k"].dtype)
    return {
        "k": given["k"].detach(),
        "v": given["v"].detach(),
        "src": given["src"],
        "cos": given["cos"],
        "sin": given["sin"],
        "k_mem": memory[0],
        "v_mem": memory[1],
        "mem_len": torch.randint(0, held + 1, (B,), generator=generator, dtype=torch.int32),
    }


def _strided(dtype: torch.dtype) -> Arguments:
    memory = torch.randn(2, 3, 18, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {**_with_memory(gather.strided(dtype), 3), "k_mem": memory[:, :, 2:11, 20:36], "v_mem": memory[:, :, 9:, :16]}


CASES = [
    Case("ordinary", partial(make, B=2, G=2, T=12, N=9, d=16)),
    Case("skipped entries", partial(make, B=3, G=1, T=7, N=20, d=8, skipped=0.4)),
    Case("every entry skipped", partial(make, B=1, G=2, T=4, N=5, d=8, skipped=1.1)),
    Case("empty memory", partial(make, B=2, G=3, T=20, N=33, d=32, held=0)),
    Case("many blocks", partial(make, B=2, G=2, T=70, N=90, d=64)),
    Case("no entries", partial(make, B=2, G=2, T=4, N=0, d=8)),
    Case("no row", partial(make, B=0, G=2, T=4, N=3, d=8)),
    Case("strided", _strided),
    Case("half precision", partial(make, B=1, G=2, T=5, N=7, d=8, skipped=0.2), (torch.float16,)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 2, 2, 4, 3, 8), **changes}


REFUSED = [
    Refused("other heads", lambda: _changed(k_mem=torch.ones(2, 3, 6, 8)), "k_mem: shape .* has G = 3 where k has 2"),
    Refused("other capacity", lambda: _changed(v_mem=torch.ones(2, 2, 7, 8)), "v_mem: shape .* has C = 7 where k_mem has 6"),
    Refused("mixed", lambda: _changed(v_mem=torch.ones(2, 2, 6, 8).bfloat16()), "v_mem: dtype torch.bfloat16 differs from k"),
    Refused("long words", lambda: _changed(mem_len=torch.zeros(2, dtype=torch.int64)), "mem_len: torch.int64 is not supported"),
    Refused("behind the end", lambda: _changed(src=torch.full((2, 3), 4)), "src: 4 is beyond the 4 places"),
    Refused("full memory", lambda: _changed(mem_len=torch.tensor([0, 4], dtype=torch.int32)), "mem_len: 7 entries do not fit into the 6"),
    Refused("spread", lambda: _changed(k_mem=torch.ones(2, 2, 8, 6).transpose(2, 3)), "k_mem: strides .* spread the numbers of a head"),
    Refused("narrow tables", lambda: _changed(sin=torch.ones(6, 4).bfloat16()), "sin: torch.bfloat16 is not supported; use float32"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled function."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = make(dtype, 2, 2, 30, 150, 16, skipped=0.1)
        kept = given["src"] >= 0
        place = torch.where(kept, given["mem_len"][:, None] + kept.cumsum(1) - 1, -1)
        names = ("cos", "sin", "k_mem", "v_mem")
        found.append(Call("rope_gather_append_", (given["k"], given["v"], given["src"], place, *(given[name] for name in names))))
    return found


def calls() -> list[Call]:
    """There are no others."""
    return []

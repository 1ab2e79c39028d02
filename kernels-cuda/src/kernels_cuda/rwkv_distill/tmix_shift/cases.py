"""Inputs that the op is tested with. B batch, T time, D width, M mixes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.rwkv_distill.tmix_shift import reference
from kernels_cuda.slices import num_slices
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype,
    batch: int,
    time: int,
    width: int,
    *,
    mixes: int = 6,
    prev: bool = False,
    segments: float | None = None,
    padding: float = 0.0,
    mus_dtype: torch.dtype | None = None,
) -> Arguments:
    """Random arguments; a token opens a segment with probability `segments`."""
    generator = torch.Generator().manual_seed(batch + time + width)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    seg = None
    if segments is not None:
        seg = (torch.rand(batch, time, generator=generator) < segments).cumsum(1)
        seg[torch.rand(batch, time, generator=generator) < padding] = -1
    mus = torch.rand(mixes, width, generator=generator)
    return {
        "h": random(batch, time, width),
        "prev": random(batch, width) if prev else None,
        "seg": seg,
        "mus": mus.to(torch.promote_types(dtype, mus_dtype or dtype)).requires_grad_(),
    }


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 2, 5, 33, prev=True, segments=0.3, padding=0.2)
    for name in ("h", "prev", "mus"):
        arguments[name] = arguments[name].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    return {**arguments, "seg": arguments["seg"].int()}


CASES = [
    Case("ordinary", partial(make, batch=2, time=7, width=40)),
    Case("with a state", partial(make, batch=2, time=7, width=40, prev=True)),
    Case("segments", partial(make, batch=2, time=20, width=33, segments=0.3, prev=True)),
    Case("segments and padding", partial(make, batch=3, time=20, width=33, segments=0.2, padding=0.4, prev=True)),
    Case("padding without a state", partial(make, batch=2, time=9, width=17, segments=0.0, padding=0.5)),
    Case("all padding", partial(make, batch=2, time=3, width=8, segments=0.0, padding=1.1, prev=True)),
    Case("one of each", partial(make, batch=1, time=1, width=1, mixes=1, prev=True)),
    Case("eight mixes", partial(make, batch=1, time=3, width=16, mixes=8)),
    Case("many slices", partial(make, batch=3, time=200, width=5, mixes=2, segments=0.05, prev=True)),
    Case("no tokens", partial(make, batch=2, time=0, width=4)),
    Case("strided", _strided),
    Case("parameters in float32", partial(make, batch=2, time=7, width=40, mus_dtype=torch.float32), (torch.bfloat16,)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 2, 3, 8, prev=True, segments=0.3), **changes}


REFUSED = [
    Refused("two dimensions", lambda: _changed(h=torch.ones(3, 8)), "h: shape .* has 2 dimensions; pass 3: B, T, D"),
    Refused("other width", lambda: _changed(mus=torch.ones(6, 7)), "mus: shape .* has D = 7 where h has 8"),
    Refused("other batch", lambda: _changed(prev=torch.ones(1, 8)), "prev: shape .* has B = 1 where h has 2"),
    Refused("half", lambda: _changed(h=torch.ones(2, 3, 8).half()), "h: torch.float16 is not supported; use float32 or bfloat16"),
    Refused("mixed", lambda: _changed(prev=torch.ones(2, 8).bfloat16()), "prev: dtype torch.bfloat16 differs from h"),
    Refused("narrow parameters", lambda: _changed(mus=torch.ones(6, 8).bfloat16()), "mus: torch.bfloat16 is not supported; use float32"),
    Refused("float segments", lambda: _changed(seg=torch.ones(2, 3)), "seg: torch.float32 is not supported; use int64 or int32"),
    Refused("too many mixes", lambda: _changed(mus=torch.ones(9, 8)), "mus: shape .* has too many or no mixes; pass 1 to 8"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make(dtype, 3, 150, 37, segments=0.1, padding=0.2, prev=True)
        h, prev, mus = (arguments[name].detach() for name in ("h", "prev", "mus"))
        source = reference.sources(arguments["seg"])
        given, successor = source.int(), reference.successors(source).int()
        out, partial_sums = h.new_zeros(6, *h.shape), torch.zeros(num_slices(450), 6, 37)
        found += [
            Call("tmix_shift_forward_", (h, prev, given, mus.float(), out)),
            Call("tmix_shift_forward_", (h, None, None, mus.float(), out)),
            Call(
                "tmix_shift_backward_",
                (h, prev, given, successor, mus.float(), torch.ones_like(out), torch.zeros_like(h), torch.zeros_like(prev), partial_sums),
            ),
            Call(
                "tmix_shift_backward_",
                (h, None, None, None, mus.float(), torch.ones_like(out), torch.zeros_like(h), h.new_zeros(0), partial_sums),
            ),
        ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    found: list[Call] = []
    for dtype in (torch.float32, torch.bfloat16):
        h, prev, _, mus = make(dtype, 2, 5, 16, prev=True).values()
        mus = mus.detach().float().requires_grad_()
        found += [
            Call("tmix_shift", (h, prev, None, None, mus)),
            Call("tmix_shift_backward", (h.detach(), None, None, None, mus.detach(), torch.ones(6, *h.shape, dtype=dtype))),
        ]
    return found

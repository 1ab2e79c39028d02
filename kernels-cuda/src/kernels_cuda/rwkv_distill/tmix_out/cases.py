"""Inputs that the op is tested with. B batch, T time, H heads, N head size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.slices import num_slices
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype,
    batch: int,
    time: int,
    heads: int,
    size: int,
    *,
    norm: bool = True,
    bonus: bool = True,
    gate: bool = True,
    scale: float = 1.0,
    flat: bool = False,
    parameter_dtype: torch.dtype | None = None,
) -> Arguments:
    """Random arguments as a mixer makes them; y has a mean, and a standard deviation of about `scale`."""
    generator = torch.Generator().manual_seed(batch + time + heads + size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape, of_head = (batch, time, heads, size), (heads * size,) if flat else (heads, size)
    kind = torch.promote_types(dtype, parameter_dtype or dtype)

    def leaf(value: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
        return value.to(dtype).requires_grad_()

    return {
        "y": leaf((random(*shape) + 0.5) * scale),
        **{name: leaf(random(*shape)) if bonus else None for name in "rkv"},
        "r_k": leaf(random(*of_head) * 0.3, kind) if bonus else None,
        "gn_w": leaf(1 + 0.3 * random(*of_head), kind) if norm else None,
        "gn_b": leaf(0.3 * random(*of_head), kind) if norm else None,
        "gate": leaf(torch.sigmoid(random(*shape)).flatten(2) if flat else torch.sigmoid(random(*shape))) if gate else None,
        "eps": size * 1e-5,
    }


def _strided(dtype: torch.dtype) -> Arguments:
    """[B, H, T, N] in memory, as attention has it."""
    arguments = make(dtype, 2, 3, 2, 32)
    for name in ("y", "r", "k", "v", "gate"):
        arguments[name] = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    return arguments


CASES = [
    Case("ordinary", partial(make, batch=2, time=5, heads=2, size=32)),
    Case("size 64", partial(make, batch=1, time=5, heads=2, size=64)),
    Case("size 128", partial(make, batch=1, time=2, heads=2, size=128)),
    Case("odd size", partial(make, batch=1, time=3, heads=2, size=37)),
    Case("flat parameters and gate", partial(make, batch=2, time=3, heads=2, size=32, flat=True)),
    Case("norm alone", partial(make, batch=2, time=3, heads=2, size=32, bonus=False, gate=False)),
    Case("bonus alone", partial(make, batch=2, time=3, heads=2, size=32, norm=False, gate=False)),
    Case("gate alone", partial(make, batch=2, time=3, heads=2, size=32, norm=False, bonus=False)),
    Case("nothing", partial(make, batch=2, time=3, heads=2, size=32, norm=False, bonus=False, gate=False)),
    Case("tiny outputs", partial(make, batch=2, time=3, heads=2, size=32, scale=1e-3)),
    Case("large outputs", partial(make, batch=2, time=3, heads=2, size=32, scale=1e3)),
    Case("one of each", partial(make, batch=1, time=1, heads=1, size=1, norm=False)),
    Case("no tokens", partial(make, batch=2, time=0, heads=1, size=32)),
    Case("many slices", partial(make, batch=3, time=200, heads=1, size=4)),
    Case("strided", _strided),
    Case("parameters in float32", partial(make, batch=2, time=5, heads=2, size=32, parameter_dtype=torch.float32), (torch.bfloat16,)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 1, 2, 2, 8), **changes}


REFUSED = [
    Refused("three dimensions", lambda: _changed(y=torch.ones(2, 2, 8)), "y: shape .* has 3 dimensions; pass 4: B, T, H, N"),
    Refused("other time", lambda: _changed(k=torch.ones(1, 3, 2, 8)), "k: shape .* has T = 3 where y has 2"),
    Refused("half", lambda: _changed(y=torch.ones(1, 2, 2, 8).half()), "y: torch.float16 is not supported; use float32 or bfloat16"),
    Refused("mixed", lambda: _changed(v=torch.ones(1, 2, 2, 8).bfloat16()), "v: dtype torch.bfloat16 differs from y"),
    Refused("no v", lambda: _changed(v=None), "v: None is missing where r is given; pass all of r, k, v, r_k, or none"),
    Refused("no bias", lambda: _changed(gn_b=None), "gn_b: None is missing where gn_w is given"),
    Refused("other parameters", lambda: _changed(gn_w=torch.ones(2, 7)), r"gn_w: shape \(2, 7\) does not fit y .*; pass \(2, 8\)"),
    Refused("narrow parameters", lambda: _changed(r_k=torch.ones(2, 8).bfloat16()), "r_k: torch.bfloat16 is not supported"),
    Refused("other gate", lambda: _changed(gate=torch.ones(1, 2, 8)), "gate: shape .* does not fit y .*; make it like y"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for dtype, size in ((torch.float32, 32), (torch.bfloat16, 64), (torch.float32, 37)):
        arguments = make(dtype, 1, 300, 2, size)
        tensors = [arguments[name].detach()[0].contiguous() for name in "yrkv"]
        parameters = [arguments[name].detach().float() for name in ("r_k", "gn_w", "gn_b")]
        gate = arguments["gate"].detach()[0].contiguous()
        outputs, partial_sums = [torch.zeros_like(gate) for _ in range(5)], torch.zeros(num_slices(300), 3, 2, size)
        empty, nothing = gate.new_zeros(0), (None,) * 7
        found += [
            Call("tmix_out_forward_", (*tensors, *parameters, gate, 1e-3, torch.zeros_like(gate))),
            Call("tmix_out_forward_", (tensors[0], *nothing, 1e-3, torch.zeros_like(gate))),
            Call("tmix_out_backward_", (*tensors, *parameters, gate, 1e-3, gate, *outputs, partial_sums)),
            Call("tmix_out_backward_", (tensors[0], *nothing, 1e-3, gate, outputs[0], empty, empty, empty, empty, partial_sums)),
        ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    found: list[Call] = []
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make(dtype, 1, 5, 2, 32)
        tensors = [arguments[name].detach()[0].requires_grad_() for name in "yrkv"]
        parameters = [arguments[name].detach().float().requires_grad_() for name in ("r_k", "gn_w", "gn_b")]
        gate = arguments["gate"].detach()[0].requires_grad_()
        plain = [value.detach() for value in (*tensors, *parameters, gate)]
        found += [
            Call("tmix_out", (*tensors, *parameters, gate, 1e-3)),
            Call("tmix_out_backward", (*plain, 1e-3, plain[0])),
        ]
    return found

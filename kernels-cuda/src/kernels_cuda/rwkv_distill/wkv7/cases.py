"""Inputs that the op is tested with. B batch, T time, H heads, N head size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels_cuda.rwkv_distill.wkv7.binding import CHUNK_TOKENS
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype,
    time: int,
    *,
    batch: int = 1,
    heads: int = 1,
    size: int = 32,
    logit: float | None = None,
    state: bool = False,
    ignored: float = 0.0,
    starts: tuple[int, ...] | None = None,
    final: bool = False,
) -> Arguments:
    """Random arguments as a mixer makes them; decay logits are spread around 0 or lie near `logit`."""
    generator = torch.Generator().manual_seed(time + size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape = batch, time, heads, size
    direction, rate = F.normalize(random(*shape), dim=-1), torch.sigmoid(random(*shape))
    w = 2 * random(*shape) if logit is None else logit + 0.1 * random(*shape)
    inputs = {"r": random(*shape), "w": w, "k": random(*shape) * size**-0.5, "v": random(*shape), "a": -direction, "b": direction * rate}
    wide = torch.promote_types(dtype, torch.float32)
    states = batch if starts is None else len(starts) - 1
    initial = random(states, heads, size, size).to(wide).requires_grad_() if state else None
    return {
        **{name: value.to(dtype).requires_grad_() for name, value in inputs.items()},
        "initial_state": initial,
        "mask": torch.rand(batch, time, generator=generator) >= ignored if ignored else None,
        "cu_seqlens": None if starts is None else torch.tensor(starts, dtype=torch.int32),
        "output_final_state": final,
    }


def _strided(dtype: torch.dtype) -> Arguments:
    """[B, H, T, N] in memory, as attention has it."""
    arguments = make(dtype, 5, heads=2)
    for name in "rwkvab":
        arguments[name] = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    return arguments


def _some_gradients(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 5, state=True)
    for name in ("w", "a", "initial_state"):
        arguments[name] = arguments[name].detach()
    return arguments


CASES = [
    Case("ordinary", partial(make, time=18, batch=2, heads=2)),
    Case("one token", partial(make, time=1, state=True, final=True)),
    Case("two tokens", partial(make, time=2, final=True)),
    Case("a whole chunk", partial(make, time=32, state=True, final=True)),
    Case("size 64", partial(make, time=17, size=64, state=True, final=True)),
    Case("size 128", partial(make, time=3, size=128, state=True, final=True)),
    Case("masked", partial(make, time=60, batch=2, state=True, ignored=0.4, final=True)),
    Case("all masked", partial(make, time=2, state=True, ignored=1.1, final=True)),
    Case("packed", partial(make, time=73, starts=(0, 3, 3, 37, 72, 73), state=True, final=True)),
    Case("packed and masked", partial(make, time=20, starts=(0, 3, 20), ignored=0.4)),
    Case("fastest decay", partial(make, time=33, logit=8.0, state=True, final=True)),
    Case("slow decay", partial(make, time=33, logit=-8.0, state=True, final=True)),
    Case("saturated", partial(make, time=9, logit=-200.0, state=True, final=True)),
    Case("strided", _strided),
    Case("some gradients", _some_gradients),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 3), **changes}


_four = torch.ones(1, 3, 1, 32)

REFUSED = [
    Refused("three dimensions", lambda: _changed(r=torch.ones(3, 1, 32)), "r: shape .* has 3 dimensions; pass 4: B, T, H, N"),
    Refused("other time", lambda: _changed(k=torch.ones(1, 4, 1, 32)), "k: shape .* has T = 4 where r has 3"),
    Refused("half", lambda: _changed(r=_four.half()), "r: torch.float16 is not supported; use float32 or bfloat16"),
    Refused("mixed", lambda: _changed(v=_four.bfloat16()), "v: dtype torch.bfloat16 differs from r"),
    Refused("size", lambda: {name: torch.ones(1, 1, 1, 48) for name in "rwkvab"}, "r: head size 48 is not supported; use 32 or 64 or 128"),
    Refused("no tokens", lambda: {name: torch.ones(1, 0, 1, 32) for name in "rwkvab"}, "r: shape .* has no tokens"),
    Refused("other device", lambda: _changed(v=_four.to("meta")), "v: device meta differs from r"),
    Refused("state shape", lambda: _changed(initial_state=torch.ones(1, 2, 32, 32)), r"initial_state: shape .*; pass \(1, 1, 32, 32\)"),
    Refused(
        "state dtype",
        lambda: _changed(initial_state=torch.ones(1, 1, 32, 32).bfloat16()),
        "initial_state: torch.bfloat16 is not supported; use float32",
    ),
    Refused("float mask", lambda: _changed(mask=torch.ones(1, 3)), "mask: torch.float32 is not supported; use bool or int64"),
    Refused("mask shape", lambda: _changed(mask=torch.ones(1, 4).bool()), "mask: shape .* has T = 4 where r has 3"),
    Refused("float starts", lambda: _changed(cu_seqlens=torch.ones(2)), "cu_seqlens: torch.float32 is not supported; use int32"),
    Refused("no sequence", lambda: _changed(cu_seqlens=torch.tensor([0])), "cu_seqlens: length 1 names no sequence"),
    Refused("short starts", lambda: _changed(cu_seqlens=torch.tensor([0, 2])), r"cu_seqlens: \[0, 2\] does not divide 3 tokens"),
    Refused("falling starts", lambda: _changed(cu_seqlens=torch.tensor([0, 2, 1, 3])), "cu_seqlens: .* does not divide 3 tokens"),
    Refused(
        "packed batch",
        lambda: {**{name: torch.ones(2, 3, 1, 32) for name in "rwkvab"}, "cu_seqlens": torch.tensor([0, 3])},
        "cu_seqlens: given with a batch of 2; pack the sequences into one row",
    ),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for dtype, size in ((torch.float32, 32), (torch.bfloat16, 64)):
        arguments = make(dtype, 19, batch=2, heads=2, size=size, state=True, ignored=0.2)
        inputs = [arguments[name].detach() for name in "rwkvab"]
        initial, mask = arguments["initial_state"].detach(), arguments["mask"]
        y, final = torch.zeros_like(inputs[0]), torch.zeros_like(initial)
        kept, removed = torch.zeros(2 * 19 // CHUNK_TOKENS + 2, 2, size, size), torch.zeros(inputs[0].shape)
        gradients = [torch.zeros_like(value) for value in inputs]
        history = torch.zeros(2, 2, CHUNK_TOKENS + 1, size, size)
        found += [
            Call("wkv7_forward_", (*inputs, initial, mask, None, y, final, kept, removed)),
            Call(
                "wkv7_backward_", (*inputs, mask, None, kept, removed, inputs[0], initial, history, *gradients, torch.zeros_like(initial))
            ),
            Call("wkv7_step_", (*(value[:, 0].contiguous() for value in inputs), initial, y[:, 0].contiguous())),
        ]
    packed = [value.detach()[:1].contiguous() for value in inputs]
    starts = torch.tensor([0, 17, 17, 19], dtype=torch.int32)
    kept, empty = torch.zeros(19 // CHUNK_TOKENS + 3, 2, size, size), torch.zeros(0)
    return [*found, Call("wkv7_forward_", (*packed, None, None, starts, y[:1].contiguous(), empty, kept, removed[:1].contiguous()))]


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    found: list[Call] = []
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make(dtype, 19, batch=2, state=True, ignored=0.2)
        inputs = [arguments[name] for name in "rwkvab"]
        plain = [value.detach() for value in inputs]
        kept, removed = torch.randn(2 * 19 // CHUNK_TOKENS + 2, 1, 32, 32), torch.randn(2, 19, 1, 32)
        found += [
            Call("wkv7", (*inputs, arguments["initial_state"], arguments["mask"], None, True, True)),
            Call("wkv7", (*plain, None, None, None, False, False)),
            Call("wkv7_backward", (*plain, None, None, kept, removed, plain[0], None, True)),
        ]
    return found

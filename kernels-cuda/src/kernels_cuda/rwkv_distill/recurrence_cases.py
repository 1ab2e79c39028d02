"""Inputs that every recurrence is tested with. B batch, T time, H heads, N head size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kernels_cuda.rwkv_distill.recurrence import CHUNK_TOKENS
from kernels_cuda.testing import Arguments, Case, Refused

Random = Callable[..., torch.Tensor]


def make(
    inputs: Callable[[Random, tuple[int, ...], float | None], dict[str, torch.Tensor]],
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
    """Random arguments; `inputs(random, shape, logit)` makes those that differ, with decay logits spread or near `logit`."""
    generator = torch.Generator().manual_seed(time + size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    made = inputs(random, (batch, time, heads, size), logit)
    wide = torch.promote_types(dtype, torch.float32)
    states = batch if starts is None else len(starts) - 1
    initial = random(states, heads, size, size).to(wide).requires_grad_() if state else None
    return {
        **{name: value.to(dtype).requires_grad_() for name, value in made.items()},
        "initial_state": initial,
        "mask": torch.rand(batch, time, generator=generator) >= ignored if ignored else None,
        "cu_seqlens": None if starts is None else torch.tensor(starts, dtype=torch.int32),
        "output_final_state": final,
    }


def cases(make: Callable[..., Arguments], tokens: str, constant: tuple[str, ...]) -> list[Case]:
    """`tokens` names the inputs [B, T, H, N], `constant` those without a gradient in one case."""

    def strided(dtype: torch.dtype) -> Arguments:
        """[B, H, T, N] in memory, as attention has it."""
        arguments = make(dtype, 5, heads=2)
        for name in tokens:
            arguments[name] = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        return arguments

    def some_gradients(dtype: torch.dtype) -> Arguments:
        arguments = make(dtype, 5, state=True)
        return {name: value.detach() if name in constant else value for name, value in arguments.items()}

    return [
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
        Case("fast decay", partial(make, time=33, logit=8.0, state=True, final=True)),
        Case("slow decay", partial(make, time=33, logit=-8.0, state=True, final=True)),
        Case("saturated", partial(make, time=9, logit=-200.0, state=True, final=True)),
        Case("strided", strided),
        Case("some gradients", some_gradients),
    ]


def refused(make: Callable[..., Arguments], tokens: str, extra: Callable[[int], Arguments]) -> list[Refused]:
    """`extra(size)` gives the inputs that are not [B, T, H, N]."""
    four = torch.ones(1, 3, 1, 32)

    def changed(**changes: Any) -> Arguments:
        return {**make(torch.float32, 3), **changes}

    def ones(*shape: int) -> Arguments:
        return {**{name: torch.ones(*shape) for name in tokens}, **extra(shape[-1])}

    return [
        Refused("three dimensions", lambda: changed(r=torch.ones(3, 1, 32)), "r: shape .* has 3 dimensions; pass 4: B, T, H, N"),
        Refused("other time", lambda: changed(k=torch.ones(1, 4, 1, 32)), "k: shape .* has T = 4 where r has 3"),
        Refused("half", lambda: changed(r=four.half()), "r: torch.float16 is not supported; use float32 or bfloat16"),
        Refused("mixed", lambda: changed(v=four.bfloat16()), "v: dtype torch.bfloat16 differs from r"),
        Refused("size", lambda: ones(1, 1, 1, 48), "r: head size 48 is not supported; use 32 or 64 or 128"),
        Refused("no tokens", lambda: ones(1, 0, 1, 32), "r: shape .* has no tokens"),
        Refused("other device", lambda: changed(v=four.to("meta")), "v: device meta differs from r"),
        Refused("state shape", lambda: changed(initial_state=torch.ones(1, 2, 32, 32)), r"initial_state: shape .*; pass \(1, 1, 32, 32\)"),
        Refused(
            "state dtype",
            lambda: changed(initial_state=torch.ones(1, 1, 32, 32).bfloat16()),
            "initial_state: torch.bfloat16 is not supported; use float32",
        ),
        Refused("float mask", lambda: changed(mask=torch.ones(1, 3)), "mask: torch.float32 is not supported; use bool or int64"),
        Refused("mask shape", lambda: changed(mask=torch.ones(1, 4).bool()), "mask: shape .* has T = 4 where r has 3"),
        Refused("float starts", lambda: changed(cu_seqlens=torch.ones(2)), "cu_seqlens: torch.float32 is not supported; use int32"),
        Refused("no sequence", lambda: changed(cu_seqlens=torch.tensor([0])), "cu_seqlens: length 1 names no sequence"),
        Refused("short starts", lambda: changed(cu_seqlens=torch.tensor([0, 2])), r"cu_seqlens: \[0, 2\] does not divide 3 tokens"),
        Refused("falling starts", lambda: changed(cu_seqlens=torch.tensor([0, 2, 1, 3])), "cu_seqlens: .* does not divide 3 tokens"),
        Refused(
            "packed batch",
            lambda: {**ones(2, 3, 1, 32), "cu_seqlens": torch.tensor([0, 3])},
            "cu_seqlens: given with a batch of 2; pack the sequences into one row",
        ),
    ]


def kept_of(batch: int, time: int, heads: int, size: int, sequences: int, tokens: int = CHUNK_TOKENS) -> torch.Tensor:
    """States kept for backward, for calls of compiled functions."""
    return torch.zeros(batch * time // tokens + sequences, heads, size, size)

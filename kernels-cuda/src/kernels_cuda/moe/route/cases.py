"""Inputs that the op is tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.moe.gates import SIZES, rows
from kernels_cuda.slices import num_slices
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, tokens: int, experts: int, k: int, *, masked: bool = False, **more: Any) -> Arguments:
    """Logits to differentiate; `masked`: every third token counts nothing."""
    softmax = more.pop("softmax", True)
    mask = torch.arange(tokens) % 3 != 0 if masked else None
    return {"logits_TN": rows(dtype, tokens, experts, **more).requires_grad_(), "k": k, "mask_T": mask, "softmax": softmax}


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 12, 16, 4)
    return {**arguments, "logits_TN": arguments["logits_TN"].detach().t().contiguous().t().requires_grad_()}


def _losers_tie(dtype: torch.dtype) -> Arguments:
    logits = torch.zeros(9, 8, dtype=dtype)
    logits[:, 5], logits[:, 2] = 2.0, 1.0
    return {"logits_TN": logits.requires_grad_(), "k": 2}


_FLOAT32 = (torch.float32,)
CASES = [
    *(Case(name, partial(make, **sizes), _FLOAT32) for name, sizes in SIZES.items()),
    Case("one of each", partial(make, tokens=1, experts=1, k=1), _FLOAT32),
    Case("all experts", partial(make, tokens=9, experts=4, k=4), _FLOAT32),
    Case("masked", partial(make, tokens=40, experts=8, k=2, masked=True), _FLOAT32),
    Case("logits as scores", partial(make, tokens=20, experts=8, k=3, softmax=False, masked=True), _FLOAT32),
    Case("large logits", partial(make, tokens=20, experts=8, k=3, scale=100), _FLOAT32),
    Case("strided", _strided, _FLOAT32),
    Case("losers tie", _losers_tie, _FLOAT32),
    # a sort is not differentiable where the first ones are equal
    Case("ties", partial(make, tokens=60, experts=16, k=4, distinct=3), _FLOAT32, differentiable=False),
    Case("all equal", partial(make, tokens=5, experts=70, k=8, distinct=1), _FLOAT32, differentiable=False),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 8, 2), **changes}


REFUSED = [
    Refused("three dimensions", lambda: _changed(logits_TN=torch.ones(2, 2, 8)), "logits: shape .* has 3 dimensions; pass 2: T, N"),
    Refused("half", lambda: _changed(logits_TN=torch.ones(4, 8).bfloat16()), "logits: torch.bfloat16 is not supported; use float32"),
    Refused("too many", lambda: _changed(k=9), "k: 9 does not fit 8 experts; use 1 to 8"),
    Refused("none", lambda: _changed(k=0), "k: 0 does not fit 8 experts; use 1 to 8"),
    Refused("other mask", lambda: _changed(mask_T=torch.ones(3)), "mask: shape .* has T = 3 where logits has 4"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for tokens, experts, k, masked in ((300, 16, 4, True), (3, 256, 16, False), (20, 50, 1, True)):
        logits, mask = rows(torch.float32, tokens, experts), torch.arange(tokens) % 3 != 0 if masked else None
        score, idx = torch.rand(tokens, k), torch.rand(tokens, experts).argsort(1)[:, :k].int().contiguous()
        sums = torch.zeros(num_slices(tokens), experts)
        found += [
            Call("route_forward_", (logits, mask, masked, torch.zeros_like(idx), torch.zeros_like(score), sums.int(), sums)),
            Call("route_backward_", (idx, score, mask, masked, torch.rand_like(score), torch.rand(experts), torch.zeros_like(logits))),
        ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    logits, mask = rows(torch.float32, 6, 8), torch.arange(6) % 2 == 0
    score, idx = torch.rand(6, 2), torch.rand(6, 8).argsort(1)[:, :2].int().contiguous()
    return [
        Call("route", (logits.clone().requires_grad_(), mask, 2, True)),
        Call("route", (logits.clone().requires_grad_(), None, 3, False)),
        Call("route_backward", (idx, score, mask, True, torch.rand(6, 2), torch.rand(8))),
    ]

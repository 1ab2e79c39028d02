"""Inputs that the op is tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.moe.gates import SIZES, rows
from kernels_cuda.slices import num_slices
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, tokens: int, experts: int, k: int, *, masked: bool = False, **more: Any) -> Arguments:
    """Logits, logits with noise of deviations about 0.7, and those, all to differentiate; `masked`: every third token counts nothing."""
    logits, drawn = rows(dtype, tokens, experts, **more), rows(dtype, tokens, experts, seed=1, **more)
    sigma = 0.5 + rows(dtype, tokens, experts, seed=2).sigmoid() / 2
    noisy = logits + drawn * sigma if "distinct" not in more else drawn
    found = {"logits_TN": logits, "noisy_TN": noisy, "sigma_TN": sigma}
    leaves = {name: value.detach().requires_grad_() for name, value in found.items()}
    return {**leaves, "k": k, "mask_T": torch.arange(tokens) % 3 != 0 if masked else None}


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 12, 16, 4)
    for name in ("logits_TN", "noisy_TN", "sigma_TN"):
        arguments[name] = arguments[name].detach().t().contiguous().t().requires_grad_()
    return arguments


def _far(dtype: torch.dtype) -> Arguments:
    """Chances of nothing and of one."""
    arguments = make(dtype, 6, 8, 2, scale=300.0)
    return {**arguments, "sigma_TN": torch.full((6, 8), 1e-3, dtype=dtype).requires_grad_()}


_FLOAT32 = (torch.float32,)
CASES = [
    *(Case(name, partial(make, **sizes), _FLOAT32) for name, sizes in SIZES.items()),
    Case("one token and two experts", partial(make, tokens=1, experts=2, k=1), _FLOAT32),
    Case("masked", partial(make, tokens=40, experts=40, k=2, masked=True), _FLOAT32),
    Case("strided", _strided, _FLOAT32),
    Case("far from the threshold", _far, _FLOAT32),
    # a threshold is not differentiable where several are equal
    Case("ties", partial(make, tokens=60, experts=16, k=4, distinct=3), _FLOAT32, differentiable=False),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 8, 2), **changes}


REFUSED = [
    Refused("other experts", lambda: _changed(sigma_TN=torch.ones(4, 7)), "sigma: shape .* has N = 7 where logits has 8"),
    Refused("half", lambda: _changed(noisy_TN=torch.ones(4, 8).half()), "noisy: torch.float16 is not supported; use float32"),
    Refused("mixed", lambda: _changed(noisy_TN=torch.ones(4, 8).double()), "noisy: dtype torch.float64 differs from logits"),
    Refused("all", lambda: _changed(k=8), "k: 8 does not fit 8 experts; use 1 to 7"),
    Refused("other mask", lambda: _changed(mask_T=torch.ones(3)), "mask: shape .* has T = 3 where logits has 4"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for tokens, experts, k, masked in ((300, 16, 4, True), (3, 256, 16, False), (20, 50, 1, True)):
        logits, noisy, sigma, _, mask = make(torch.float32, tokens, experts, k, masked=masked).values()
        inputs = logits.detach(), noisy.detach(), sigma.detach(), mask, k
        gradients = [torch.zeros(tokens, experts) for _ in range(3)]
        found += [
            Call("noisy_load_forward_", (*inputs, torch.zeros(num_slices(tokens), experts))),
            Call("noisy_load_backward_", (*inputs, torch.rand(experts), *gradients)),
        ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    logits, noisy, sigma, k, mask = make(torch.float32, 6, 8, 2, masked=True).values()
    plain = [value.detach() for value in (logits, noisy, sigma)]
    return [
        Call("noisy_load", (logits, noisy, sigma, mask, k)),
        Call("noisy_load", (logits, noisy, sigma, None, k)),
        Call("noisy_load_backward", (*plain, mask, k, torch.rand(8))),
    ]

"""Inputs that the op is tested with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(dtype: torch.dtype, *shape: int, spread: float = 1.0, blind: Sequence[str] = ()) -> Arguments:
    """Random parts; log-sums differ by about `spread`, and those named in `blind` are -inf in every other row."""
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.promote_types(dtype, torch.float32)
    found = {}
    for letter in "ab":
        found[f"out_{letter}"] = torch.randn(*shape, generator=generator).to(dtype)
        lse = spread * torch.randn(*shape[:-1], generator=generator).to(wide)
        if f"lse_{letter}" in blind:
            lse.view(-1)[::2] = -torch.inf
            # what saw nothing gives zeros
            found[f"out_{letter}"].view(-1, shape[-1])[::2] = 0
        found[f"lse_{letter}"] = lse
    return {name: x.requires_grad_() for name, x in found.items()}


def _strided(dtype: torch.dtype) -> Arguments:
    given = make(dtype, 3, 4, 10)
    wide = torch.randn(2, 4, 3, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {
        **given,
        "out_a": wide[0, :, :, ::2].transpose(0, 1).requires_grad_(),
        "lse_b": given["lse_b"].detach().T.contiguous().T.requires_grad_(),
    }


CASES = [
    Case("ordinary", lambda dtype: make(dtype, 2, 3, 5, 16)),
    Case("one row", lambda dtype: make(dtype, 1, 1)),
    Case("only one part weighs", lambda dtype: make(dtype, 9, 24, spread=80.0)),
    Case("a part saw nothing", lambda dtype: make(dtype, 7, 8, blind=["lse_a"]), differentiable=False),
    Case("neither saw anything", lambda dtype: make(dtype, 7, 8, blind=["lse_a", "lse_b"]), differentiable=False),
    Case("many blocks", lambda dtype: make(dtype, 130, 70)),
    Case("no row", lambda dtype: make(dtype, 2, 0, 8)),
    Case("strided", _strided),
    Case("half precision", lambda dtype: make(dtype, 4, 8), (torch.float16,)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 2, 3, 8), **changes}


REFUSED = [
    Refused("other size", lambda: _changed(out_b=torch.ones(2, 3, 7)), r"out_b: shape \(2, 3, 7\) does not fit out_a"),
    Refused(
        "other rows", lambda: _changed(lse_a=torch.ones(3, 2)), r"lse_a: shape \(3, 2\) does not fit out_a, \(2, 3, 8\); give \(2, 3\)"
    ),
    Refused("mixed", lambda: _changed(out_b=torch.ones(2, 3, 8).double()), "out_b: dtype torch.float64 differs from out_a"),
    Refused("narrow sums", lambda: _changed(lse_b=torch.ones(2, 3).bfloat16()), "lse_b: torch.bfloat16 is not supported; use float32"),
    Refused("integers", lambda: _changed(out_a=torch.ones(2, 3, 8).int()), "out_a: torch.int32 is not supported"),
    Refused("a number", lambda: _changed(out_a=torch.tensor(1.0)), "out_a: a number has no heads"),
]


def _flat(dtype: torch.dtype) -> list[torch.Tensor]:
    return [x.detach() for x in make(dtype, 150, 16, blind=["lse_b"]).values()]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = _flat(dtype)
        found += [
            Call("segment_merge_forward_", (*given, *(torch.zeros_like(x) for x in given[:2]))),
            Call("segment_merge_backward_", (*(torch.ones_like(x) for x in given[:2]), *given, *(torch.zeros_like(x) for x in given))),
        ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    given = list(make(torch.float32, 5, 8).values())
    plain = [x.detach() for x in given]
    return [Call("segment_merge", tuple(given)), Call("segment_merge_backward", (torch.ones(5, 8), torch.ones(5), *plain))]

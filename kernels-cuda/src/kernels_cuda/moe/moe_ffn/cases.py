"""Inputs that the op is tested with. T tokens, K experts of a token, D hidden size, N experts, E neurons of an expert."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kernels_cuda.moe.moe_ffn.binding import sort_workspace
from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype,
    tokens: int,
    slots: int,
    width: int,
    num_experts: int,
    size: int,
    *,
    scale: float = 1.0,
    only: int | None = None,
) -> Arguments:
    """Random arguments; every token chooses `slots` different experts, or all choose `only` that many first ones."""
    generator = torch.Generator().manual_seed(tokens + width + num_experts + size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    drawn = random(tokens, num_experts)
    if only is not None:
        drawn[:, only:] = -torch.inf
    experts = torch.sort(drawn, dim=-1, descending=True, stable=True).indices[:, :slots].contiguous()
    leaves = {
        "x_TD": random(tokens, width).to(dtype),
        "gate_up_NFD": (random(num_experts, 2 * size, width) * scale / max(width, 1) ** 0.5).to(dtype),
        "down_NDE": (random(num_experts, width, size) / max(size, 1) ** 0.5).to(dtype),
        "score_TK": torch.softmax(random(tokens, slots), -1).to(torch.promote_types(dtype, torch.float32)),
    }
    found = {name: value.requires_grad_() for name, value in leaves.items()}
    return {**found, "experts_TK": experts}


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 12, 2, 16, 4, 8)
    for name, source in {"x_TD": (0, 1), "gate_up_NFD": (1, 2), "down_NDE": (0, 1)}.items():
        arguments[name] = arguments[name].detach().transpose(*source).contiguous().transpose(*source).requires_grad_()
    return {**arguments, "experts_TK": arguments["experts_TK"].t().contiguous().t()}


def _constant(dtype: torch.dtype, *names: str) -> Arguments:
    arguments = make(dtype, 12, 2, 16, 4, 8)
    return {name: value.detach() if name in names else value for name, value in arguments.items()}


CASES = [
    Case("ordinary", partial(make, tokens=37, slots=2, width=24, num_experts=6, size=16)),
    Case("odd sizes", partial(make, tokens=19, slots=3, width=7, num_experts=5, size=5)),
    Case("one of each", partial(make, tokens=1, slots=1, width=1, num_experts=1, size=1)),
    Case("one expert of a token", partial(make, tokens=20, slots=1, width=16, num_experts=4, size=8)),
    Case("all experts", partial(make, tokens=9, slots=4, width=16, num_experts=4, size=8)),
    Case("idle experts", partial(make, tokens=5, slots=2, width=16, num_experts=20, size=8)),
    Case("one expert takes all", partial(make, tokens=17, slots=1, width=16, num_experts=4, size=8, only=1)),
    Case("no tokens", partial(make, tokens=0, slots=2, width=16, num_experts=3, size=8)),
    Case("many blocks of the sort", partial(make, tokens=330, slots=2, width=8, num_experts=7, size=8)),
    Case("large gates", partial(make, tokens=20, slots=2, width=16, num_experts=4, size=8, scale=60)),
    Case("strided", _strided),
    Case("x alone", lambda dtype: _constant(dtype, "gate_up_NFD", "down_NDE", "score_TK")),
    Case("down alone", lambda dtype: _constant(dtype, "x_TD", "gate_up_NFD", "score_TK")),
]
# in float16 what differs from the other types: how numbers are read and written, whole vectors and single ones
HALF = ("ordinary", "odd sizes", "idle experts", "large gates", "strided", "down alone")
CASES = [replace(case, dtypes=(*case.dtypes, torch.float16)) if case.name in HALF else case for case in CASES]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 2, 8, 3, 8), **changes}


REFUSED = [
    Refused("other width", lambda: _changed(x_TD=torch.ones(4, 7)), "gate_up: shape .* has D = 8 where x has 7"),
    Refused("one half", lambda: _changed(gate_up_NFD=torch.ones(3, 8, 8)), "gate_up: shape .* does not fit E = 8 of down"),
    Refused("integers", lambda: _changed(x_TD=torch.ones(4, 8).int()), "x: torch.int32 is not supported; use float32 or bfloat16"),
    Refused("half", lambda: _changed(x_TD=torch.ones(4, 8).half()), "gate_up: dtype torch.float32 differs from x"),
    Refused("mixed", lambda: _changed(down_NDE=torch.ones(3, 8, 8).bfloat16()), "down: dtype torch.bfloat16 differs from x"),
    Refused("other slots", lambda: _changed(score_TK=torch.ones(4, 3)), "score: shape .* has K = 3 where experts has 2"),
    Refused("float experts", lambda: _changed(experts_TK=torch.ones(4, 2)), "experts: torch.float32 is not supported"),
    Refused("expert too large", lambda: _changed(experts_TK=torch.full((4, 2), 3)), "experts: 3 to 3 are not all of 3 experts"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for rows, num_experts in ((300, 5), (7, 300)):
        experts = torch.randint(-1, num_experts + 1, (rows,), generator=torch.Generator().manual_seed(rows)).int()
        sizes = sort_workspace(rows, num_experts), rows, rows, num_experts
        found.append(Call("sort_tokens_", (experts, *(torch.zeros(size, dtype=torch.int32) for size in sizes))))
    for dtype, size in (
        (torch.float32, 40),
        (torch.bfloat16, 24),
        (torch.float16, 24),
        (torch.float32, 7),
        (torch.bfloat16, 3),
        (torch.float16, 3),
    ):
        gate_up, score, dh, h = (
            torch.randn(9, 2 * size).to(dtype),
            torch.rand(9),
            torch.randn(9, size).to(dtype),
            torch.zeros(9, size, dtype=dtype),
        )
        found += [
            Call("swiglu_score_", (gate_up, score, h)),
            Call("swiglu_score_backward_", (gate_up, score, dh, h, torch.zeros_like(gate_up), torch.zeros(9))),
        ]
        inverse = torch.randperm(24).int().view(12, 2)
        for out in {torch.float32, dtype}:
            found += [
                Call("combine_", (torch.randn(12, size).to(out), torch.randn(9, size).to(dtype), inverse, 5, add)) for add in (True, False)
            ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    found: list[Call] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, gate_up, down, score, experts = make(dtype, 6, 2, 8, 3, 8).values()
        order = torch.argsort(experts.flatten(), stable=True)
        inverse = torch.argsort(order).int().view(6, 2)
        ends = torch.bincount(experts.flatten(), minlength=3).cumsum(0).int()
        saved = torch.randn(12, 16).to(dtype), order.int(), inverse, score.detach().float().flatten(), ends
        tensors = [value.detach() for value in (x, x, gate_up, down)]
        found += [
            Call("moe_ffn", (x, gate_up, down, experts, score)),
            Call("moe_ffn_backward", (*tensors, *saved, True, True, True)),
            Call("moe_ffn_backward", (*tensors, *saved, False, True, False)),
        ]
    return found

"""Inputs that the op is tested with. B batch, T time, H heads, N head size."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.rwkv_distill import recurrence_cases
from kernels_cuda.rwkv_distill.recurrence import CHUNK_TOKENS, SEGMENT_TOKENS
from kernels_cuda.rwkv_distill.recurrence_cases import Random, kept_of
from kernels_cuda.testing import Call


def _inputs(random: Random, shape: tuple[int, ...], logit: float | None) -> dict[str, torch.Tensor]:
    """As a mixer makes them; decay logits are spread around -2."""
    *_, heads, size = shape
    w = 2 * random(*shape) - 2 if logit is None else logit + 0.1 * random(*shape)
    return {"r": random(*shape), "k": random(*shape) * size**-0.5, "v": random(*shape), "w": w, "u": random(heads, size)}


make = partial(recurrence_cases.make, _inputs)
CASES = recurrence_cases.cases(make, "rkvw", ("w", "u", "initial_state"))
REFUSED = recurrence_cases.refused(make, "rkvw", lambda size: {"u": torch.ones(1, size)})


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for dtype, size in ((torch.float32, 32), (torch.bfloat16, 64)):
        arguments = make(dtype, 19, batch=2, heads=2, size=size, state=True, ignored=0.2)
        inputs = [arguments[name].detach() for name in "rkvwu"]
        initial, mask = arguments["initial_state"].detach(), arguments["mask"]
        y, final = torch.zeros_like(inputs[0]), torch.zeros_like(initial)
        kept = kept_of(2, 19, 2, size, 2)
        gradients = [*(torch.zeros_like(value) for value in inputs[:4]), torch.zeros(2, 2, size), torch.zeros_like(initial)]
        history = torch.zeros(2, 2, CHUNK_TOKENS + 1, size, size)
        found += [
            Call("wkv6_forward_", (*inputs, initial, mask, None, y, final, kept)),
            Call("wkv6_backward_", (*inputs, mask, None, kept, inputs[0], initial, history, *gradients)),
            Call("wkv6_step_", (*(value[:, 0].contiguous() for value in inputs[:4]), inputs[4], initial, y[:, 0].contiguous())),
        ]
    packed = [value[:1].contiguous() for value in inputs[:4]]
    starts = torch.tensor([0, 17, 17, 19], dtype=torch.int32)
    kept, empty = kept_of(1, 19, 2, size, 3), torch.zeros(0)
    found.append(Call("wkv6_forward_", (*packed, inputs[4], None, None, starts, y[:1].contiguous(), empty, kept)))
    return [*found, *_chunked_calls()]


def _chunked_calls() -> list[Call]:
    found: list[Call] = []
    for size in (32, 64):
        arguments = make(torch.bfloat16, 70, batch=2, heads=2, size=size, state=True, ignored=0.2)
        inputs = [arguments[name].detach() for name in "rkvwu"]
        initial, mask = arguments["initial_state"].detach(), arguments["mask"]
        y, final, kept = torch.zeros_like(inputs[0]), torch.zeros_like(initial), kept_of(2, 70, 2, size, 2, SEGMENT_TOKENS)
        gradients = [*(torch.zeros_like(value) for value in inputs[:4]), torch.zeros(2, 2, size), torch.zeros_like(initial)]
        history = torch.zeros(2, 2, SEGMENT_TOKENS // 16, size, size, dtype=torch.bfloat16)
        found += [
            Call("wkv6_chunked_forward_", (*inputs, initial, mask, None, y, final, kept), ("emulated",)),
            Call("wkv6_chunked_backward_", (*inputs, mask, None, kept, inputs[0], initial, history, *gradients), ("emulated",)),
        ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    found: list[Call] = []
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make(dtype, 19, batch=2, state=True, ignored=0.2)
        inputs = [arguments[name] for name in "rkvwu"]
        plain = [value.detach() for value in inputs]
        kept = torch.randn_like(kept_of(2, 19, 1, 32, 2))
        found += [
            Call("wkv6", (*inputs, arguments["initial_state"], arguments["mask"], None, True, True, False)),
            Call("wkv6", (*plain, None, None, None, False, False, False)),
            Call("wkv6_backward", (*plain, None, None, kept, plain[0], None, True, False)),
        ]
    kept = torch.randn_like(kept_of(2, 19, 1, 32, 2, SEGMENT_TOKENS))
    return [
        *found,
        Call("wkv6", (*inputs, arguments["initial_state"], arguments["mask"], None, True, True, True), ("emulated",)),
        Call("wkv6_backward", (*plain, None, None, kept, plain[0], None, True, True), ("emulated",)),
    ]

"""RWKV-7's recurrence in plain PyTorch, for machines without the compiled operator. B batch, T time, H heads, N head size."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *,
    initial_state: Tensor | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y_t = S_t r_t with S_t = S_(t-1) diag(d_t) + (S_(t-1) a_t) b_t^T + v_t k_t^T and d = exp(-exp(-1/2) sigmoid(w)).

    Inputs are B x T x H x N, states B x H x N x N in float32 with values as rows; where `mask` (B x T) is 0, nothing happens.
    With `cu_seqlens` (sequences + 1) and B = 1 the state starts again at each of those positions; there is one state per sequence.
    """
    inputs = [value.float() for value in (r, w, k, v, a, b)]
    if cu_seqlens is None:
        y, state = _sequence(inputs, initial_state, mask)
        return y.to(r.dtype), state if output_final_state else None
    outputs, states = [], []
    for place, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        part = [value[:, start:end] for value in inputs]
        first = None if initial_state is None else initial_state[place : place + 1]
        y, state = _sequence(part, first, None if mask is None else mask[:, start:end])
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs, 1).to(r.dtype), torch.cat(states) if output_final_state else None


def _sequence(inputs: list[Tensor], state: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, time, heads, size = inputs[0].shape
    if mask is not None:
        real = mask.bool()[:, :, None, None]
        inputs = [torch.where(real, value, 0) for value in inputs]
    r, w, k, v, a, b = inputs
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))
    if mask is not None:
        decay = torch.where(real, decay, 1)
    state = r.new_zeros(batch, heads, size, size) if state is None else state
    outputs = []
    for t in range(time):
        removed = state @ a[:, t, :, :, None]
        state = state * decay[:, t, :, None, :] + removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, 1), state


def wkv7_step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """One token (inputs and result B x H x N); `state` changes in place."""
    y, after = wkv7(*(value[:, None] for value in (r, w, k, v, a, b)), initial_state=state, output_final_state=True)
    if after is not None:
        state.copy_(after)
    return y[:, 0]

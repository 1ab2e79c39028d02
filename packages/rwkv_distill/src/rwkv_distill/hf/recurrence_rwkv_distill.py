"""The operators in plain PyTorch, for machines without the compiled ones. B batch, T time, H heads, N head size, D width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

Update = Callable[..., tuple[Tensor, Tensor]]


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **options: Tensor | bool | None) -> tuple[Tensor, Tensor | None]:
    """y_t = S_t r_t with S_t = S_(t-1) diag(d_t) + (S_(t-1) a_t) b_t^T + v_t k_t^T and d = exp(-exp(-1/2) sigmoid(w)).

    Inputs are B x T x H x N; see `_sequences` for the options.
    """
    return _sequences(_update7, [r, w, k, v, a, b], **options)  # type: ignore[arg-type]


def wkv7_step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """One token (inputs and result B x H x N); `state` changes in place."""
    return _step(_update7, [r, w, k, v, a, b], state)


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, **options: Tensor | bool | None) -> tuple[Tensor, Tensor | None]:
    """y_t = (S_(t-1) + v_t (u k_t)^T) r_t with S_t = S_(t-1) diag(d_t) + v_t k_t^T and d = exp(-exp(w)); u is H x N."""
    return _sequences(partial(_update6, u=u), [r, k, v, w], **options)  # type: ignore[arg-type]


def wkv6_step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """One token (inputs and result B x H x N); `state` changes in place."""
    return _step(partial(_update6, u=u), [r, k, v, w], state)


def tmix_shift(h: Tensor, prev: Tensor | None, seg: Tensor | None, mus: Tensor) -> Tensor:
    """M x B x T x D: h + (p - h) mus[m], p the last token before that is no padding, if it is of the same segment.

    prev (B x D) is the one before the first token of a row (None: zero); seg (B x T) is below 0 for padding, which gives 0.
    """
    first = torch.zeros_like(h[:, 0]) if prev is None else prev
    if seg is None:
        before = torch.cat([first[:, None], h[:, :-1]], 1)
        return h + (before - h) * mus[:, None, None].to(h.dtype)
    own = h.masked_fill(seg[:, :, None] < 0, 0)
    place = torch.where(seg >= 0, torch.arange(1, 1 + seg.shape[1], device=seg.device), 0).cummax(1).values
    place = torch.cat([torch.zeros_like(place[:, :1]), place[:, :-1]], 1)
    table = torch.cat([first[:, None], own], 1)
    same = (place == 0) | (seg.gather(1, (place - 1).clamp(min=0)) == seg)
    before = table.gather(1, place[:, :, None].expand_as(h)).masked_fill(~same[:, :, None], 0)
    return (own + (before - own) * mus[:, None, None].to(h.dtype)).masked_fill(seg[None, :, :, None] < 0, 0)


def tmix_out(
    y: Tensor, r: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, r_k: Tensor | None = None,
    gn_w: Tensor | None = None, gn_b: Tensor | None = None, gate: Tensor | None = None, eps: float = 64e-5,
) -> Tensor:  # fmt: skip
    """(groupnorm(y) gn_w + gn_b + (sum of r k r_k) v) gate, B x T x H x N; each part is left out where it is not given."""
    heads, out = y.shape[-2:], y.float()
    if gn_w is not None and gn_b is not None:
        out = torch.nn.functional.layer_norm(out, heads[-1:], eps=eps) * gn_w.view(heads) + gn_b.view(heads)
    if r is not None and k is not None and v is not None and r_k is not None:
        out = out + (r * k * r_k.view(heads)).sum(-1, keepdim=True) * v
    return (out if gate is None else out * gate.view(y.shape)).to(y.dtype)


def _update7(state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))
    decay = decay if real is None else torch.where(real, decay, 1)
    removed = state @ a[..., None]
    state = state * decay[..., None, :] + removed * b[..., None, :] + v[..., None] * k[..., None, :]
    return (state @ r[..., None])[..., 0], state


def _update6(state: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, real: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor]:
    decay = torch.exp(-torch.exp(w))
    decay = decay if real is None else torch.where(real, decay, 1)
    learnt = v[..., None] * k[..., None, :]
    y = ((state + learnt * u.float()[:, None, :]) @ r[..., None])[..., 0]
    return y, state * decay[..., None, :] + learnt


def _sequences(
    update: Update, inputs: list[Tensor], initial_state: Tensor | None = None, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs (B x T x H x N) and the states behind them, B x H x N x N in float32 with values as rows; where `mask` (B x T) is 0,
    nothing happens. With `cu_seqlens` (sequences + 1) and B = 1 the state starts again at each of those positions; there is one state
    per sequence."""
    kind = inputs[0].dtype
    inputs = [value.float() for value in inputs]
    if cu_seqlens is None:
        y, state = _sequence(update, inputs, initial_state, mask)
        return y.to(kind), state if output_final_state else None
    outputs, states = [], []
    for place, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        part = [value[:, start:end] for value in inputs]
        first = None if initial_state is None else initial_state[place : place + 1]
        y, state = _sequence(update, part, first, None if mask is None else mask[:, start:end])
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs, 1).to(kind), torch.cat(states) if output_final_state else None


def _sequence(update: Update, inputs: list[Tensor], state: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, time, heads, size = inputs[0].shape
    real = None if mask is None else mask.bool()[:, :, None, None]
    if real is not None:
        inputs = [torch.where(real, value, 0) for value in inputs]
    state = inputs[0].new_zeros(batch, heads, size, size) if state is None else state
    outputs = []
    for t in range(time):
        y, state = update(state, *(value[:, t] for value in inputs), real=None if real is None else real[:, t])
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _step(update: Update, inputs: list[Tensor], state: Tensor) -> Tensor:
    y, after = update(state, *(value.float() for value in inputs), real=None)
    state.copy_(after)
    return y.to(inputs[0].dtype)

"""The definition of the op, in plain PyTorch: token by token, gradients by autograd, any float type.

B batch, T time, H heads, N head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels_cuda.rwkv_distill.recurrence import over_sequences


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See the public function of the same name; states are float32 or wider."""
    return over_sequences(
        _recurrence,
        (r, w, k, v, a, b),
        initial_state=initial_state,
        mask=mask,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
    )


def _recurrence(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, time, heads, size), dtype = r.shape, r.dtype
    wide = torch.promote_types(dtype, torch.float32)
    r, w, k, v, a, b = (value.to(wide) for value in (r, w, k, v, a, b))
    if mask is not None:
        counts = mask.bool()[:, :, None, None]
        # chosen, not multiplied: padding may hold anything
        r, w, k, v, a, b = (torch.where(counts, value, 0) for value in (r, w, k, v, a, b))
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))
    if mask is not None:
        decay = torch.where(counts, decay, 1)
    state = r.new_zeros(batch, heads, size, size) if state is None else state.to(wide)
    outputs = []
    for t in range(time):
        removed = state @ a[:, t, :, :, None]
        state = state * decay[:, t, :, None, :] + removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((state @ r[:, t, :, :, None]).squeeze(-1))
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    return y.to(dtype), state


def wkv7_step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """See the public function of the same name."""
    with torch.no_grad():
        y, after = _recurrence(*(value[:, None] for value in (r, w, k, v, a, b)), state=state, mask=None)
        state.copy_(after)
        return y[:, 0]

"""The definition of the op, in plain PyTorch, differentiable by autograd. B batch, T time, H heads, N head size."""

from __future__ import annotations

import torch
from torch import Tensor


def tmix_out(
    y: Tensor,
    r: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    r_k: Tensor | None = None,
    gn_w: Tensor | None = None,
    gn_b: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 64e-5,
) -> Tensor:
    """See the public function of the same name; arithmetic is float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    heads = y.shape[-2:]
    result = y.to(wide)
    if gn_w is not None and gn_b is not None:
        centred = result - result.mean(-1, keepdim=True)
        result = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        result = result * gn_w.to(wide).view(heads) + gn_b.to(wide).view(heads)
    if r_k is not None and r is not None and k is not None and v is not None:
        result = result + (r.to(wide) * k.to(wide) * r_k.to(wide).view(heads)).sum(-1, keepdim=True) * v.to(wide)
    if gate is not None:
        result = result * gate.to(wide).view(y.shape)
    return result.to(y.dtype)

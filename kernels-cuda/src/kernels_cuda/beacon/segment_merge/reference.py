"""The definition of the op, in plain PyTorch, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See the public function of the same name."""
    highest = torch.maximum(lse_a, lse_b).detach()
    shift = highest.masked_fill(highest == -torch.inf, 0)
    a, b = (lse_a - shift).exp(), (lse_b - shift).exp()
    total = a + b
    some = total > 0
    # where neither part saw anything, a number that has a logarithm and a quotient
    safe = total.masked_fill(~some, 1)
    out = out_a.to(total.dtype) * (a / safe)[..., None] + out_b.to(total.dtype) * (b / safe)[..., None]
    return out.to(out_a.dtype), (shift + safe.log()).masked_fill(~some, -torch.inf)

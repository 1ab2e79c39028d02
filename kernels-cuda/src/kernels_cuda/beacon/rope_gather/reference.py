"""The definition of the op, in plain PyTorch, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_gather(k: Tensor, v: Tensor, src: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See the public function of the same name."""
    place = src.clamp_min(0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    absent = (src < 0)[:, None, :, None]
    keys, values = (x.gather(2, place).masked_fill(absent, 0) for x in (k, v))
    first, second = keys.to(cos.dtype).chunk(2, dim=-1)
    c, s = (table[pos][:, None] for table in (cos, sin))
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(k.dtype), values

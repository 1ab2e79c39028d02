"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_gather_append_(k: Tensor, v: Tensor, src: Tensor, cos: Tensor, sin: Tensor, k_mem: Tensor, v_mem: Tensor, mem_len: Tensor) -> None:
    """See the public function of the same name."""
    kept = src >= 0
    write(k, v, src, torch.where(kept, mem_len[:, None] + kept.cumsum(1) - 1, -1), cos, sin, k_mem, v_mem)
    mem_len += kept.sum(1, dtype=torch.int32)


def write(k: Tensor, v: Tensor, src: Tensor, place: Tensor, cos: Tensor, sin: Tensor, k_mem: Tensor, v_mem: Tensor) -> None:
    """Entry n of row b to index place[b, n], where that is not below 0."""
    b, n = (place >= 0).nonzero(as_tuple=True)
    at = place[b, n]
    first, second = k[b, :, src[b, n]].to(cos.dtype).chunk(2, dim=-1)
    c, s = (table[at][:, None] for table in (cos, sin))
    k_mem[b, :, at] = torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(k.dtype)
    v_mem[b, :, at] = v[b, :, src[b, n]]

"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_evict_(k_mem: Tensor, v_mem: Tensor, mem_len: Tensor, first: Tensor, count: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See the public function of the same name."""
    move(k_mem, v_mem, mem_len, first, count, cos, sin)
    mem_len -= count


def move(k_mem: Tensor, v_mem: Tensor, mem_len: Tensor, first: Tensor, count: Tensor, cos: Tensor, sin: Tensor) -> None:
    """All of it but the new length."""
    place = torch.arange(k_mem.shape[2], device=k_mem.device).expand(len(k_mem), -1)
    moves = (place >= first[:, None]) & (place < (mem_len - count)[:, None]) & (count > 0)[:, None]
    b, n = moves.nonzero(as_tuple=True)
    behind = n + count[b]
    # both right sides are copies, so moves may overlap
    first_half, second_half = k_mem[b, :, behind].to(cos.dtype).chunk(2, dim=-1)
    c, s = cos[count[b]][:, None], -sin[count[b]][:, None]
    values = v_mem[b, :, behind]
    k_mem[b, :, n] = torch.cat((first_half * c - second_half * s, second_half * c + first_half * s), dim=-1).to(k_mem.dtype)
    v_mem[b, :, n] = values

"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PROJECTION = 12  # number of the stream of random numbers
_LOW = 0xFFFFFFFF


def gaussian_(out: Tensor, seed: int, param: int, index: int) -> None:
    """See the public function of the same name."""
    words = philox(seed, param, index, (out.numel() + 3) // 4, out.device) >> 8
    radius = torch.sqrt(-2 * torch.log((words[:, 0::2] + 1).double() * 2.0**-24))
    angle = (2 * math.pi * 2.0**-24) * words[:, 1::2].double()
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    out.copy_(pairs.flatten()[: out.numel()].view(out.shape))


def philox(seed: int, param: int, index: int, blocks: int, device: torch.device) -> Tensor:
    """Philox4x32-10 as in philox.h: [blocks, 4] words of 32 bits, in int64."""
    c = torch.arange(blocks, device=device)
    a, b, d = (torch.full_like(c, value) for value in (index, param, PROJECTION))
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        # a product may wrap in int64: its masked halves are the same
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32 & _LOW) ^ b ^ k0, second & _LOW, (first >> 32 & _LOW) ^ d ^ k1, first & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return torch.stack([a, b, c, d], dim=-1)

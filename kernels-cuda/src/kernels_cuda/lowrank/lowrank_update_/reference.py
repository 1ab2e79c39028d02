"""The definition of the op, in plain PyTorch. m rows and n columns of a weight, r rank."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 13  # number of the stream of random numbers
GROUP = 512  # words from one block of Philox
_LOW = 0xFFFFFFFF


def lowrank_update_(W: Tensor, P: Tensor, N: Tensor, side: str, alpha: float, decay: float = 1.0, seed: int = -1, offset: int = 0) -> None:
    """See the public function of the same name; arithmetic is float32 or wider."""
    wide = torch.promote_types(W.dtype, torch.float32)
    left, right = (N.t(), P) if side == "right" else (P.t(), N)
    back = left.to(wide) @ right.to(wide)
    value = -alpha * back if decay == 0 else decay * W.to(wide) - alpha * back
    W.copy_(round_at_random(value, seed, offset) if seed >= 0 and W.dtype == torch.bfloat16 else value)


def round_at_random(value: Tensor, seed: int, offset: int) -> Tensor:
    """float32 to bfloat16 neighbours, the upper one with the probability of the distance from the lower."""
    words = random_words(seed, offset, (value.numel() + 1) // 2, value.device)
    # two elements share a word, the first one its lower half
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten()[: value.numel()].view(value.shape)
    bits = value.view(torch.int32).long() & _LOW
    rounded = (bits + halves) >> 16 << 16
    # back to 32 bits with a sign
    chosen = torch.where(rounded >= 2**31, rounded - 2**32, rounded).int().view(torch.float32)
    return torch.where(value.isfinite(), chosen, value).to(torch.bfloat16)


def random_words(seed: int, offset: int, count: int, device: torch.device) -> Tensor:
    """`count` words of 32 bits, in int64: as `mixed` in weights.h, GROUP from the keys of one block of Philox."""
    keys = philox(seed, offset, (count + GROUP - 1) // GROUP, device)
    x = torch.arange(GROUP, device=device) * 0x9E3779B9 & _LOW ^ keys[:, :1]
    # a product may wrap in int64: its lower 32 bits are the same
    x = (x ^ x >> 16) * 0x7FEB352D & _LOW
    x = ((x ^ x >> 15) + keys[:, 1:2]) * 0x846CA68B & _LOW
    return (x ^ x >> 16 ^ keys[:, 2:3]).flatten()[:count]


def philox(seed: int, offset: int, blocks: int, device: torch.device) -> Tensor:
    """Philox4x32-10 as in philox.h: [blocks, 4] words of 32 bits, in int64."""
    c = torch.arange(blocks, device=device)
    a, b, d = (torch.full_like(c, value) for value in (offset & _LOW, offset >> 32 & _LOW, ROUNDING))
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32 & _LOW) ^ b ^ k0, second & _LOW, (first >> 32 & _LOW) ^ d ^ k1, first & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return torch.stack([a, b, c, d], dim=-1)

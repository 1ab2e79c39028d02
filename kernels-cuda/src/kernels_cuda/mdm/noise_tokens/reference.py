"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def noise_tokens(
    ids: Tensor, p: Tensor, key: int, stream: int, slot: Tensor, mask_id: int, eligible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the public function of the same name."""
    masked = masked_tokens(p, key, stream, slot, ids.shape[1], eligible)
    return torch.where(masked, mask_id, ids), masked


def masked_tokens(p: Tensor, key: int, stream: int, slot: Tensor, size: int, eligible: Tensor | None = None) -> Tensor:
    """See the public function of the same name."""
    masked = unit(words(key, stream, slot, size)) < p[:, None].double()
    return masked if eligible is None else masked & eligible


def words(key: int, stream: int, slot: Tensor, size: int) -> Tensor:
    """The 32-bit draws of `size` tokens of each sequence (B x S, int64)."""
    blocks = torch.arange((size + 3) // 4, device=slot.device)
    return torch.stack(torch.broadcast_tensors(*philox(slot[:, None], blocks, stream, key)), dim=-1).flatten(1)[:, :size]


def unit(draws: Tensor) -> Tensor:
    """Draws as float64 in [0, 1), multiples of 2^-24."""
    return (draws >> 8).to(torch.float64) * 2.0**-24


def philox(index: Tensor, block: Tensor, stream: int, key: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits, in int64 (Salmon et al., SC 2011)."""
    a, b, c, d = index & _WORD, (index >> 32) & _WORD, block, torch.full_like(block, stream)
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        (high_a, low_a), (high_c, low_c) = _product(a, 0xD2511F53), _product(c, 0xCD9E8D57)
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return a, b, c, d


def _product(value: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two words; it has 64 bits, one more than int64 holds."""
    low = value * (factor & 0xFFFF)
    high = value * (factor >> 16) + (low >> 16)
    return (high >> 16) & _WORD, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

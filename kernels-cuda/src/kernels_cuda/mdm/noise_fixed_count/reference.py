"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.mdm.noise_tokens.reference import words


def noise_fixed_count(
    ids: Tensor, k: Tensor, key: int, stream: int, slot: Tensor, mask_id: int, eligible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the public function of the same name."""
    masked = masked_count(k, key, stream, slot, ids.shape[1], eligible)
    return torch.where(masked, mask_id, ids), masked


def masked_count(k: Tensor, key: int, stream: int, slot: Tensor, size: int, eligible: Tensor | None = None) -> Tensor:
    """See the public function of the same name."""
    draws = words(key, stream, slot, size)
    # those that are not eligible come last, whatever k is
    draws = draws if eligible is None else torch.where(eligible, draws, 2**32)
    order = torch.argsort(draws, dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(size, device=order.device).expand_as(order))
    masked = rank < k[:, None]
    return masked if eligible is None else masked & eligible

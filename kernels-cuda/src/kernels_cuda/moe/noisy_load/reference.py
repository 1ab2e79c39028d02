"""The definition of the op, in plain PyTorch: one stable sort, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.moe.gates import real


def noisy_load(logits_TN: Tensor, noisy_TN: Tensor, sigma_TN: Tensor, k: int, mask_T: Tensor | None = None) -> Tensor:
    """See the public function of the same name."""
    ordered_TN, order_TN = torch.sort(noisy_TN, dim=-1, descending=True, stable=True)
    chosen_TN = torch.zeros_like(noisy_TN).scatter(1, order_TN[:, :k], 1.0)
    threshold_TN = torch.where(chosen_TN > 0, ordered_TN[:, k : k + 1], ordered_TN[:, k - 1 : k])
    chance_TN: Tensor = torch.special.ndtr((logits_TN - threshold_TN) / sigma_TN)
    return (chance_TN * real(mask_T, chance_TN)).sum(0)

"""The definition of the op, in plain PyTorch: one stable sort, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.moe.gates import real


def route(logits_TN: Tensor, k: int, mask_T: Tensor | None = None, softmax: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the public function of the same name."""
    # not topk, which promises no order among equals
    ordered_TN, order_TN = torch.sort(logits_TN, dim=-1, descending=True, stable=True)
    idx_TK, top_TK = order_TN[:, :k], ordered_TN[:, :k]
    score_TK = torch.softmax(top_TK, dim=-1) if softmax else top_TK
    real_T1, nothing_TN = real(mask_T, logits_TN), torch.zeros_like(logits_TN)
    importance_N = nothing_TN.scatter(1, idx_TK, score_TK * real_T1).sum(0)
    count_N = nothing_TN.scatter(1, idx_TK, 1.0).mul(real_T1).sum(0)
    return idx_TK.int(), score_TK, count_N.int(), importance_N

"""The definition of the op, in plain PyTorch: all logits at once, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
    vocabulary: int | None = None,
) -> Tensor:
    """See the public function of the same name; logits have the dtype of the inputs, everything after them is float32 or wider."""
    logits_NV = F.linear(hidden_ND, weight_VD[:vocabulary])
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    losses_N = F.cross_entropy(logits_NV.to(wide), labels_N.long(), ignore_index=ignore_index, reduction="none")
    if weights is not None:
        losses_N = losses_N * weights.to(wide)
    return losses_N if reduction == "none" else losses_N.sum()

"""The definition of the op, in plain PyTorch: expert by expert, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_ffn(x_TD: Tensor, gate_up_NFD: Tensor, down_NDE: Tensor, experts_TK: Tensor, score_TK: Tensor) -> Tensor:
    """See the public function of the same name; products have the dtype of the inputs, what lies between is float32 or wider."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    flat_R = experts_TK.flatten().long()
    order_R = torch.argsort(flat_R, stable=True)
    sizes = torch.bincount(flat_R, minlength=len(gate_up_NFD)).tolist()
    rows_RD = x_TD[order_R // max(experts_TK.shape[1], 1)]
    score_R1 = score_TK.flatten()[order_R, None].to(wide)
    parts = []
    # unbind, since indexing would make a gradient of all experts for each one
    for gate_up, down, rows, score in zip(gate_up_NFD.unbind(), down_NDE.unbind(), rows_RD.split(sizes), score_R1.split(sizes)):
        gate, up = F.linear(rows, gate_up).to(wide).chunk(2, dim=-1)
        parts.append(F.linear((F.silu(gate) * up * score).to(x_TD.dtype), down))
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    return torch.cat(parts)[inverse_R].view(*experts_TK.shape, x_TD.shape[1]).to(wide).sum(1).to(x_TD.dtype)

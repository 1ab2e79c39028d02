"""The definition of the op, in plain PyTorch, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor, k_mem: Tensor, v_mem: Tensor, mem_len: Tensor, k_raw: Tensor, v_raw: Tensor, raw_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See the public function of the same name."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, H, _, d = q.shape
    G = k_mem.shape[1]
    queries = (q.to(wide) * scale).view(B, G, H // G, d)
    scores, values = [], []
    for keys, own, length in ((k_mem, v_mem, mem_len), (k_raw, v_raw, raw_len)):
        # behind a row's end there may be anything
        behind = (torch.arange(keys.shape[2], device=q.device) >= length[:, None])[:, None, :, None]
        scores.append((queries @ keys.to(wide).masked_fill(behind, 0).transpose(2, 3)).masked_fill(behind.transpose(2, 3), -torch.inf))
        values.append(own.to(wide).masked_fill(behind, 0))
    # a row that sees nothing has no softmax
    empty = (mem_len + raw_len == 0)[:, None, None]
    joint = torch.cat(scores, dim=-1).masked_fill(empty[..., None], 0)
    far, near = joint.softmax(-1).masked_fill(empty[..., None], 0).split([k_mem.shape[2], k_raw.shape[2]], dim=-1)
    out, lse = far @ values[0] + near @ values[1], joint.logsumexp(-1).masked_fill(empty, -torch.inf)
    return out.view(B, H, 1, d).to(q.dtype), lse.view(B, H)

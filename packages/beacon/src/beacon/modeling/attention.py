"""Attention of a block: queries of each segment over its open window and the memory of its row, one softmax over both."""

from __future__ import annotations

import torch
from torch import Tensor

from beacon.modeling.block import Queries, Rotation
from kernels_cuda.beacon import decode_attention, rope_gather, segment_merge

# B rows, R segments, T queries, K keys of the open window, M memory entries, H query heads, G key heads, N tokens, d head size


def gather(tokens_BNGd: Tensor, index: Tensor) -> Tensor:
    """Rows of `tokens` by place: index B x ... (or 1 x ..., the same for all rows) -> B x ... x G x d."""
    if index.shape[0] == 1:
        picked = tokens_BNGd.index_select(1, index.flatten())
        return picked.view(len(picked), *index.shape[1:], *picked.shape[2:])
    flat = index.flatten(1)[..., None, None].expand(-1, -1, *tokens_BNGd.shape[2:])
    picked = tokens_BNGd.gather(1, flat)
    return picked.view(len(picked), *index.shape[1:], *picked.shape[2:])


def rotate(x: Tensor, rotation: Rotation, heads: int = -2) -> Tensor:
    """Rotate pairs (j, j + d/2) of `x`; `heads` is the dimension of x that the rotation does not have. Angles keep their precision."""
    cos, sin = rotation.cos.unsqueeze(heads), rotation.sin.unsqueeze(heads)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def moved(k_BNGd: Tensor, v_BNGd: Tensor, index: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Keys and values by place, as `gather`, the keys rotated: index and rotation B x N (or 1 x N, the same for all rows) -> B x G x N x d."""
    B, N = len(k_BNGd), index.shape[1]
    cos, sin = rotation.cos.flatten(0, 1), rotation.sin.flatten(0, 1)
    pos = torch.arange(len(cos), device=index.device).view(-1, N).expand(B, -1)
    return rope_gather(k_BNGd.transpose(1, 2), v_BNGd.transpose(1, 2), index.expand(B, -1), pos, cos, sin)


def attend(
    q_BRTHd: Tensor,
    k_BRKGd: Tensor,
    v_BRKGd: Tensor,
    local_BRTK: Tensor | None,
    memory: tuple[Tensor, Tensor] | None,
    memory_BRTM: Tensor | None,
    scale: float,
) -> Tensor:
    """B x R x T x (H d): softmax over the open window and, where there is one, the memory (k, v: B x G x M x d).

    Scores of the two parts are joined, keys and values never are, so a step that reads a long memory copies none of it.
    """
    B, R, T, H, d = q_BRTHd.shape
    K, G = k_BRKGd.shape[2:4]
    h = H // G
    if memory is not None and R == 1 and not torch.is_grad_enabled() and q_BRTHd.dtype in (torch.float32, torch.float64):
        return _attend_in_place(q_BRTHd, k_BRKGd, v_BRKGd, local_BRTK, memory, memory_BRTM, scale)
    q_BRGhTd = q_BRTHd.unflatten(3, (G, h)).permute(0, 1, 3, 4, 2, 5) * scale
    keys_BRGdK = k_BRKGd.permute(0, 1, 3, 4, 2)
    local = (q_BRGhTd.reshape(B, R, G, h * T, d) @ keys_BRGdK).view(B, R, G, h, T, K)
    if local_BRTK is not None:
        local = local.masked_fill(~local_BRTK[:, :, None, None], float("-inf"))
    scores, M = local, 0
    if memory is not None:
        k_BGMd, _ = memory
        M = k_BGMd.shape[2]
        q_BGQd = q_BRGhTd.permute(0, 2, 1, 3, 4, 5).reshape(B, G, R * h * T, d)
        far = (q_BGQd @ k_BGMd.transpose(2, 3)).view(B, G, R, h, T, M).permute(0, 2, 1, 3, 4, 5)
        if memory_BRTM is not None:
            far = far.masked_fill(~memory_BRTM[:, :, None, None], float("-inf"))
        scores = torch.cat((far, local), dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q_BRTHd.dtype)
    near = weights[..., M:].reshape(B, R, G, h * T, K)
    out = (near @ v_BRKGd.permute(0, 1, 3, 2, 4)).view(B, R, G, h, T, d)
    if memory is not None:
        _, v_BGMd = memory
        far_weights = weights[..., :M].permute(0, 2, 1, 3, 4, 5).reshape(B, G, R * h * T, M)
        out = out + (far_weights @ v_BGMd).view(B, G, R, h, T, d).permute(0, 2, 1, 3, 4, 5)
    joined: Tensor = out.permute(0, 1, 4, 2, 3, 5).reshape(B, R, T, H * d)
    return joined


def _attend_in_place(
    q_BRTHd: Tensor,
    k_BRKGd: Tensor,
    v_BRKGd: Tensor,
    local_BRTK: Tensor | None,
    memory: tuple[Tensor, Tensor],
    memory_BRTM: Tensor | None,
    scale: float,
) -> Tensor:
    """`attend` of one segment without gradients: the scores are the one thing of the memory's length that is allocated."""
    B, _, T, H, d = q_BRTHd.shape
    k_BGMd, v_BGMd = memory
    M, K, G = k_BGMd.shape[2], k_BRKGd.shape[2], k_BRKGd.shape[3]
    q_BGQd = (q_BRTHd[:, 0] * scale).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).reshape(B * G, -1, d)
    scores = q_BGQd.new_empty(B * G, q_BGQd.shape[1], M + K)
    torch.bmm(q_BGQd, k_BGMd.flatten(0, 1).transpose(1, 2), out=scores[..., :M])
    near_k, near_v = (x[:, 0].transpose(1, 2).reshape(B * G, K, d) for x in (k_BRKGd, v_BRKGd))
    torch.bmm(q_BGQd, near_k.transpose(1, 2), out=scores[..., M:])
    for seen_BRT, part in ((memory_BRTM, scores[..., :M]), (local_BRTK, scores[..., M:])):
        if seen_BRT is not None:
            part.unflatten(0, (B, G)).unflatten(2, (-1, T)).masked_fill_(~seen_BRT[:, :, None], float("-inf"))
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    scores.div_(scores.sum(-1, keepdim=True))
    out = scores[..., :M] @ v_BGMd.flatten(0, 1) + scores[..., M:] @ near_v
    joined: Tensor = out.view(B, G, H // G, T, d).permute(0, 3, 1, 2, 4).reshape(B, 1, T, H * d)
    return joined


def attend_few(
    q_BRTHd: Tensor, k_BRKGd: Tensor, v_BRKGd: Tensor, memory: tuple[Tensor, Tensor] | None, queries: Queries, scale: float
) -> Tensor:
    """B x 1 x T x (H d), as `attend` for a few queries that all see the same of memory, which is read once, where it lies."""
    assert queries.memory_B is not None
    B, _, T, H, d = q_BRTHd.shape
    k_BGKd, v_BGKd = (x[:, 0].transpose(1, 2) for x in (k_BRKGd, v_BRKGd))
    G = k_BGKd.shape[1]
    k_BGMd, v_BGMd = memory or (k_BGKd[:, :, :0], v_BGKd[:, :, :0])
    # queries that see the same are heads of one token
    q_BGQd = q_BRTHd[:, 0].unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).reshape(B, G, -1, d)
    q_BH1d, far_B = q_BGQd.reshape(B, -1, 1, d), queries.memory_B.expand(B)
    if queries.local_B is not None:
        out, _ = decode_attention(q_BH1d, k_BGMd, v_BGMd, far_B, k_BGKd, v_BGKd, queries.local_B.expand(B), scale)
    else:
        none = k_BGKd[:, :, :0]
        far, far_lse = decode_attention(q_BH1d, k_BGMd, v_BGMd, far_B, none, none, torch.zeros_like(far_B), scale)
        near, near_lse = _masked(q_BGQd, k_BGKd, v_BGKd, queries, scale)
        out, _ = segment_merge(far[:, :, 0], far_lse, near.reshape(B, -1, d), near_lse.reshape(B, -1))
    joined: Tensor = out.reshape(B, G, H // G, T, d).permute(0, 3, 1, 2, 4).reshape(B, 1, T, H * d)
    return joined


def _masked(q_BGQd: Tensor, k_BGKd: Tensor, v_BGKd: Tensor, queries: Queries, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of a few queries over the open window that each sees, and its log-sum."""
    assert queries.local_BRTK is not None
    wide = torch.promote_types(q_BGQd.dtype, torch.float32)
    hidden_BTK = ~queries.local_BRTK[:, 0]
    scores = ((q_BGQd * scale) @ k_BGKd.transpose(2, 3)).to(wide).unflatten(2, (-1, hidden_BTK.shape[1]))
    scores = scores.masked_fill(hidden_BTK[:, None, None], float("-inf")).flatten(2, 3)
    return scores.softmax(-1).to(q_BGQd.dtype) @ v_BGKd, scores.logsumexp(-1)

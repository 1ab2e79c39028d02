"""Attention of a block by torch's own kernels: one call per window (sdpa), or one for all windows (flex)."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from beacon.modeling.block import Queries
from beacon.modeling.tiles import Tiles, joined

# B rows, R segments, T queries and K keys per segment, M memory entries, H query heads, G key heads, d head size


def attend_sdpa(
    q_BRTHd: Tensor, k_BRKGd: Tensor, v_BRKGd: Tensor, memory: tuple[Tensor, Tensor] | None, tiles: Tiles, scale: float
) -> Tensor:
    """B x R x T x (H d), as `attend` with the masks that the tiles (one per segment) were made from."""
    B, R, T, H, d = q_BRTHd.shape
    parts = [q_BRTHd.new_zeros(B, T, H, d)] * R
    for tile in tiles.tiles:
        keys, values = (x[:, :, tile.columns] for x in joined(tiles, tile.segment, k_BRKGd, v_BRKGd, memory))
        query = q_BRTHd[:, tile.segment, tile.rows].transpose(1, 2)
        seen = None if tile.hidden_BtN is None else F.pad(tile.hidden_BtN, (tile.hidden_from, 0))[:, None].to(query.dtype)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale, enable_gqa=keys.shape[1] != H)
        parts[tile.segment] = F.pad(out.transpose(1, 2), (0, 0, 0, 0, 0, T - out.shape[2]))
    return torch.stack(parts, dim=1).flatten(3)


def attend_flex(
    q_BRTHd: Tensor, k_BRKGd: Tensor, v_BRKGd: Tensor, memory: tuple[Tensor, Tensor] | None, queries: Queries, scale: float
) -> Tensor:
    """B x R x T x (H d), as `attend` with the masks of `queries`. The block mask is made once per block, not once per layer."""
    from torch.nn.attention.flex_attention import create_block_mask

    R, T, H = q_BRTHd.shape[1:4]
    keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (k_BRKGd, v_BRKGd))
    M, K = 0, k_BRKGd.shape[2]
    if memory is not None:
        M = memory[0].shape[2]
        keys, values = (torch.cat(pair, dim=2) for pair in zip(memory, (keys, values)))
    if "flex" not in queries.memo:
        local, far = queries.local_BRTK, queries.memory_BRTM

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            r, t, near = i // T, i % T, (j - M).clamp(min=0)
            own = near // K == r
            if local is not None:
                own = own & local[b if len(local) > 1 else 0, r, t, near % K]
            if not M:
                return own
            before = j < M if far is None else (j < M) & far[b if len(far) > 1 else 0, r, t, j.clamp(max=M - 1)]
            return before | ((j >= M) & own)

        rows = max(1 if mask is None else len(mask) for mask in (local, far))
        queries.memo["flex"] = create_block_mask(seen, rows if rows > 1 else None, None, R * T, M + R * K, device=str(keys.device))
    query = q_BRTHd.flatten(1, 2).transpose(1, 2)
    with warnings.catch_warnings():
        # on a CPU it is a check of the masks, for which nothing is compiled
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out = _flex(keys.device.type)(query, keys, values, block_mask=queries.memo["flex"], scale=scale, enable_gqa=keys.shape[1] != H)
    joint: Tensor = out.transpose(1, 2).unflatten(1, (R, T)).flatten(3)
    return joint


@cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention

"""A decoder layer that also carries beacons, out of the parts of the stock layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from beacon.modeling.attention import attend, attend_few, gather, moved, rotate
from beacon.modeling.block import Block, Queries
from beacon.modeling.fused import attend_flex, attend_sdpa
from beacon.modeling.tiles import attend_tiles
from beacon.modeling.weights import beacon_mlp, projected

# B rows, N tokens (raw, then beacons), D hidden size, G key heads, M memory entries, K open window, d head size
Pair = tuple[Tensor, Tensor]


def beacon_layer(
    layer: Any, raw_BND: Tensor, beacon_BND: Tensor, block: Block, last: bool, open_window: Pair | None, memory: Pair | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of raw tokens and beacons after the layer, and the unrotated keys and values of the open window and of both.

    `open_window` is B x K x G x d, unrotated, `memory` B x G x M x d, rotated. In the last layer only the tokens that are
    asked for go on, and beacons stop at their keys and values.
    """
    attn = layer.self_attn
    raw_in, beacon_in = (normed(layer.input_layernorm, part) for part in (raw_BND, beacon_BND))
    queries = block.last if last else block.main
    if queries is None:
        k, v = _heads(attn, "kv", raw_in, beacon_in)
        return raw_BND[:, :0], beacon_BND, *joined(open_window, k, v)
    if queries.raw is None and queries.beacons:
        q, k, v = _heads(attn, "qkv", raw_in, beacon_in)
    else:
        k, v = _heads(attn, "kv", raw_in, beacon_in)
        if queries.raw is not None:
            raw_in, raw_BND = (_rows(part, queries.raw) for part in (raw_in, raw_BND))
        (q,) = _heads(attn, "q", raw_in, beacon_in if queries.beacons else beacon_in[:, :0])
    k, v = joined(open_window, k, v)
    out = _attention(attn, q, k, v, block, queries, memory)
    num_raw = raw_BND.shape[1]
    raw_BND = _finish(layer, layer.mlp, raw_BND, attn.o_proj(out[:, :num_raw]))
    if queries.beacons:
        project = getattr(attn, "beacon_o_proj", attn.o_proj)
        beacon_BND = _finish(layer, partial(beacon_mlp, layer.mlp), beacon_BND, project(out[:, num_raw:]))
    return raw_BND, beacon_BND, k, v


def _heads(attn: Any, letters: str, raw_BND: Tensor, beacon_BND: Tensor) -> list[Tensor]:
    """Queries, keys or values of raw tokens and beacons, B x N x heads x d, each kind by its own weight."""
    found = []
    for letter, out in zip(letters, projected(attn, letters, raw_BND, beacon_BND)):
        heads: Tensor = out.view(*out.shape[:2], -1, attn.head_dim)
        # qwen3 has a norm of queries and keys, which raw tokens and beacons share
        norm = getattr(attn, f"{letter}_norm", None)
        found.append(heads if norm is None else normed(norm, heads).to(heads.dtype))
    return found


def _rows(hidden_BND: Tensor, index: Tensor) -> Tensor:
    return gather(hidden_BND[:, :, None], index)[:, :, 0]


def _finish(layer: Any, mlp: Callable[[Tensor], Tensor], hidden_BND: Tensor, attended_BND: Tensor) -> Tensor:
    hidden_BND = hidden_BND + attended_BND
    out: Tensor = hidden_BND + mlp(normed(layer.post_attention_layernorm, hidden_BND))
    return out


def _attention(attn: Any, q_BNHd: Tensor, k: Tensor, v: Tensor, block: Block, queries: Queries, memory: Pair | None) -> Tensor:
    """What every query gets, B x N x (H d); keys and values are those of the open window, then of the block."""
    q = q_BNHd[:, None] if queries.index_BRT is None else gather(q_BNHd, queries.index_BRT)
    q = rotate(q, queries.rotation)
    far = memory
    if block.memory_BM is not None and block.memory_rotation is not None:
        fresh_k, fresh_v = moved(k, v, block.memory_BM, block.memory_rotation)
        far = (fresh_k, fresh_v) if memory is None else (torch.cat((memory[0], fresh_k), dim=2), torch.cat((memory[1], fresh_v), dim=2))
    if block.keys_BRK is None:
        near_k, near_v = rotate(k[:, None], block.key_rotation), v[:, None]
    else:
        near = moved(k, v, block.keys_BRK.flatten(1), block.key_rotation.flat())
        near_k, near_v = (x.unflatten(2, block.keys_BRK.shape[1:]).permute(0, 2, 3, 1, 4) for x in near)
    if queries.tiles is not None:
        by_tiles = attend_sdpa if queries.kind == "sdpa" else attend_tiles
        out = by_tiles(q, near_k, near_v, far, queries.tiles, attn.scaling)
    elif queries.memory_B is not None:
        out = attend_few(q, near_k, near_v, far, queries, attn.scaling)
    elif queries.kind == "flex":
        out = attend_flex(q, near_k, near_v, far, queries, attn.scaling)
    else:
        out = attend(q, near_k, near_v, queries.local_BRTK, far, queries.memory_BRTM, attn.scaling)
    if queries.back_BN is None:
        return out[:, 0]
    return gather(out.flatten(1, 2)[:, :, None], queries.back_BN)[:, :, 0]


def normed(norm: Any, hidden_BND: Tensor) -> Tensor:
    """RMS norm; in float64 for float64, where transformers would round to float32 in between."""
    if hidden_BND.dtype != torch.float64:
        out: Tensor = norm(hidden_BND)
        return out
    scale = torch.rsqrt(hidden_BND.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    weight: Tensor = norm.weight
    return hidden_BND * scale * weight


def joined(open_window: Pair | None, k_BNGd: Tensor, v_BNGd: Tensor) -> Pair:
    """Keys and values of the open window, then of the block."""
    if open_window is None:
        return k_BNGd, v_BNGd
    return torch.cat((open_window[0], k_BNGd), dim=1), torch.cat((open_window[1], v_BNGd), dim=1)

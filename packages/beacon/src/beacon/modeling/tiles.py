"""Attention of many windows without scores that nobody reads: tiles of queries over the keys between their first and last visible one.

A dense mask over all windows costs scores of every query with every memory entry; within a window half of them are hidden, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

# B rows, R segments, T queries and K keys per segment, M memory entries, H query heads, G key heads, d head size; h = H / G
# t queries and n keys of a tile
ROWS = 128  # queries of a tile: smaller ones skip more hidden scores, larger ones make faster products


@dataclass(frozen=True)
class Tile:
    """Queries `rows` of a segment, which see some of the keys `columns` of its [memory | open window]."""

    segment: int
    rows: slice
    columns: slice
    hidden_from: int  # columns of the tile before this one are seen by all its rows
    hidden_BtN: Tensor | None  # 0 or -inf, for the columns from there; None: everything is seen


@dataclass(frozen=True)
class Tiles:
    """Tiles of all segments, and the memory and keys of each segment that somebody sees."""

    tiles: tuple[Tile, ...]
    memory: tuple[int, ...]
    keys: tuple[int, ...]


def make_tiles(
    counts: Sequence[int],
    local_BRTK: NDArray[np.bool_],
    memory_BRTM: NDArray[np.bool_],
    dtype: torch.dtype,
    device: torch.device,
    rows: int | None = None,
) -> Tiles:
    """Tiles of `rows` queries (default: ROWS) of segments with `counts` queries each, from who sees whom."""
    size = rows or ROWS
    tiles, memory, keys = [], [], []
    for r, count in enumerate(counts):
        near, far = local_BRTK[:, r, :count], memory_BRTM[:, r, :count]
        memory.append(_end(_any(far)))
        keys.append(_end(_any(near)))
        seen_BTN = np.concatenate([far[..., : memory[r]], near[..., : keys[r]]], axis=-1)
        for begin in range(0, count, size):
            own_rows = slice(begin, min(begin + size, count))
            some, every = _any(seen_BTN[:, own_rows]), ~_any(~seen_BTN[:, own_rows])
            columns = slice(int(some.argmax()), _end(some))
            own, complete = seen_BTN[:, own_rows, columns], every[columns]
            first = len(complete) if complete.all() else int(complete.argmin())
            hidden = None
            if first < len(complete):
                hidden = (
                    torch.zeros(own[..., first:].shape, dtype=dtype)
                    .masked_fill_(torch.from_numpy(~own[..., first:]), -torch.inf)
                    .to(device)
                )
            tiles.append(Tile(r, own_rows, columns, first, hidden))
    return Tiles(tuple(tiles), tuple(memory), tuple(keys))


def _any(seen_BTN: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which columns some row sees."""
    columns: NDArray[np.bool_] = np.logical_or.reduce(seen_BTN, axis=(0, 1))
    return columns


def _end(seen: NDArray[np.bool_]) -> int:
    """One behind the last that is seen."""
    return int(np.flatnonzero(seen)[-1]) + 1 if seen.any() else 0


def attend_tiles(
    q_BRTHd: Tensor, k_BRKGd: Tensor, v_BRKGd: Tensor, memory: tuple[Tensor, Tensor] | None, tiles: Tiles, scale: float
) -> Tensor:
    """B x R x T x (H d), as `attend` with the masks that the tiles were made from; queries in no tile get 0."""
    if memory is None:
        B, _, _, G, d = k_BRKGd.shape
        memory = (k_BRKGd.new_zeros(B, G, 0, d), v_BRKGd.new_zeros(B, G, 0, d))
    out: Tensor = _TiledAttention.apply(q_BRTHd * scale, k_BRKGd, v_BRKGd, *memory, tiles)  # type: ignore[no-untyped-call]
    return out.flatten(3)


class _TiledAttention(torch.autograd.Function):
    """Weights of each tile are kept for the backward pass: W = softmax(Q K'), O = W V, dS = W * (dO V' - rowsum(W * dO V'))."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, tiles: Tiles) -> Tensor:
        out, kept = torch.zeros_like(q), []
        G = k.shape[3]
        learns = any(ctx.needs_input_grad)
        with torch.autocast(q.device.type, enabled=False):
            segment: dict[int, tuple[Tensor, Tensor]] = {}
            for tile in tiles.tiles:
                if tile.segment not in segment:
                    segment = {tile.segment: joined(tiles, tile.segment, k, v, (far_k, far_v))}
                keys, values = (x[:, :, tile.columns] for x in segment[tile.segment])
                scores = _rows(q, tile, G) @ keys.transpose(2, 3)
                if tile.hidden_BtN is not None:
                    t = tile.rows.stop - tile.rows.start
                    scores.unflatten(2, (-1, t))[..., tile.hidden_from :].add_(tile.hidden_BtN[:, None, None])
                weights = scores.softmax(-1, dtype=_wide(q)).to(q.dtype)
                _put(out, tile, G, weights @ values)
                if learns:
                    kept.append(weights)
        ctx.save_for_backward(q, k, v, far_k, far_v, *kept)
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, far_k, far_v, *kept = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        G = k.shape[3]
        dq, dk, dv, dfar_k, dfar_v = (torch.zeros_like(x) for x in (q, k, v, far_k, far_v))
        at = 0
        for r, (M, K) in enumerate(zip(tiles.memory, tiles.keys)):
            own = [tile for tile in tiles.tiles if tile.segment == r]
            if not own:
                continue
            keys, values = joined(tiles, r, k, v, (far_k, far_v))
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in own:
                weights, out_gradient = kept[at], _rows(gradient, tile, G)
                at += 1
                dweights = (out_gradient @ values[:, :, tile.columns].transpose(2, 3)).to(_wide(q))
                dscores = torch.ops.aten._softmax_backward_data(dweights, weights.to(dweights.dtype), -1, dweights.dtype).to(q.dtype)
                _put(dq, tile, G, dscores @ keys[:, :, tile.columns])
                dkeys[:, :, tile.columns] += dscores.transpose(2, 3) @ _rows(q, tile, G)
                dvalues[:, :, tile.columns] += weights.transpose(2, 3) @ out_gradient
            for far, near, part in ((dfar_k, dk, dkeys), (dfar_v, dv, dvalues)):
                far[:, :, :M] += part[:, :, :M]
                near[:, r, :K] = part[:, :, M:].transpose(1, 2)
        return dq, dk, dv, dfar_k, dfar_v, None


def joined(tiles: Tiles, r: int, k: Tensor, v: Tensor, memory: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values of a segment, B x G x (M + K) x d."""
    M, K = tiles.memory[r], tiles.keys[r]
    keys, values = (near[:, r, :K].transpose(1, 2) for near in (k, v))
    if memory is None:
        return keys, values
    return torch.cat((memory[0][:, :, :M], keys), dim=2), torch.cat((memory[1][:, :, :M], values), dim=2)


def _rows(x_BRTHd: Tensor, tile: Tile, G: int) -> Tensor:
    """Queries of a tile, B x G x (h t) x d: heads that share a key lie below one another, so keys are not expanded."""
    own = x_BRTHd[:, tile.segment, tile.rows].unflatten(2, (G, -1))
    rows: Tensor = own.permute(0, 2, 3, 1, 4).flatten(2, 3)
    return rows


def _put(x_BRTHd: Tensor, tile: Tile, G: int, rows_BGtd: Tensor) -> None:
    """The inverse of `_rows`."""
    t = tile.rows.stop - tile.rows.start
    x_BRTHd[:, tile.segment, tile.rows] = rows_BGtd.unflatten(2, (-1, t)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

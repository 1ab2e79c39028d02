"""One forward pass over raw tokens and beacons of several rows as index tensors, made from segments of the plan.

A block holds, for each of B rows of the batch, R segments: stretches of queries with the open window they see. Tokens lie flat,
raw tokens first, beacons behind them, so that every projection is one product per kind; attention gathers them by segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beacon.modeling.tiles import Tiles, make_tiles
from beacon.plan import NEW_BEACON, NEW_RAW, Cursor, Entries, Integers, Segment

# B rows, R segments per row, T queries and K keys per segment, N tokens of the block (raw, then beacons), M memory entries, d head size


# few: dense, but what a few queries all see of memory is read in place
Attention = Literal["dense", "few", "tiles", "sdpa", "flex"]
FEW = 4  # queries that read memory as one token does; more of them make products worth their joints


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of positions, for pairs (j, j + d/2)."""

    cos: Tensor
    sin: Tensor

    def flat(self) -> Rotation:
        """B x R x K x d/2 as B x (R K) x d/2."""
        return Rotation(self.cos.flatten(1, 2), self.sin.flatten(1, 2))


@dataclass(frozen=True)
class Queries:
    """Which tokens ask, and where they stand. Batch dimensions of 1 stand for all rows."""

    raw: Tensor | None  # raw tokens that ask, as places among the raw ones (B x n); None: all of them
    beacons: bool
    index_BRT: Tensor | None  # token of each query; None: the tokens in order, one segment
    back_BN: Tensor | None  # query of each token
    rotation: Rotation  # B x R x T x d/2
    local_BRTK: Tensor | None  # None: everything is seen
    memory_BRTM: Tensor | None
    memory_B: Tensor | None  # of few queries: how many entries, from the first on, they all see; None: they differ
    local_B: Tensor | None  # the same of the open window
    tiles: Tiles | None  # instead of both masks
    kind: Attention
    memo: dict[str, Any] = field(default_factory=dict)  # what attention makes of the masks, once for all layers


@dataclass(frozen=True)
class Update:
    """What stays after the block: new memory entries and the open window, as places in [open window | raw | beacons]."""

    memory_BM: Tensor | None  # None: no compaction; -1 behind the entries of a row
    memory_rotation: Rotation | None
    merge_BM: Tensor | None  # places in [memory | new entries] where rows differ in length or lose entries; None: put behind
    shift: Rotation | None  # of merged keys whose place in memory has moved
    append: Append | None  # the same as numbers per row, to be written in place
    open_BK: Tensor | None  # None: all of them in order


@dataclass(frozen=True)
class Append:
    """Memory of `total` entries at most, of which `kept` stay: entries held by each row, those it then loses, and rotations by index."""

    total: int
    kept: int
    held_B: Tensor
    gone_2B: Tensor | None  # first and how many; None: no row loses any
    places: Rotation
    distances: Rotation


@dataclass(frozen=True)
class Block:
    num_raw: int
    num_beacons: int
    main: Queries
    last: Queries | None  # of the last layer; None: nobody asks there
    keys_BRK: Tensor | None  # places in [open window | raw | beacons]; None: all of them in order
    key_rotation: Rotation
    memory_BM: Tensor | None  # new memory entries that later segments of this block see
    memory_rotation: Rotation | None
    update: Update


class Angles:
    """Rotations of positions by the frequencies of a model."""

    def __init__(self, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> None:
        self.frequencies, self.scaling = frequencies, scaling
        # float32 angles, float64 for a float64 model
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def __call__(self, positions: Integers) -> Rotation:
        turned = self.shift(positions)
        return Rotation(turned.cos * self.scaling, turned.sin * self.scaling)

    def shift(self, distances: Integers) -> Rotation:
        """The rotation from one position to another: without the scaling, which was applied before."""
        at = torch.from_numpy(distances).to(self.frequencies.device)
        angle = at[..., None].to(self.dtype) * self.frequencies.to(self.dtype)
        return Rotation(angle.cos(), angle.sin())

    @property
    def device(self) -> torch.device:
        return self.frequencies.device


def make_block(rows: Sequence[Row], keep: Sequence[Integers] | None, angles: Angles, kind: Attention = "dense") -> Block:
    """The block of rows that have been walked; rows that are equal are given once.

    `keep` names per row the raw tokens of this block that the last layer is asked for (None: all). `kind` is how attention
    will be computed.
    """
    num_raw = max(row.num_raw for row in rows)
    num_beacons = max(row.num_beacons for row in rows)
    held_open = max(row.held_open for row in rows)
    held_memory = max(row.held_memory for row in rows)
    new_memory = max(len(row.fresh) for row in rows)
    seen_memory = max(row.seen_memory for row in rows)
    at = _Places(held_open, num_raw)
    segments = max(len(row.segments) for row in rows)
    width = max((len(segment.keys) for row in rows for segment in row.segments), default=1)
    keys = np.zeros((len(rows), segments, width), dtype=np.int64)
    key_pos = np.zeros_like(keys)
    for b, row in enumerate(rows):
        for r, segment in enumerate(row.segments):
            keys[b, r, : len(segment.keys)] = at(segment.keys.source)
            key_pos[b, r, : len(segment.keys)] = segment.key_pos
    everything = held_open + num_raw + num_beacons
    plain = segments == 1 and width == everything and bool((keys == np.arange(everything)).all())
    shape = _Shape(num_raw, num_beacons, width, held_memory, seen_memory)
    fresh = np.zeros((len(rows), seen_memory), dtype=np.int64)
    fresh_pos = np.zeros_like(fresh)
    for b, row in enumerate(rows):
        fresh[b, : row.seen_memory] = at(row.fresh.source[: row.seen_memory])
        fresh_pos[b, : row.seen_memory] = row.held_memory + np.arange(row.seen_memory)
    asked = None if keep is None else [np.asarray(kept) for kept in keep]
    return Block(
        num_raw,
        num_beacons,
        main=_queries(rows, shape, angles, None, beacons=True, kind=kind),
        last=None
        if asked is not None and not any(len(kept) for kept in asked)
        else _queries(rows, shape, angles, asked, beacons=False, kind=kind),
        keys_BRK=None if plain else _tensor(keys, angles),
        key_rotation=angles(key_pos),
        memory_BM=_tensor(fresh, angles) if seen_memory else None,
        memory_rotation=angles(fresh_pos) if seen_memory else None,
        update=_update(rows, at, held_memory, new_memory, everything, angles),
    )


class Row:
    """One row on its way through a block: its cursor, and the segments walked in this call."""

    def __init__(self, cursor: Cursor, segments: Sequence[Segment], held_open: int, held_memory: int) -> None:
        self.cursor, self.segments = cursor, segments
        self.held_open, self.held_memory = held_open, held_memory
        self.num_raw = sum(segment.num_raw for segment in segments)
        self.num_beacons = sum(len(segment.queries) - segment.num_raw for segment in segments)
        self.kept = cursor.held
        self.fresh: Entries = cursor.memory[self.kept :]
        # of the new memory, what some segment of this block sees
        self.seen_memory = max((segment.memory.shape[1] - held_memory for segment in segments), default=0)


@dataclass(frozen=True)
class _Places:
    """Sources of entries to places in [open window | raw | beacons]."""

    held_open: int
    num_raw: int

    def __call__(self, source: Integers) -> Integers:
        raw = np.where(source >= NEW_RAW, source - NEW_RAW + self.held_open, source)
        return np.where(source >= NEW_BEACON, source - NEW_BEACON + self.held_open + self.num_raw, raw)


@dataclass(frozen=True)
class _Shape:
    num_raw: int
    num_beacons: int
    width: int
    held_memory: int
    seen_memory: int


def _queries(
    rows: Sequence[Row], shape: _Shape, angles: Angles, keep: Sequence[Integers] | None, beacons: bool, kind: Attention
) -> Queries:
    """Queries of a layer: all raw tokens or those of `keep`, with the beacons or without."""
    num_raw = shape.num_raw if keep is None else max(len(kept) for kept in keep)
    num_tokens = num_raw + (shape.num_beacons if beacons else 0)
    picked = [[_picked(row, r, None if keep is None else keep[b], beacons) for r in range(len(row.segments))] for b, row in enumerate(rows)]
    segments = max(len(row.segments) for row in rows)
    length = max((len(rows_of) for row in picked for rows_of, _ in row), default=1) or 1
    index = np.zeros((len(rows), segments, length), dtype=np.int64)
    position = np.zeros_like(index)
    back = np.zeros((len(rows), num_tokens), dtype=np.int64)
    local = np.zeros((len(rows), segments, length, shape.width), dtype=bool)
    columns = shape.held_memory + shape.seen_memory
    memory = np.zeros((len(rows), segments, length, columns), dtype=bool)
    # padding sees one key, so that its softmax is a number
    local[..., 0] = True
    for b, row in enumerate(rows):
        for r, (places, tokens) in enumerate(picked[b]):
            segment, count = row.segments[r], len(places)
            if not count:
                continue
            # beacons lie behind all raw tokens of the block
            tokens = np.where(tokens >= NEW_BEACON, tokens - NEW_BEACON + num_raw, tokens)
            index[b, r, :count] = tokens
            position[b, r, :count] = segment.query_pos[places]
            back[b, tokens] = r * length + np.arange(count)
            local[b, r, :count, : segment.local.shape[1]] = segment.local[places]
            local[b, r, :count, segment.local.shape[1] :] = False
            held = min(row.held_memory, segment.memory.shape[1])
            memory[b, r, :count, :held] = segment.memory[places, :held]
            new = segment.memory.shape[1] - row.held_memory
            if new > 0:
                memory[b, r, :count, shape.held_memory : shape.held_memory + new] = segment.memory[places, row.held_memory :]
    plain = segments == 1 and length == num_tokens and bool((index == np.arange(length)).all())
    far, near = (_ends(seen[:, 0], angles) if kind == "few" else None for seen in (memory, local))
    raw = None
    if keep is not None and any(len(kept) != shape.num_raw for kept in keep):
        table = np.zeros((len(rows), num_raw), dtype=np.int64)
        for b, kept in enumerate(keep):
            table[b, : len(kept)] = kept
        raw = _tensor(table, angles)
    tiles = None
    if kind in ("tiles", "sdpa"):
        counts = [max((len(row[r][0]) for row in picked if r < len(row)), default=0) for r in range(segments)]
        tiles = make_tiles(counts, local, memory, angles.dtype, angles.device, rows=None if kind == "tiles" else length)
    return Queries(
        raw,
        beacons and shape.num_beacons > 0,
        None if plain else _tensor(index, angles),
        None if plain else _tensor(back, angles),
        angles(position),
        None if tiles or local.all() else _tensor(local, angles),
        None if tiles or memory.all() else _tensor(memory, angles),
        far,
        near,
        tiles,
        kind,
    )


def _ends(seen_BTK: NDArray[np.bool_], angles: Angles) -> Tensor | None:
    """How many keys all queries of a row see, where they are the first ones and the same for all; else None."""
    ends = seen_BTK[:, 0].sum(-1)
    same = (seen_BTK == (np.arange(seen_BTK.shape[2]) < ends[:, None])[:, None]).all()
    return _tensor(ends, angles).int() if same else None


def _picked(row: Row, r: int, kept: Integers | None, beacons: bool) -> tuple[Integers, Integers]:
    """Of segment r: the queries that ask, and their tokens (raw: number among the asking ones; beacon: from NEW_BEACON)."""
    segment = row.segments[r]
    raw = segment.queries.source[: segment.num_raw] - NEW_RAW
    if kept is None:
        places, tokens = np.arange(segment.num_raw), raw
    else:
        places = np.flatnonzero(np.isin(raw, kept))
        tokens = np.searchsorted(kept, raw[places])
    if not beacons:
        return places, tokens
    others = np.arange(segment.num_raw, len(segment.queries))
    return np.concatenate([places, others]), np.concatenate([tokens, segment.queries.source[others]])


def _update(rows: Sequence[Row], at: _Places, held_memory: int, new_memory: int, everything: int, angles: Angles) -> Update:
    width = max(len(row.cursor.open) for row in rows)
    open_ = np.zeros((len(rows), width), dtype=np.int64)
    memory = np.full((len(rows), new_memory), -1)
    position = np.zeros_like(memory)
    total = max(len(row.cursor.memory) for row in rows)
    merge = np.zeros((len(rows), total), dtype=np.int64)
    shift = np.zeros_like(merge)
    for b, row in enumerate(rows):
        open_[b, : len(row.cursor.open)] = at(row.cursor.open.source)
        memory[b, : len(row.fresh)] = at(row.fresh.source)
        position[b, : len(row.fresh)] = row.kept + np.arange(len(row.fresh))
        old = row.cursor.memory.source[: row.kept]
        merge[b, : row.kept] = old
        merge[b, row.kept : len(row.cursor.memory)] = held_memory + np.arange(len(row.fresh))
        shift[b, : row.kept] = np.arange(row.kept) - old
    ragged = bool((merge != np.arange(total)).any()) or total != held_memory + new_memory
    plain = width == everything and bool((open_ == np.arange(everything)).all())
    return Update(
        _tensor(memory, angles) if new_memory else None,
        angles(position) if new_memory else None,
        _tensor(merge, angles) if ragged and new_memory else None,
        angles.shift(shift) if shift.any() else None,
        _append(rows, total, angles) if new_memory else None,
        None if plain else _tensor(open_, angles),
    )


def _append(rows: Sequence[Row], kept: int, angles: Angles) -> Append:
    held = np.array([row.held_memory for row in rows])
    gone = np.zeros((2, len(rows)), dtype=np.int64)
    for b, row in enumerate(rows):
        moved = np.flatnonzero(row.cursor.memory.source[: row.kept] != np.arange(row.kept))
        gone[:, b] = moved[0] if len(moved) else row.kept, row.held_memory - row.kept
    total = max(row.held_memory + len(row.fresh) for row in rows)
    return Append(
        total,
        kept,
        _tensor(held, angles).int(),
        _tensor(gone, angles).int() if gone[1].any() else None,
        angles(np.arange(total)),
        angles.shift(np.arange(int(gone[1].max()) + 1)),
    )


def _tensor(values: NDArray[Any], angles: Angles) -> Tensor:
    return torch.from_numpy(values).to(angles.device)

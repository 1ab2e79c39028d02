"""One call of a beacon model: blocks of segments until every row is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from beacon.cache import BeaconCache
from beacon.errors import BackendError
from beacon.modeling.block import FEW, Attention, Row, make_block
from beacon.modeling.layer import normed
from beacon.plan import Cursor, Integers, Segment, label_mask, read_documents
from lm_core.errors import InputError

# B rows, T columns (padding included), N raw tokens of a block, D hidden size


@dataclass(frozen=True)
class Hidden:
    """Final hidden states of raw tokens, in the columns of the input; what each predicts counts where `counts` says so."""

    states_BTD: Tensor
    counts_BT: Tensor
    ratio_BT: Tensor  # of the compaction before the token; -1 before the first
    cache: BeaconCache
    beacons: int
    over_capacity: int  # rows with a position that the rotary embedding was not made for


def spans_of(attention_mask: Tensor | None, rows: int, columns: int) -> list[tuple[int, int]]:
    """First and last column (exclusive) of each row's tokens. Raises InputError for padding in between."""
    if attention_mask is None:
        return [(0, columns)] * rows
    found = []
    for b, row in enumerate(attention_mask[:, -columns:].cpu().numpy() != 0):
        at = np.flatnonzero(row)
        first, last = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)
        if last - first != len(at):
            raise InputError(f"attention_mask: row {b} has padding between its tokens; pad rows on one side only")
        found.append((first, last))
    return found


def documents_of(doc_ids: Tensor | None, row: int, first: int, last: int) -> Integers:
    return read_documents(None if doc_ids is None else doc_ids[row, first:last], last - first)


class Walk:
    """One call: blocks of segments until every row is read."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        spans: list[tuple[int, int]],
        documents: list[Integers],
        cache: BeaconCache,
        keep: int | None,
        learning: bool,
    ) -> None:
        self.model, self.input_ids, self.spans, self.documents, self.cache = model, input_ids, spans, documents, cache
        self.learning = learning
        self.read = [0] * len(spans)
        self.first_kept = 0 if keep is None else max(0, input_ids.shape[1] - keep)
        self.segments: list[list[Segment]] = [[] for _ in spans]
        self.pieces: list[tuple[list[Integers], Tensor]] = []  # per block: columns of the kept tokens of each row, their states
        # rows of one length and one document are walked once
        first = cache.cursors[0]
        self.same = all(span == spans[0] for span in spans) and all(_alike(first, cursor) for cursor in cache.cursors[1:])
        self.same = self.same and all(np.array_equal(row, documents[0]) for row in documents[1:])

    @property
    def unread(self) -> bool:
        return any(at < last - first for at, (first, last) in zip(self.read, self.spans))

    def block(self, many: int) -> None:
        """Walk and compute up to `many` windows of every row."""
        rows, tokens = [], []
        for b, cursor in enumerate(self.cache.cursors if not self.same else self.cache.cursors[:1]):
            held_open, held_memory = len(cursor.open), len(cursor.memory)
            cursor.begin()
            segments: list[Segment] = []
            begin, left = self.read[b], self.spans[b][1] - self.spans[b][0]
            # evicted entries leave the cache between two windows
            limit = 1 if cursor.evicts else many
            while self.read[b] < left and len(segments) < limit:
                count = min(cursor.room, left - self.read[b])
                segments.append(cursor.advance(self.documents[b][self.read[b] : self.read[b] + count]))
                self.read[b] += count
            self.segments[b] += segments
            rows.append(Row(cursor, segments, held_open, held_memory))
            tokens.append(self.spans[b][0] + np.arange(begin, self.read[b]))
        if self.same:
            for b in range(1, len(self.spans)):
                self.read[b], self.segments[b] = self.read[0], self.segments[0]
                self.cache.cursors[b].follow(self.cache.cursors[0])
        keep = [np.flatnonzero(columns >= self.first_kept) for columns in tokens]
        states = self._compute(rows, tokens, keep)
        self.pieces.append(([columns[kept] for columns, kept in zip(tokens, keep)], states))

    def _compute(self, rows: list[Row], tokens: list[Integers], keep: list[Integers]) -> Tensor:
        model, cache = self.model.model, self.cache
        angles = self.model.angles()
        block = make_block(rows, keep if self.first_kept else None, angles, self._attention(rows, angles.device.type))
        columns = np.zeros((len(rows), block.num_raw), dtype=np.int64)
        for b, own in enumerate(tokens):
            columns[b, : len(own)] = own
        index = torch.from_numpy(columns).to(self.input_ids.device)
        ids = self.input_ids[:, index[0]] if self.same else self.input_ids.gather(1, index)
        raw = model.embed_tokens(ids)
        beacon = model.beacon_embed_tokens(ids.new_zeros(len(ids), block.num_beacons)).to(raw.dtype)
        # the last keys and values of a training row are read by nobody
        stays = not self.learning or self.unread
        for number, layer in enumerate(model.layers):
            last = number == len(model.layers) - 1
            raw, beacon, k, v = layer(raw, beacon, cache.open[number], cache.memory[number], block=block, last=last)
            if stays:
                cache.store(number, k, v, block)
        return normed(model.norm, raw)

    def _attention(self, rows: list[Row], device: str) -> Attention:
        backend: str = self.model.attn_backend
        if backend == "flex" and device == "cpu" and torch.is_grad_enabled() and self.model.training:
            raise BackendError("attn_impl: flex has no gradients on a CPU; use auto, or sdpa")
        if backend == "eager":
            return "dense"
        single = all(len(row.segments) <= 1 for row in rows)
        if single and all(len(segment.queries) <= FEW for row in rows for segment in row.segments):
            return "few"
        if backend == "auto" and device == "cpu":
            # one window has little to skip
            return "dense" if single else "tiles"
        # FlexAttention knows no tensors without values, on which a step's operations are counted
        return "flex" if backend == "flex" and device != "meta" else "sdpa"

    def hidden(self) -> Hidden:
        """States in the columns of the input, and which predictions count."""
        rows, columns = self.input_ids.shape
        config = self.model.beacon
        counts = np.zeros((rows, columns), dtype=bool)
        ratio = np.full((rows, columns), -1, dtype=np.int64)
        for b, (first, last) in enumerate(self.spans):
            if last == first:
                continue
            sees = np.concatenate([segment.sees_beacon for segment in self.segments[b]])
            counts[b, first:last] = label_mask(self.documents[b], sees, config, self.learning)
            chosen = [-1, *self.cache.cursors[b].ratios]
            ratio[b, first:last] = np.concatenate([np.full(segment.num_raw, chosen[segment.period]) for segment in self.segments[b]])
        device = self.input_ids.device
        flat = [segment for row in self.segments for segment in row]
        limit = self.model.positions
        return Hidden(
            self._states(),
            torch.from_numpy(counts).to(device),
            torch.from_numpy(ratio).to(device),
            self.cache,
            beacons=sum(len(segment.queries) - segment.num_raw for segment in flat),
            over_capacity=sum(any(len(segment.queries) and segment.query_pos.max() >= limit for segment in row) for row in self.segments),
        )

    def _states(self) -> Tensor:
        rows, columns = self.input_ids.shape
        if self.same:
            # all rows lie in the same columns: pieces follow one another
            first, last = self.spans[0]
            found = torch.cat([piece for _, piece in self.pieces], dim=1)
            return F.pad(found, (0, 0, max(first, self.first_kept) if found.shape[1] else 0, columns - last if found.shape[1] else columns))
        states = self.pieces[0][1].new_zeros(rows, columns, self.pieces[0][1].shape[2])
        for places, piece in self.pieces:
            row = torch.from_numpy(np.repeat(np.arange(rows), [len(own) for own in places]))
            slot = torch.from_numpy(np.concatenate([np.arange(len(own)) for own in places]))
            column = torch.from_numpy(np.concatenate(places))
            states = states.index_put((row.to(states.device), column.to(states.device)), piece[row, slot])
        return states


def _alike(one: Cursor, other: Cursor) -> bool:
    """Whether two rows stand at the same place with the same memory, and choose alike."""
    mine, theirs = ((cursor.seen, cursor.compactions, cursor.limit, cursor.before, cursor.ratios) for cursor in (one, other))
    if mine != theirs:
        return False
    pairs = [(one.memory, other.memory), (one.open, other.open)]
    same = all(len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a.columns()[:3], b.columns()[:3])) for a, b in pairs)
    return same and one.ratio == other.ratio

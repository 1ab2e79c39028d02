"""Which query sees which key, and where both sit: pure integers, no model.

A `Cursor` walks over the raw tokens of one row and yields a `Segment` per stretch of tokens that share a window;
`build_plan` joins the segments of a whole row. The model's engines execute the same segments, one at a time or many
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beacon.config import BeaconConfig
from beacon.errors import CapacityError
from lm_core.errors import ConfigError, InputError

# T queries, K keys of the open window, M memory entries
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
RAW, BEACON = 0, 1
# places of keys inside one call: below NEW_RAW an entry of the cache, from there a raw token of the call, from NEW_BEACON a beacon of it
NEW_RAW, NEW_BEACON = 1 << 40, 1 << 41


@dataclass(frozen=True)
class Entries:
    """Keys in order, as columns: kind (RAW or BEACON), place (raw: token; beacon: number from 1), document, and source in this call."""

    kind: Integers
    place: Integers
    document: Integers
    source: Integers

    @classmethod
    def empty(cls) -> Entries:
        return cls(*(np.zeros(0, dtype=np.int64) for _ in range(4)))

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, at: Any) -> Entries:
        return Entries(self.kind[at], self.place[at], self.document[at], self.source[at])

    def __add__(self, other: Entries) -> Entries:
        return Entries(*(np.concatenate(pair) for pair in zip(self.columns(), other.columns())))

    def columns(self) -> tuple[Integers, Integers, Integers, Integers]:
        return self.kind, self.place, self.document, self.source


@dataclass(frozen=True)
class Segment:
    """Raw tokens of one period and the beacons that follow from them: what is computed together.

    Queries are the raw tokens, then the beacons. Keys are the open window (with these tokens), then the memory.
    """

    period: int
    queries: Entries
    query_pos: Integers
    keys: Entries
    key_pos: Integers
    local: Flags  # T x K
    memory: Flags  # T x M
    sees_beacon: Flags  # per raw token: whether it sees a beacon of its own document

    @property
    def num_raw(self) -> int:
        return len(self.sees_beacon)


class Cursor:
    """One row: how far it is read, what its memory and its open window hold."""

    def __init__(
        self,
        config: BeaconConfig,
        ratio: Callable[[int], int],
        limit: int | None = None,
        sliding_window: int | None = None,
        positions: int | None = None,
    ) -> None:
        self.config, self.ratio, self.limit, self.sliding_window = config, ratio, limit, sliding_window
        self.positions = positions  # that the model has; None: limits are not looked at
        self.sizes: list[int] = []  # of the compactions that memory holds, oldest first, sinks aside
        self.seen = 0
        self.compactions = 0
        self.ratios: list[int] = []  # of the compactions so far
        self.memory = Entries.empty()
        self.open = Entries.empty()
        self.before = -1  # document of the last token that left the open window
        self.held = 0  # memory entries that were there when this call began
        self._raw = self._beacons = 0  # new ones in this call

    def begin(self) -> None:
        """Start a call: everything held so far lies in the cache, in order."""
        self._raw = self._beacons = 0
        self.held = len(self.memory)
        self.memory = Entries(*self.memory.columns()[:3], np.arange(len(self.memory)))
        self.open = Entries(*self.open.columns()[:3], np.arange(len(self.open)))

    def follow(self, other: Cursor) -> None:
        """Stand where `other` stands."""
        self.__dict__.update({**vars(other), "ratios": list(other.ratios), "sizes": list(other.sizes)})

    def copied(self) -> Cursor:
        """A cursor at the same place that goes its own way."""
        other = Cursor(self.config, self.ratio, self.limit, self.sliding_window, self.positions)
        other.follow(self)
        return other

    @property
    def uncompacted(self) -> int:
        """Tokens that the compactions so far needed: what cannot be forgotten."""
        return self.start - self.config.stride + self.config.window if self.compactions else 0

    def within(self, seen: int) -> Flags:
        """Which entries of the open window exist when only `seen` tokens are read."""
        ratio = self.ratio(self.compactions) if (self.open.kind == BEACON).any() else 1
        last = np.where(self.open.kind == BEACON, self.start + ratio * self.open.place - 1, self.open.place)
        held: Flags = last < seen
        return held

    def crop(self, seen: int) -> None:
        """Forget all tokens behind the first `seen`, which must not be in memory."""
        assert seen >= self.uncompacted
        self.open = self.open[self.within(seen)]
        self.seen = seen

    @property
    def start(self) -> int:
        """First raw token of the open window."""
        return self.compactions * self.config.stride

    @property
    def room(self) -> int:
        """Raw tokens until the open window is full."""
        return self.start + self.config.window - self.seen

    @property
    def compacts(self) -> bool:
        """Whether the open window will be compacted."""
        return self.limit is None or self.compactions < self.limit

    def advance(self, documents: Integers) -> Segment:
        """The next `len(documents)` raw tokens, at most `room`; compacts the window if they fill it."""
        config, count = self.config, len(documents)
        assert 0 < count <= self.room
        new = Entries(
            np.full(count, RAW), np.arange(self.seen, self.seen + count), documents, NEW_RAW + np.arange(self._raw, self._raw + count)
        )
        first = self.seen - self.start
        self.seen += count
        self._raw += count
        full = self.compacts and self.room == 0
        ratio = self.ratio(self.compactions) if self.compacts and (full or config.pos == "interleave") else 0
        keys = self.open + new
        if ratio and (full or config.pos == "interleave"):
            last = (self.seen - self.start) // ratio if config.pos == "interleave" else config.stride // ratio
            numbers = np.arange(first // ratio + 1 if config.pos == "interleave" else 1, last + 1)
            raw = keys[keys.kind == RAW]
            units = raw.document[numbers * ratio - 1]
            source = NEW_BEACON + np.arange(self._beacons, self._beacons + len(numbers))
            beacons = Entries(np.full(len(numbers), BEACON), numbers, units, source)
            self._beacons += len(numbers)
        else:
            beacons = Entries.empty()
        self._check_positions(full, ratio)
        keys, queries = keys + beacons, new + beacons
        local = _local(config, queries, keys, self.start, ratio, self.sliding_window)
        memory = queries.document[:, None] == self.memory.document[None, :]
        raw_rows = slice(0, count)
        sees = (local[raw_rows] & (keys.kind == BEACON)).any(1) | (memory[raw_rows] & (self.memory.kind == BEACON)).any(1)
        base = len(self.memory)
        segment = Segment(
            self.compactions,
            queries,
            base + _positions(config, queries, self.start, ratio),
            keys,
            base + _positions(config, keys, self.start, ratio),
            local,
            memory,
            sees,
        )
        self.open = keys
        if full:
            self._compact(ratio)
        return segment

    def _compact(self, ratio: int) -> None:
        raw = self.open[self.open.kind == RAW]
        beacons = self.open[self.open.kind == BEACON]
        end = self.start + self.config.stride
        kept = raw[raw.place < end] if ratio == 0 else self._with_sinks(raw, beacons)
        self.memory = self.memory + kept
        self.before = int(raw.document[self.config.stride - 1])
        self.open = raw[raw.place >= end]
        self.compactions += 1
        self.ratios.append(ratio)
        self.sizes.append(self.config.entries(ratio))
        self._make_room()

    # --- limits ---

    @property
    def evicts(self) -> bool:
        """Whether old windows are dropped, which is done one window at a time."""
        budget = self.config.memory_budget is not None and self.config.on_budget == "evict"
        return self.positions is not None and (budget or self.config.on_capacity == "evict")

    def _check_positions(self, full: bool, ratio: int) -> None:
        """Raise CapacityError where the window needs positions that the model does not have."""
        if self.positions is None or self.config.on_capacity != "error":
            return
        beacons = self.config.beacons(ratio) if full else 0
        needed = len(self.memory) + (self.config.window + beacons if full else self.seen - self.start)
        if needed > self.positions:
            fits = [r for r in sorted(set(self.config.usable())) if r and self.config.capacity(r, self.positions) >= self.seen]
            way = f"use ratio {fits[0]}" if fits else "use on_capacity evict, or a shorter text"
            raise CapacityError(
                f"on_capacity: {self.seen} tokens need {needed} positions, the model has {self.positions}; {way}",
                begun=self.compactions > 0,
            )

    def _make_room(self) -> None:
        """Keep to the budget, and to the positions that the next window needs."""
        config = self.config
        if self.positions is None:
            return
        if config.memory_budget is not None and len(self.memory) > config.memory_budget:
            if config.on_budget != "evict":
                raise CapacityError(
                    f"memory_budget: {self.seen} tokens need {len(self.memory)} memory entries, the budget is {config.memory_budget}; "
                    "use a higher ratio, on_budget evict, or a larger budget",
                    begun=True,
                )
            self._evict(config.memory_budget)
        if config.on_capacity == "evict":
            self._evict(self.positions - config.window - config.beacons(self.ratio(self.compactions)))

    def _evict(self, most: int) -> None:
        """Drop whole oldest compactions behind the sinks until memory holds at most `most` entries; the newest one stays."""
        if len(self.memory) <= most:
            return
        if len(np.unique(self.memory.document)) > 1:
            raise CapacityError("memory_budget: a row of several documents cannot be evicted; use on_budget error", begun=True)
        sinks, gone = len(self.memory) - sum(self.sizes), 0
        while len(self.memory) - gone > most and len(self.sizes) > 1:
            gone += self.sizes.pop(0)
        if len(self.memory) - gone > most:
            raise CapacityError(f"on_capacity: {most} positions do not hold the sinks and one compaction; use a smaller window", begun=True)
        kept = np.r_[0:sinks, sinks + gone : len(self.memory)]
        self.memory = self.memory[kept]
        # the newest compaction stays, so all that went was there before this call
        self.held -= gone

    def _with_sinks(self, raw: Entries, beacons: Entries) -> Entries:
        """Beacons, each document's first one preceded by its sinks if the document starts inside the window."""
        kept = Entries.empty()
        for document in np.unique(beacons.document):
            own = raw[raw.document == document]
            inside = len(own) > 0 and (own.place[0] > self.start or document != self.before)
            kept = kept + (own[: self.config.sink_size] if inside else Entries.empty()) + beacons[beacons.document == document]
        return kept


def _local(config: BeaconConfig, queries: Entries, keys: Entries, start: int, ratio: int, sliding_window: int | None) -> Flags:
    """Visibility inside the open window, T x K."""
    query_beacon, key_beacon = queries.kind[:, None] == BEACON, keys.kind[None, :] == BEACON
    query, key = queries.place[:, None], keys.place[None, :]
    offset = key - start
    raw_raw = key <= query
    if sliding_window is not None:
        raw_raw = raw_raw & (query - key < sliding_window)
    raw_beacon = ratio * key <= query - start if config.visible_interleave else np.zeros_like(raw_raw)
    if config.attn == "full-coverage" and config.pos == "append":
        beacon_raw = np.ones_like(raw_raw)
    elif config.attn == "segmentation":
        beacon_raw = (ratio * (query - 1) <= offset) & (offset < ratio * query)
    else:
        beacon_raw = offset < ratio * query
    beacon_beacon = key <= query if config.attend_prev else key == query
    seen = np.where(query_beacon, np.where(key_beacon, beacon_beacon, beacon_raw), np.where(key_beacon, raw_beacon, raw_raw))
    same: Flags = queries.document[:, None] == keys.document[None, :]
    return np.logical_and(seen, same)


def _positions(config: BeaconConfig, entries: Entries, start: int, ratio: int) -> Integers:
    """Positions inside the open window, without the memory in front of it."""
    offset, number = entries.place - start, entries.place
    beacon = ratio * number + (number - 1 if config.attend_prev else 0)
    if config.attn == "full-coverage" and config.pos == "append":
        beacon = config.window + number - 1
    raw = offset + offset // ratio if config.visible_interleave and ratio else offset
    return np.where(entries.kind == BEACON, beacon, raw)


def segments(cursor: Cursor, documents: Integers) -> Iterator[Segment]:
    """Walk over raw tokens, window by window."""
    at = 0
    while at < len(documents):
        count = min(cursor.room, len(documents) - at)
        yield cursor.advance(documents[at : at + count])
        at += count


def label_mask(documents: Integers, sees_beacon: Flags, config: BeaconConfig, training: bool) -> Flags:
    """Per raw token, whether its prediction of the next one counts."""
    counts = np.zeros(len(documents), dtype=bool)
    counts[:-1] = documents[1:] == documents[:-1]
    if training and not config.visible_interleave:
        counts &= sees_beacon
    return counts


def counted_tokens(config: BeaconConfig, documents: Tensor, ratio: Callable[[int], int], limit: int | None) -> Tensor:
    """Per raw token of a row of several documents, whether its prediction counts; `limit` compactions mean training."""
    ids = read_documents(documents, len(documents))
    found = [segment.sees_beacon for segment in segments(Cursor(config, ratio, limit), ids)]
    return torch.from_numpy(label_mask(ids, np.concatenate(found), config, training=limit is not None))


def first_counted(config: BeaconConfig, length: int, ratios: Sequence[int], training: bool) -> int:
    """First token of one document whose prediction counts: in training the first that sees a beacon.

    >>> cfg = BeaconConfig(window=4, stride=4, ratio=[2, 0])
    >>> [first_counted(cfg, 12, ratios, True) for ratios in ([2, 2], [0, 2], [0, 0])]
    [4, 8, 12]
    """
    if not training or config.visible_interleave:
        return 0
    beacons = (i * config.stride + config.window for i, ratio in enumerate(ratios) if ratio)
    return next(beacons, length)


@dataclass(frozen=True)
class Plan:
    """All tokens of a row in processing order, all key copies, and who sees what."""

    tokens: list[tuple[Any, ...]]  # ("x", t) or ("b", i, j)
    keys: list[tuple[Any, ...]]  # ("m", k) for memory copies, then the labels of the tokens, window by window
    key_index: Tensor  # source token of each key
    query_pos: Tensor
    key_pos: Tensor
    memory_length: int
    label_mask: Tensor
    _visible: Flags

    def visible(self) -> Tensor:
        """Whether token i sees key j: bool, tokens x keys."""
        return torch.from_numpy(self._visible)


def build_plan(
    n: int,
    config: BeaconConfig,
    ratios: Sequence[int],
    doc_ids: Sequence[int] | Tensor | None = None,
    training: bool = False,
    sliding_window: int | None = None,
) -> Plan:
    """The plan of `n` raw tokens, with `ratios[i]` for compaction i (at inference with interleave: and one for the open window)."""
    documents = read_documents(doc_ids, n)

    def ratio(i: int) -> int:
        if i >= len(ratios):
            raise ConfigError(f"ratios: {len(ratios)} given, but compaction {i} of {n} tokens needs one; give at least {i + 1}")
        return ratios[i]

    cursor = Cursor(config, ratio, config.compactions(n, training=True) if training else None, sliding_window)
    found = list(segments(cursor, documents))
    # processing order: beacons behind their window, or behind their unit
    orders = [_order(config, segment.queries, segment.period, cursor, ratios) for segment in found]
    tokens: list[tuple[Any, ...]] = []
    where: dict[tuple[Any, ...], int] = {}
    for segment, order in zip(found, orders):
        for label in _labels(segment.queries[order], segment.period):
            where[label] = len(tokens)
            tokens.append(label)
    size = len(cursor.memory)
    by_source = {
        **{NEW_RAW + t: ("x", t) for t in range(n)},
        **{
            int(source): label
            for segment in found
            for source, label in zip(segment.queries.source, _labels(segment.queries, segment.period))
        },
    }
    keys: list[tuple[Any, ...]] = [("m", k) for k in range(size)]
    index = [where[by_source[int(source)]] for source in cursor.memory.source]
    key_pos = list(range(size))
    columns = size + sum(len(segment.keys) for segment in found)
    visible = np.zeros((len(tokens), columns), dtype=bool)
    query_pos = np.zeros(len(tokens), dtype=np.int64)
    row = 0
    for segment, order in zip(found, orders):
        key_order = _order(config, segment.keys, segment.period, cursor, ratios)
        labels = _labels(segment.keys[key_order], segment.period)
        rows, place = slice(row, row + len(order)), slice(len(keys), len(keys) + len(labels))
        visible[rows, : segment.memory.shape[1]] = segment.memory[order]
        visible[rows, place] = segment.local[order][:, key_order]
        query_pos[rows] = segment.query_pos[order]
        keys += labels
        index += [where[label] for label in labels]
        key_pos += segment.key_pos[key_order].tolist()
        row += len(order)
    sees = np.concatenate([segment.sees_beacon for segment in found]) if found else np.zeros(0, dtype=bool)
    mask = label_mask(documents, sees, config, training)
    return Plan(
        tokens,
        keys,
        torch.tensor(index, dtype=torch.int64),
        torch.from_numpy(query_pos),
        torch.tensor(key_pos, dtype=torch.int64),
        size,
        torch.from_numpy(mask),
        visible,
    )


def _order(config: BeaconConfig, entries: Entries, period: int, cursor: Cursor, ratios: Sequence[int]) -> Integers:
    """Raw tokens and beacons of one window in the order in which they are processed."""
    if config.pos == "append" or not (entries.kind == BEACON).any():
        return np.arange(len(entries))
    ratio = ratios[period]
    at = np.where(entries.kind == BEACON, 2 * (period * config.stride + ratio * entries.place) - 1, 2 * entries.place)
    return np.argsort(at, kind="stable")


def _labels(entries: Entries, period: int) -> list[tuple[Any, ...]]:
    pairs = zip(entries.kind.tolist(), entries.place.tolist())
    return [("x", place) if kind == RAW else ("b", period, place) for kind, place in pairs]


def read_documents(doc_ids: Sequence[int] | Tensor | None, n: int) -> Integers:
    """Document of each raw token; one document where nothing is given. Raises InputError unless they never decrease."""
    if doc_ids is None:
        return np.zeros(n, dtype=np.int64)
    documents = np.asarray(doc_ids.tolist() if isinstance(doc_ids, Tensor) else doc_ids, dtype=np.int64)
    if len(documents) != n:
        raise InputError(f"doc_ids: {len(documents)} values for {n} tokens; give one per token")
    if n and (np.diff(documents) < 0).any():
        at = int(np.argmax(np.diff(documents) < 0)) + 1
        raise InputError(
            f"doc_ids: decreases from {documents[at - 1]} to {documents[at]} at token {at}; number documents in the order of the row"
        )
    return documents

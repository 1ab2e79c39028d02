"""How documents share samples: as one stream, packed whole by best fit, or one per sample.

A sample is a dict of one-dimensional int64 arrays, unpadded. Labels are aligned with the inputs; -100 marks no target,
and the first label of every row is -100, as is the first label of every document where documents are isolated.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_core.data.order import Integers, Permutation
from lm_core.data.shards import Source

log = logging.getLogger(__name__)

IGNORE = -100
Row = dict[str, NDArray[np.int64]]

# What a column is padded with; any other is padded with 0. Padding belongs to no document and has no position.
_PADDING = {"labels": IGNORE, "document_ids": -1}


def collate(rows: Sequence[Mapping[str, Any]], pad: int = 0) -> dict[str, Tensor]:
    """Rows of one-dimensional columns to tensors of B x T, padded on the right to the longest row.

    `attention_mask` (1 = real) is added only when a row is padded.
    """
    sizes = [len(row["input_ids"]) for row in rows]
    widest = max(sizes)
    if min(sizes) == widest:
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    out = {}
    for name in rows[0]:
        table = np.full((len(rows), widest), pad if name == "input_ids" else _PADDING.get(name, 0), dtype=np.int64)
        for line, row, size in zip(table, rows, sizes):
            line[:size] = row[name]
        out[name] = torch.from_numpy(table)
    out["attention_mask"] = torch.from_numpy((np.arange(widest) < np.array(sizes)[:, None]).astype(np.int64))
    return out


class Packed:
    """Samples made of the documents of one source."""

    def __init__(self, source: Source, size: int, pad: int) -> None:
        self.source, self.size, self.pad = source, size, pad

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, k: int) -> Row:
        raise NotImplementedError

    def length(self, k: int) -> int:
        """Tokens of sample k, without reading it."""
        raise NotImplementedError

    def epoch(self, number: int) -> Packed:
        """The samples of that pass over the data; the same ones unless packing depends on the order of documents."""
        return self

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(rows, self.pad)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any sample changes."""
        return hashlib.blake2b(f"{type(self).__name__} {self.size} {self.source.fingerprint}".encode(), digest_size=12).hexdigest()


class Stream(Packed):
    """Documents back to back, cut every `size` tokens; each pass joins them in another order when `shuffle` is set.

    What is left at the end of a pass, fewer than `size` tokens, makes a shorter sample with `keep_tail` or when it is
    all there is, and is left out otherwise. `number` tells the orders of several sources apart. With `isolate`, rows have `position_ids` that start again with every
    document, or part of one, so that documents do not see each other.
    """

    def __init__(
        self, source: Source, size: int, pad: int = 0, *,
        keep_tail: bool = False, isolate: bool = False, shuffle: bool = False, seed: int = 0, number: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(source, size, pad)
        self._isolate = isolate
        self._keep_tail, self._shuffle, self._seed, self.number = keep_tail, shuffle, seed, number
        self._total = source.tokens
        self._order: Integers | None = None
        self._ends = np.cumsum(source.length)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any sample changes."""
        return f"{super().fingerprint} isolated" if self._isolate else super().fingerprint

    def __len__(self) -> int:
        whole, rest = divmod(self._total, self.size)
        return whole + (1 if rest > 0 and (self._keep_tail or whole == 0) else 0)

    def length(self, k: int) -> int:
        return min(self.size, self._total - k * self.size)

    def epoch(self, number: int) -> Packed:
        if not self._shuffle or len(self.source) == 1:
            return self
        view = Stream(self.source, self.size, self.pad, keep_tail=self._keep_tail, isolate=self._isolate)
        view._order = Permutation(len(self.source), self._seed, 2, self.number, number)(np.arange(len(self.source)))
        view._ends = np.cumsum(self.source.length[view._order])
        return view

    def __getitem__(self, k: int) -> Row:
        size = self.length(k)
        ids = np.empty(size, dtype=np.int64)
        labels = np.empty(size, dtype=np.int64) if self.source.has_labels else ids
        starts = list[int]()
        at, place = 0, int(np.searchsorted(self._ends, k * self.size, side="right"))
        while at < size:
            document = place if self._order is None else int(self._order[place])
            length = int(self.source.length[document])
            first = k * self.size + at - (int(self._ends[place]) - length)
            last = min(length, first + size - at)
            ids[at : at + last - first] = self.source.read(document, first, last)
            if labels is not ids:
                labels[at : at + last - first] = self.source.labels(document, first, last)
            starts.append(at)
            at, place = at + last - first, place + 1
        if labels is ids:
            labels = ids.copy()
        labels[0] = IGNORE
        if not self._isolate:
            return {"input_ids": ids, "labels": labels}
        labels[starts] = IGNORE
        positions = np.concatenate([np.arange(end - start) for start, end in zip(starts, [*starts[1:], size])])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class BestFit(Packed):
    """Documents whole, as many to a sample as fit; longer ones are cut into pieces of `size`.

    `document_ids` count the pieces of a sample from 0, `position_ids` start again at each.
    """

    def __init__(self, source: Source, size: int, pad: int = 0) -> None:
        super().__init__(source, size, pad)
        pieces = -(-source.length // size)
        self._document = np.repeat(np.arange(len(source)), pieces)
        within = np.arange(len(self._document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._first = within * size
        self._last = np.minimum(self._first + size, source.length[self._document])
        bins = best_fit(self._last - self._first, size)
        self._pieces = np.concatenate([np.array(some, dtype=np.int64) for some in bins])
        self._edges = np.cumsum([0, *(len(some) for some in bins)])
        filled = np.concatenate([[0], np.cumsum((self._last - self._first)[self._pieces])])
        self._length = np.diff(filled[self._edges])

    def __len__(self) -> int:
        return len(self._length)

    def length(self, k: int) -> int:
        return int(self._length[k])

    def __getitem__(self, k: int) -> Row:
        size = self.length(k)
        row = {name: np.empty(size, dtype=np.int64) for name in ("input_ids", "labels", "position_ids", "document_ids")}
        at = 0
        for number, piece in enumerate(self._pieces[self._edges[k] : self._edges[k + 1]]):
            document, first, last = int(self._document[piece]), int(self._first[piece]), int(self._last[piece])
            part = slice(at, at + last - first)
            row["input_ids"][part] = self.source.read(document, first, last)
            row["labels"][part] = self.source.labels(document, first, last)
            row["labels"][at] = IGNORE
            row["position_ids"][part] = np.arange(last - first)
            row["document_ids"][part] = number
            at += last - first
        return row


class OneDocument(Packed):
    """One document per sample; what lies beyond `size` tokens is lost, and said once."""

    def __init__(self, source: Source, size: int, pad: int = 0, *, name: str = "data") -> None:
        super().__init__(source, size, pad)
        lost = int(np.maximum(source.length - size, 0).sum())
        if lost:
            cut = int((source.length > size).sum())
            log.warning(
                "%s: %d of %d tokens lie beyond --max-length %d in %d documents and are not used; --packing stream or best-fit uses them",
                name, lost, source.tokens, size, cut,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.source)

    def length(self, k: int) -> int:
        return min(int(self.source.length[k]), self.size)

    def __getitem__(self, k: int) -> Row:
        size = self.length(k)
        labels = self.source.labels(k, 0, size).astype(np.int64)
        labels[0] = IGNORE
        return {"input_ids": self.source.read(k, 0, size).astype(np.int64), "labels": labels}


def best_fit(lengths: Sequence[int] | Integers, size: int) -> list[list[int]]:
    """Bins of indices whose lengths (1 .. size) sum to at most `size`: longest first, each into the fullest bin it fits.

    >>> best_fit([3, 5, 2], size=5)
    [[1], [0, 2]]
    """
    bins: list[list[int]] = []
    # bins by the space they have left, and a bit for every space that some bin has
    by_space: dict[int, list[int]] = {}
    spaces = 0
    array = np.asarray(lengths, dtype=np.int64)
    for index in np.argsort(-array, kind="stable").tolist():
        length = int(array[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = size, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = space - length
        if left:
            by_space.setdefault(left, []).append(chosen)
            spaces |= 1 << left
    return bins

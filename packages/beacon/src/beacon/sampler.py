"""Rows grouped by their number of windows, as an order over all sources: no row of a batch waits for a longer one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lm_core.data import Rows
from lm_core.data.order import Integers, Permutation

log = logging.getLogger(__name__)

# addresses of the permutations, beside those of core's loader
_TIES, _GROUPS = 17, 18


def grouped(windows: Integers, size: int, mode: Literal["strict", "relaxed"], seed: int) -> Integers:
    """Groups of `size` rows (num_groups x size) by ascending number of windows; ties lie in a keyed order.

    strict: all rows of a group have the same number, and what fills no group is left out. relaxed: neighbours share a group, and
    the last one is filled up with rows of its own.

    >>> grouped(np.array([1, 2, 1, 2, 2]), 2, "strict", 0).shape, grouped(np.array([1, 2, 1, 2, 2]), 2, "relaxed", 0).shape
    ((2, 2), (3, 2))
    """
    order = by_windows(windows, seed)
    if mode == "relaxed":
        whole = len(order) // size * size
        rest = order[whole:]
        if len(rest):
            rest = np.resize(rest, size)
        return np.concatenate([order[:whole], rest]).reshape(-1, size)
    parts = []
    for number in np.unique(windows):
        same = order[windows[order] == number]
        parts.append(same[: len(same) // size * size].reshape(-1, size))
    return np.concatenate(parts)


def by_windows(windows: Integers, seed: int) -> Integers:
    """Rows by ascending number of windows, ties in a keyed order."""
    shuffled = Permutation(len(windows), seed, _TIES)(np.arange(len(windows)))
    return shuffled[np.argsort(windows[shuffled], kind="stable")]


class Ordered:
    """Rows of several sources in one order; with `groups` above 0 every pass permutes the groups of so many rows."""

    def __init__(self, rows: Mapping[str, Rows], order: Integers, *, group: int, seed: int) -> None:
        self._rows, self._order, self._group, self._seed = list(rows.values()), order, group, seed
        self._edges = np.cumsum([0, *(len(part) for part in self._rows)])
        self.dropped = sum(getattr(part, "dropped", 0) for part in self._rows) + int(self._edges[-1]) - len(order)

    def __len__(self) -> int:
        return len(self._order)

    def _place(self, k: int) -> tuple[Any, int]:
        at = int(self._order[k])
        source = int(np.searchsorted(self._edges, at, side="right")) - 1
        return self._rows[source], at - int(self._edges[source])

    def __getitem__(self, k: int) -> Mapping[str, Any]:
        rows, at = self._place(k)
        row: Mapping[str, Any] = rows[at]
        return row

    def length(self, k: int) -> int:
        rows, at = self._place(k)
        return int(rows.length(at))

    def epoch(self, number: int) -> Ordered:
        order = self._order
        if self._group:
            groups = order.reshape(-1, self._group)
            order = groups[Permutation(len(groups), self._seed + number, _GROUPS)(np.arange(len(groups)))].reshape(-1)
        sources = {str(at): rows.epoch(number) if hasattr(rows, "epoch") else rows for at, rows in enumerate(self._rows)}
        return Ordered(sources, order, group=0, seed=self._seed)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self._rows[0].collate(rows)

    @property
    def fingerprint(self) -> str:
        sources = [getattr(rows, "fingerprint", "") for rows in self._rows]
        known = f"{sources} {self._group} {self._seed}".encode() + self._order.tobytes()
        return hashlib.blake2b(known, digest_size=12).hexdigest()

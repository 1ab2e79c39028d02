"""Which source a global sample comes from, and which of that source's samples it is.

Both rules are functions of the sample number and the weights in force, so every rank computes the same answer, and a
resumed run needs the weights and a few integers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from lm_core import counter
from lm_core.data.order import Integers

Draw = Literal["deficit", "keyed"]

_CHUNK = 1024
_KEPT = 256


class _Chunk(NamedTuple):
    first: int
    source: Integers
    before: Integers  # how many samples of the same source came earlier
    taken: list[int]  # per source, before the chunk


class Mix:
    """Assigns sample n to a source.

    "deficit": among the sources behind their share, the one whose next sample is due first. While the weights stay,
    every source has at every n within one sample of its exact share. (Taking simply the largest deficit can be off by
    more than one; the due date is the rule of R. Tijdeman, "The chairman assignment problem", 1980.)
    "keyed": an independent draw per sample, with probabilities equal to the weights.
    """

    def __init__(self, weights: Sequence[float], *, seed: int = 0, draw: Draw = "deficit") -> None:
        self.draw, self._seed = draw, seed
        self._anchor = 0
        self._weights = _normalised(weights)
        self._owed = [0.0] * len(weights)
        self._taken = [0] * len(weights)
        self._chunks: deque[_Chunk] = deque(maxlen=_KEPT)

    @property
    def weights(self) -> list[float]:
        """The shares in force; they sum to 1."""
        return list(self._weights)

    def at(self, n: int) -> tuple[int, int]:
        """(source, number of this sample among the samples of that source)."""
        source, before = self.span(n, n + 1)
        return int(source[0]), int(before[0])

    def span(self, first: int, last: int) -> tuple[Integers, Integers]:
        """`at` for samples first .. last-1, as two arrays. Sample numbers before the last `set_weights` are gone."""
        assert self._anchor <= first <= last
        self._cover(first, last)
        parts = [chunk for chunk in self._chunks if chunk.first < last and chunk.first + len(chunk.source) > first]
        cuts = [slice(max(first - chunk.first, 0), last - chunk.first) for chunk in parts]
        empty = np.empty(0, dtype=np.int64)
        return (
            np.concatenate([empty, *(chunk.source[cut] for chunk, cut in zip(parts, cuts))]),
            np.concatenate([empty, *(chunk.before[cut] for chunk, cut in zip(parts, cuts))]),
        )

    def taken(self, n: int) -> list[int]:
        """How many of the samples before n came from each source."""
        if n == self._anchor:
            return list(self._taken)
        for chunk in self._chunks:
            if chunk.first == n:
                return list(chunk.taken)
        self._cover(n - 1, n)
        chunk = next(chunk for chunk in self._chunks if chunk.first < n <= chunk.first + len(chunk.source))
        counted = np.bincount(chunk.source[: n - chunk.first], minlength=len(self._weights))
        return [before + int(more) for before, more in zip(chunk.taken, counted)]

    def set_weights(self, weights: Sequence[float], from_sample: int) -> None:
        """New shares for samples `from_sample` and later; what a source is owed until then stays owed."""
        fresh = _normalised(weights)
        assert len(fresh) == len(self._weights)
        taken = self.taken(from_sample)
        self._owed = [self._target(source, from_sample) - taken[source] for source in range(len(taken))]
        self._anchor, self._taken, self._weights = from_sample, taken, fresh
        self._chunks.clear()

    def restart(self, weights: Sequence[float], from_sample: int, taken: Sequence[int]) -> None:
        """Begin at a sample with these shares, so many samples taken from each source, and nothing owed."""
        self._weights = _normalised(weights)
        assert len(taken) == len(self._owed)
        self._anchor, self._taken, self._owed = from_sample, list(taken), [0.0] * len(taken)
        self._chunks.clear()

    def state_dict(self, n: int) -> dict[str, Any]:
        """What a run that goes on at sample n needs; JSON-able."""
        anchor = {"sample": self._anchor, "weights": self._weights, "owed": self._owed, "taken": self._taken}
        return {"draw": self.draw, "sample": n, "taken": self.taken(n), "anchor": anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        anchor = state["anchor"]
        assert state["draw"] == self.draw
        assert len(anchor["weights"]) == len(self._weights)
        self._anchor, self._weights = anchor["sample"], list(anchor["weights"])
        self._owed, self._taken = list(anchor["owed"]), list(anchor["taken"])
        self._chunks.clear()
        if state["sample"] > self._anchor:
            # an empty chunk: later ones start from its counts, so nothing before it is computed again
            empty = np.empty(0, dtype=np.int64)
            self._chunks.append(_Chunk(state["sample"], empty, empty, list(state["taken"])))

    def _target(self, source: int, n: int) -> float:
        """The exact share of a source in the samples before n, as a number of samples."""
        return self._taken[source] + self._owed[source] + self._weights[source] * (n - self._anchor)

    def _cover(self, first: int, last: int) -> None:
        if not self._chunks or first < self._chunks[0].first:
            self._chunks.clear()
            self._chunks.append(self._chunk(self._anchor, list(self._taken)))
        while (end := self._chunks[-1].first + len(self._chunks[-1].source)) < last:
            self._chunks.append(self._chunk(end, self.taken(end)))

    def _chunk(self, first: int, taken: list[int]) -> _Chunk:
        if max(self._weights) == 1.0:
            source = np.full(_CHUNK, self._weights.index(1.0), dtype=np.int64)
        elif self.draw == "keyed":
            source = self._keyed(first)
        else:
            source = self._due(first, taken)
        before = np.empty(_CHUNK, dtype=np.int64)
        for which, count in enumerate(taken):
            mine = source == which
            before[mine] = count + np.arange(mine.sum())
        return _Chunk(first, source, before, taken)

    def _keyed(self, first: int) -> Integers:
        drawn = counter.uniform(self._seed, "mix", torch.arange(first, first + _CHUNK), 1).double().numpy().reshape(-1)
        source = np.searchsorted(np.cumsum(self._weights), drawn, side="right")
        # rounding may leave the last sum a little below 1: what lies beyond belongs to the last source with a share
        last = max(index for index, weight in enumerate(self._weights) if weight > 0)
        return np.minimum(source, last).astype(np.int64)

    def _due(self, first: int, taken: list[int]) -> Integers:
        live = [index for index, weight in enumerate(self._weights) if weight > 0]
        taken, source = list(taken), np.empty(_CHUNK, dtype=np.int64)
        for at in range(_CHUNK):
            n = first + at
            best, soonest = -1, math.inf
            for index in live:
                if self._target(index, n + 1) - taken[index] <= 0:
                    continue
                due = (taken[index] + 1 - self._target(index, n)) / self._weights[index]
                if due < soonest:
                    best, soonest = index, due
            if best < 0:
                # after a change of weights a source without a share may hold all that is owed
                best = max(live, key=lambda index: self._target(index, n + 1) - taken[index])
            taken[best] += 1
            source[at] = best
        return source


def _normalised(weights: Sequence[float]) -> list[float]:
    values = [float(weight) for weight in weights]
    total = math.fsum(values)
    if not values or not math.isfinite(total) or min(values) < 0 or total <= 0:
        raise ValueError(f"weights must be finite, not negative and not all zero: {values}")
    return [value / total for value in values]

"""Permutations that need no memory: element n of a keyed bijection, computed on its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lm_core import counter

Integers = NDArray[np.int64]

# Four rounds are enough for pseudo-random functions on large halves; a few bits need more
_ROUNDS = 8
# below this size a sorted table of random keys is cheaper, and the halves of a network would be too small to mix well
_TABLE = 64


class Permutation:
    """A bijection of 0 .. size-1 keyed by (seed, address): a Feistel network that walks until it lands inside.

    >>> sorted(Permutation(5, 0, 3)(np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, seed: int, *address: int) -> None:
        self.size = size
        keys = _mixed(
            np.uint64(counter.derive(seed, "order", *address)) + np.arange(1, max(_ROUNDS, _TABLE) + 1, dtype=np.uint64) * _GOLDEN
        )
        self._keys = keys[:_ROUNDS]
        self._table = np.argsort(keys[:size], kind="stable") if size <= _TABLE else None
        # the smallest even number of bits that covers `size`, so at most a few walks are needed
        self._half = np.uint64((max(size - 1, 1).bit_length() + 1) // 2)

    def __call__(self, at: Integers) -> Integers:
        """Where positions `at` (any shape, each in 0 .. size-1) go."""
        if self._table is not None:
            return self._table[at]
        out = self._once(at.astype(np.uint64))
        while (outside := out >= self.size).any():
            out[outside] = self._once(out[outside])
        return out.astype(np.int64)

    def _once(self, value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mask = (np.uint64(1) << self._half) - np.uint64(1)
        left, right = value >> self._half, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << self._half) | right


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): every output bit depends on every input bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

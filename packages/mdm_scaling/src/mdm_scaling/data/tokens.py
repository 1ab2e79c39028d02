"""Documents of tokens, whatever they are kept in: what the order of samples and the evaluation need of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Documents(Protocol):
    """Documents by number: core's `Source` and `data.indexed.Indexed` are such."""

    @property
    def length(self) -> Any: ...
    @property
    def fingerprint(self) -> str: ...
    def read(self, n: int, first: int, last: int) -> NDArray[Any]:
        """Tokens first .. last-1 of document n."""
        ...


@dataclass(frozen=True)
class Part:
    """Some documents of a store, in their order; the last one may be cut."""

    name: str
    store: Documents
    number: Integers
    length: Integers

    @classmethod
    def of(cls, name: str, store: Documents, first: int = 0, last: int | None = None) -> Part:
        """Documents first .. last-1 of a store."""
        length = np.asarray(store.length, dtype=np.int64)
        number = np.arange(len(length), dtype=np.int64)[first:last]
        return cls(name, store, number, length[number])

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    @property
    def fingerprint(self) -> str:
        """Changes when the documents, their order or where they end changes."""
        seen = hashlib.blake2b(self.store.fingerprint.encode(), digest_size=12)
        seen.update(self.number.tobytes())
        seen.update(self.length.tobytes())
        return seen.hexdigest()

    def first_tokens(self, count: int) -> Part:
        """The documents that hold the first `count` tokens, the last of them cut there."""
        if count >= self.tokens:
            return self
        ends = np.cumsum(self.length)
        last = int(np.searchsorted(ends, count))
        length = self.length[: last + 1].copy()
        length[last] = count - (int(ends[last - 1]) if last else 0)
        return Part(self.name, self.store, self.number[: last + 1], length)

    def gather(self, order: Integers | None, ends: Integers, first: int, last: int) -> Integers:
        """Tokens first .. last-1 of the documents joined in `order` (positions in this part; `ends` are their summed lengths)."""
        out = np.empty(last - first, dtype=np.int64)
        at, place = first, int(np.searchsorted(ends, first, side="right"))
        while at < last:
            document = place if order is None else int(order[place])
            length = int(self.length[document])
            begin = at - (int(ends[place]) - length)
            stop = min(length, begin + last - at)
            out[at - first : at - first + stop - begin] = self.store.read(int(self.number[document]), begin, stop)
            at, place = at + stop - begin, place + 1
        return out

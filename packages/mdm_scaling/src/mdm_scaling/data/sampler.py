"""The order in which a run reads a corpus: Megatron's, so that index arrays are equal to those of its helpers.

S tokens per sample (of which a sample holds S + 1, the last shared with the next), T tokens in the corpus, E epochs.
One RandomState(seed) per corpus draws, in this order: documents of all epochs but a separate last one, documents of that
last one, samples up to that boundary, samples after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lm_core import cache
from lm_core.errors import InputError
from mdm_scaling.data.tokens import Integers, Part

EpochShuffle = Literal["pooled", "per-epoch"]
Packing = Literal["stream", "fixed"]
# A last epoch of which fewer samples than this share are needed is shuffled by itself
SEPARATE_BELOW = 0.8


@dataclass(frozen=True)
class Order:
    """Documents joined in this order, and which of their samples comes when."""

    documents: Integers
    samples: Integers
    epochs: int


def num_epochs(tokens: int, size: int, wanted: int) -> int:
    """The smallest E with floor((E T - 1) / S) >= `wanted`.

    >>> num_epochs(tokens=101, size=10, wanted=10), num_epochs(tokens=100, size=10, wanted=10)
    (1, 2)
    """
    return -(-(wanted * size + 1) // tokens)


def last_is_separate(tokens: int, size: int, wanted: int, epochs: int) -> bool:
    """Whether so little of the last epoch is needed that its documents are shuffled by themselves."""
    if epochs == 1:
        return False
    before = ((epochs - 1) * tokens - 1) // size
    return wanted - before < int(SEPARATE_BELOW * ((tokens - 1) // size))


def build(
    num_documents: int, tokens: int, size: int, wanted: int, seed: int, shuffle: EpochShuffle = "pooled", packing: Packing = "stream"
) -> Order:
    """The order of at least `wanted` samples. With `fixed` packing documents stay in file order and samples are permuted."""
    random = np.random.RandomState(seed)
    if packing == "fixed":
        per_epoch = (tokens - 1) // size
        epochs = -(-wanted // per_epoch)
        return Order(np.arange(num_documents), _shuffled(random, [np.arange(per_epoch)] * epochs, shuffle), epochs)
    epochs = num_epochs(tokens, size, wanted)
    total = (epochs * tokens - 1) // size
    one: NDArray[Any] = np.arange(num_documents, dtype=np.int32 if num_documents < 2**31 else np.int64)
    if shuffle == "per-epoch":
        documents = _shuffled(random, [one] * epochs, "per-epoch")
        # a sample stays in the epoch in which it begins
        edges = [0, *(min((epoch * tokens - 1) // size, total) for epoch in range(1, epochs + 1))]
        samples = _shuffled(random, [np.arange(first, last) for first, last in pairwise(edges)], "per-epoch")
        return Order(documents, samples, epochs)
    separate = last_is_separate(tokens, size, wanted, epochs)
    documents = _shuffled(random, [one] * (epochs - 1 if separate else epochs), "pooled")
    if separate:
        documents = np.concatenate([documents, _shuffled(random, [one], "pooled")])
    edge = ((epochs - 1) * tokens - 1) // size if separate else total
    parts = [np.arange(first, last) for first, last in ((0, edge), (edge, total)) if last > first]
    return Order(documents, _shuffled(random, parts, "per-epoch"), epochs)


def _shuffled(random: np.random.RandomState, parts: Sequence[NDArray[Any]], how: EpochShuffle) -> Integers:
    """All parts shuffled together, or each by itself."""
    groups = [np.concatenate(parts)] if how == "pooled" else [part.copy() for part in parts]
    for group in groups:
        random.shuffle(group)
    return np.concatenate(groups).astype(np.int64)


def cached(part: Part, size: int, wanted: int, seed: int, shuffle: EpochShuffle, packing: Packing) -> Order:
    """`build` for a corpus, kept in the cache and mapped from there."""
    key = cache.key_of("mdm-order-1", part.fingerprint, size, wanted, seed, shuffle, packing)

    def write(folder: Path) -> None:
        order = build(len(part.number), part.tokens, size, wanted, seed, shuffle, packing)
        np.save(folder / "documents.npy", order.documents)
        np.save(folder / "samples.npy", order.samples)
        np.save(folder / "epochs.npy", np.array(order.epochs))

    folder = cache.build("mdm-order", key, write)
    documents, samples = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("documents", "samples"))
    return Order(documents, samples, int(np.load(folder / "epochs.npy")))


def require(part: Part, size: int) -> None:
    """Raise InputError for a corpus without a single sample."""
    if part.tokens < size + 1:
        raise InputError(
            f"data: {part.name} has {part.tokens} tokens, fewer than one sample of {size} and its successor; give more, or lower --seq-length"
        )


def blend(weights: Sequence[float], count: int) -> tuple[Integers, Integers]:
    """(corpus, its sample number) of each of `count` draws: the corpus furthest behind its share, the first on ties.

    >>> blend([0.5, 0.5], 4)[0].tolist()
    [0, 1, 0, 1]
    """
    share = np.asarray(weights, dtype=np.float64)
    share = share / share.sum()
    taken = np.zeros(len(share), dtype=np.int64)
    which, number = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    for i in range(count):
        corpus = int(np.argmax(share * max(i, 1) - taken))
        which[i], number[i] = corpus, taken[corpus]
        taken[corpus] += 1
    return which, number

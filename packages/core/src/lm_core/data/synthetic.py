"""Small made-up corpora, the same on every machine: text with a structure that a tiny model can learn in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from lm_core import counter

DOCUMENTS = 2000

_SYLLABLES = ["ba", "do", "fe", "gi", "ko", "lu", "ma", "ni", "po", "ra", "se", "ti", "vu", "wa", "ye", "zo"]
# Word w is followed by one of four words with these probabilities, so a word costs at most 1.21 nats once the chain is learned.
_CHANCES = (0.5, 0.25, 0.15, 0.1)


def markov() -> Iterator[str]:
    """Sentences of a Markov chain over 64 two-syllable words: 4.16 nats per word from the vocabulary alone, at most 1.21 from the chain."""
    words = np.array([first + second for first in _SYLLABLES[:8] for second in _SYLLABLES[8:]])
    followers = _draw(1, len(words), len(_CHANCES), len(words))
    choices = np.searchsorted(np.cumsum(_CHANCES)[:-1], _draw(2, DOCUMENTS, 96, 1 << 24) / (1 << 24), side="right")
    chain = np.empty_like(choices)
    chain[:, 0] = _draw(3, DOCUMENTS, 1, len(words))[:, 0]
    for at in range(1, chain.shape[1]):
        chain[:, at] = followers[chain[:, at - 1], choices[:, at]]
    for document in words[chain]:
        yield ". ".join(" ".join(document[at : at + 12]) for at in range(0, len(document), 12)) + ".\n"


def copy() -> Iterator[str]:
    """Lines of the form `letters|letters`: everything behind the bar is certain."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    for document in letters[_draw(4, DOCUMENTS, 8 * 12, len(letters))]:
        strings = ["".join(line) for line in document.reshape(8, 12)]
        yield "".join(f"{string}|{string}\n" for string in strings)


def recall() -> Iterator[str]:
    """Eight key-value pairs, then all keys in another order, each to be answered with its value."""
    keys = np.argsort(_draw(5, DOCUMENTS, 100, 1 << 31), axis=1, kind="stable")[:, :8]
    values = _draw(6, DOCUMENTS, 8, 100)
    asked = np.argsort(_draw(7, DOCUMENTS, 8, 1 << 31), axis=1, kind="stable")
    for key, value, order in zip(keys, values, asked):
        given = " ".join(f"k{key[at]:02}=v{value[at]:02}" for at in range(8))
        answers = " ".join(f"k{key[at]:02}>v{value[at]:02}" for at in order)
        yield f"{given}\n{answers}\n"


CORPORA: dict[str, Callable[[], Iterator[str]]] = {"markov": markov, "copy": copy, "recall": recall}


def _draw(purpose: int, rows: int, size: int, below: int) -> NDArray[np.int64]:
    """Integers below `below` (at most 2^31), rows x size; every row has its own place in the stream."""
    index = torch.arange(rows) + (purpose << 32)
    words: torch.Tensor = counter.bits(0, "synthetic", index, size)
    return ((words * below) >> 32).numpy()

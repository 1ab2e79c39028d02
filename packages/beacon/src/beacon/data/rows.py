"""Samples that can teach: long enough for a compaction and a target behind it, all with the same columns."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from beacon.config import BeaconConfig, counted, windows
from lm_core.data.pack import OneDocument, collate
from lm_core.errors import InputError
from lm_core.method import IGNORE

log = logging.getLogger(__name__)


class Kept:
    """Some rows of a source, in their order, with the columns that every source has."""

    def __init__(self, rows: Any, places: Sequence[int], documents: bool) -> None:
        self._rows, self._places, self._documents = rows, places, documents
        self.dropped = len(rows) - len(places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, k: int) -> Mapping[str, Any]:
        row = self._rows[self._places[k]]
        out = {"input_ids": row["input_ids"], "labels": row["labels"]}
        if self._documents:
            # a row that does not say is one document
            out["document_ids"] = row.get("document_ids", np.zeros(len(row["input_ids"]), dtype=np.int64))
        return out

    def length(self, k: int) -> int:
        return int(self._rows.length(self._places[k]))

    def epoch(self, number: int) -> Kept:
        again = getattr(self._rows, "epoch", None)
        return self if again is None else Kept(again(number), self._places, self._documents)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(rows, self._rows.pad)

    @property
    def fingerprint(self) -> str:
        places = np.asarray(self._places, dtype=np.int64).tobytes()
        return hashlib.blake2b(f"{self._rows.fingerprint} {self._documents}".encode() + places, digest_size=12).hexdigest()


def teaching(
    name: str, rows: Any, config: BeaconConfig | None, *, least: int, most: int | None, documents: bool, eos: int | None, chosen: bool
) -> Kept:
    """`rows` without those that are too short or too long, or teach nothing; how many is counted and said.

    `config` is None for a model without beacons. `most` drops longer rows (chat data is never cut). `chosen` says that labels
    are set for some tokens only, so that they have to be looked at. Raises InputError when nothing is left.
    """
    found: dict[str, int] = {"below min_length": 0, "above max_length": 0, "without a target": 0}
    places, lengths = [], []
    for k in range(len(rows)):
        length = rows.length(k)
        if _text_length(rows, k, length, least, eos) < least:
            found["below min_length"] += 1
        elif most is not None and length > most:
            found["above max_length"] += 1
        elif not _teaches(rows, k, length, config, chosen):
            found["without a target"] += 1
        else:
            places.append(k)
            lengths.append(length)
    dropped = ", ".join(f"{count} {reason}" for reason, count in found.items() if count)
    behind = "" if config is None else f" behind a window of {config.window}"
    dropped = dropped.replace("without a target", f"without a target{behind}")
    if not places:
        raise InputError(
            f"data: {name} keeps none of its {len(rows)} samples ({dropped}); "
            "lower the window or min_length, raise max_length, or give longer texts"
        )
    if dropped:
        log.info("%s: %d of %d samples left out (%s)", name, len(rows) - len(places), len(rows), dropped)
    if config is not None:
        counts = Counter(windows(config, lengths))
        log.info("%s: windows per sample %s", name, ", ".join(f"{count} x {size}" for size, count in sorted(counts.items())))
    return Kept(rows, places, documents)


def _teaches(rows: Any, k: int, length: int, config: BeaconConfig | None, chosen: bool) -> bool:
    first = 0 if config is None or config.visible_interleave else config.window
    if config is not None and counted(config, length) == 0:
        return False
    return bool((rows[k]["labels"][first + 1 :] != IGNORE).any()) if chosen else length > first + 1


def _text_length(rows: Any, k: int, length: int, least: int, eos: int | None) -> int:
    """Tokens of the text itself: the end token that was appended does not count where it decides."""
    if length != least or not isinstance(rows, OneDocument) or rows.source.has_labels:
        return length
    return length - int(rows.source.length[k] == length and rows[k]["input_ids"][-1] == eos)

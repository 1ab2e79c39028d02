"""Samples that can teach: long enough for a compaction and a target behind it."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from beacon.config import BeaconConfig, counted, windows
from lm_core.data import Data
from lm_core.data.pack import OneDocument, Packed
from lm_core.errors import InputError

log = logging.getLogger(__name__)


class Kept:
    """Some rows of a source, in their order."""

    def __init__(self, rows: Packed, places: Sequence[int]) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, k: int) -> Mapping[str, Any]:
        return self._rows[self._places[k]]

    def length(self, k: int) -> int:
        return self._rows.length(self._places[k])

    def epoch(self, number: int) -> Kept:
        return Kept(self._rows.epoch(number), self._places)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self._rows.collate(rows)

    @property
    def fingerprint(self) -> str:
        places = np.asarray(self._places, dtype=np.int64).tobytes()
        return hashlib.blake2b(self._rows.fingerprint.encode() + places, digest_size=12).hexdigest()


def teaching(data: Data, config: BeaconConfig, min_length: int, eos: int | None) -> Data:
    """`data` without training rows that are too short, which are counted and said.

    Raises InputError when a source keeps nothing.
    """
    train: dict[str, Any] = {}
    for name, rows in data.train.items():
        assert isinstance(rows, Packed)
        lengths = [rows.length(k) for k in range(len(rows))]
        short = {k for k, length in enumerate(lengths) if _text_length(rows, k, length, min_length, eos) < min_length}
        silent = {k for k, length in enumerate(lengths) if counted(config, length) == 0} - short
        places = [k for k in range(len(rows)) if k not in short and k not in silent]
        if not places:
            raise InputError(
                f"data: {name} keeps none of its {len(rows)} samples ({len(short)} below min_length {min_length}, "
                f"{len(silent)} without a target behind a window of {config.window}); lower the window or min_length, or give longer texts"
            )
        if short or silent:
            log.info(
                "%s: %d of %d samples left out (%d below min_length, %d without a target behind a window of %d)",
                name, len(short) + len(silent), len(rows), len(short), len(silent), config.window,
            )  # fmt: skip
        found = Counter(windows(config, [lengths[k] for k in places]))
        log.info("%s: windows per sample %s", name, ", ".join(f"{count} x {size}" for size, count in sorted(found.items())))
        train[name] = Kept(rows, places)
    valid = {name: Kept(rows, [k for k in range(len(rows)) if rows.length(k) > 1]) for name, rows in data.valid.items()}  # type: ignore[attr-defined, arg-type]
    return replace(data, train=train, valid=valid, weights={name: data.weights[name] for name in train})


def _text_length(rows: Packed, k: int, length: int, least: int, eos: int | None) -> int:
    """Tokens of the text itself: the end token that was appended does not count where it decides."""
    if length != least or not isinstance(rows, OneDocument):
        return length
    return length - int(rows.source.length[k] == length and rows[k]["input_ids"][-1] == eos)

"""Rows of ready token ids in a folder of `datasets` (what `beacon pretrain-data` writes), read memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lm_core.data.order import Permutation
from lm_core.data.pack import collate
from lm_core.errors import InputError
from lm_core.method import IGNORE


def holds_blocks(path: Path) -> bool:
    """Whether `path` was written by `save_to_disk` and its rows are token ids."""
    about = path / "dataset_info.json"
    if not (path / "state.json").is_file() or not about.is_file():
        return False
    try:
        features = json.loads(about.read_text()).get("features") or {}
    except ValueError:
        return False
    return "input_ids" in features


class Blocks:
    """`input_ids`, and `labels` and `doc_ids` where there are any. Samples as those of `lm_core.data.pack`."""

    def __init__(self, path: Path, vocabulary: int, pad: int, samples: int | None = None) -> None:
        import datasets

        try:
            table: Any = datasets.load_from_disk(str(path))
        except Exception as error:  # datasets raises whatever its readers raise
            raise InputError(f"data: {path} cannot be read ({error}); write it again with beacon pretrain-data") from None
        names = [name for name in ("input_ids", "labels", "doc_ids") if name in table.column_names]
        self.path, self.pad, self.has_labels = path, pad, "labels" in names
        self._vocabulary, self._rows = vocabulary, table.select_columns(names).with_format("numpy")
        self._lengths = _lengths(table)
        self._places = np.arange(len(table))
        if samples is not None and samples < len(table):
            self._places = np.sort(Permutation(len(table), 0, 1)(np.arange(samples)))
        self._identity = [str(path.resolve()), table._fingerprint, len(self._places)]

    def __len__(self) -> int:
        return len(self._places)

    def length(self, k: int) -> int:
        return int(self._lengths[self._places[k]])

    def __getitem__(self, k: int) -> dict[str, Any]:
        place = int(self._places[k])
        row = self._rows[place]
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self._vocabulary):
            wrong = ids[(ids < 0) | (ids >= self._vocabulary)][0]
            raise InputError(
                f"data: {self.path}: row {place}: the id {wrong} is outside the vocabulary of {self._vocabulary}; "
                "use the tokenizer that made the data"
            )
        labels = np.asarray(row.get("labels", ids), dtype=np.int64).copy()
        labels[:1] = IGNORE
        out = {"input_ids": ids, "labels": labels}
        if "doc_ids" in row:
            out["document_ids"] = np.asarray(row["doc_ids"], dtype=np.int64)
        if any(len(column) != len(ids) for column in out.values()):
            raise InputError(f"data: {self.path}: row {place} has columns of different lengths; write it again")
        return out

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(rows, self.pad)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self._identity).encode(), digest_size=12).hexdigest()


def _lengths(table: Any) -> np.ndarray[Any, Any]:
    if "length" in table.column_names:
        return np.asarray(table.with_format("numpy")["length"][:], dtype=np.int64)
    import pyarrow.compute

    # offsets of the lists: no token is read; a selection of rows is not stored in order and is read row by row
    if table._indices is not None:
        return np.array([len(row) for row in table["input_ids"]], dtype=np.int64)
    return np.asarray(pyarrow.compute.list_value_length(table.data.column("input_ids")), dtype=np.int64)

"""The likeliest tokens of a teacher for every position of the data, on disk: stage 2 without the teacher in memory.

`index.json` says what teacher, tokenizer and rows there are; `NNNNN.safetensors` hold, for the positions of many rows, `ids` (int32) and
`logp` (float16) of the K likeliest tokens at temperature 1, and `rest`, the logarithm of the remaining mass. M positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm_core.data.vocab import fingerprint
from lm_core.errors import InputError
from lm_core.method import Batch

FORMAT = 1


def keys(batch: Batch) -> list[tuple[str, Tensor]]:
    """Hash of every row and where (T, bool) its tokens are: equal rows have equal hashes, however they are padded."""
    ids, mask, documents = batch["input_ids"].cpu(), batch.get("attention_mask"), batch.get("document_ids")
    found = []
    for n in range(len(ids)):
        real = torch.ones_like(ids[n], dtype=torch.bool) if mask is None else mask[n].cpu().bool()
        content = ids[n][real].numpy().tobytes() + (b"" if documents is None else documents[n].cpu()[real].numpy().tobytes())
        found.append((hashlib.blake2b(content, digest_size=12).hexdigest(), real))
    return found


class TeacherCache:
    """Reads what `cache_teacher.write` wrote. Raises InputError for a folder of another tokenizer or format."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        try:
            index = json.loads((folder / "index.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"teacher_cache: {folder} holds no index.json that can be read ({error}); write it with cache-teacher"
            ) from None
        if index.get("format") != FORMAT:
            raise InputError(f"teacher_cache: {folder} is of format {index.get('format')}, not {FORMAT}; write it again with cache-teacher")
        if index["tokenizer_sha256"] != fingerprint(tokenizer):
            raise InputError(f"teacher_cache: {folder} was made with another tokenizer than this run's; write it again with cache-teacher")
        self.folder, self.columns, self.top_k = folder, int(index["columns"]), int(index["top_k"])
        self._places: dict[str, list[int]] = index["rows"]
        self._files: dict[int, Any] = {}

    def of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, logp, rest) of every position of the batch, [B T, K] and [B T]; padding holds anything. Raises InputError for other rows."""
        device = batch["input_ids"].device
        rows, time = batch["input_ids"].shape
        width = min(self.top_k, self.columns)
        ids = torch.arange(width, dtype=torch.int32).repeat(rows, time, 1)
        logp = torch.full((rows, time, width), -math.log(self.columns), dtype=torch.float16)
        rest = torch.zeros(rows, time)
        if device.type != "meta":
            for n, (key, real) in enumerate(keys(batch)):
                if key not in self._places:
                    raise InputError(
                        f"teacher_cache: {self.folder} lacks a row of this run; write it again with the data, packing, max_length, "
                        "tokenizer and seed of this run, and for as many tokens and one pass"
                    )
                file, first, last = self._places[key]
                for target, name in ((ids, "ids"), (logp, "logp"), (rest, "rest")):
                    target[n, real] = self._open(file).get_slice(name)[first:last]
        return ids.flatten(0, 1).to(device), logp.flatten(0, 1).to(device), rest.flatten().to(device)

    def _open(self, number: int) -> Any:
        if number not in self._files:
            path = self.folder / f"{number:05}.safetensors"
            try:
                self._files[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(f"teacher_cache: {path} cannot be read ({error}); write it again with cache-teacher") from None
        return self._files[number]

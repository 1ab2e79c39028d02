"""What the three stages share: where their rows come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_core import cache
from lm_core.data import Data, build_data, shards
from lm_core.data.shards import Document, ShardWriter, key_of
from lm_core.data.sources import Corpus
from lm_core.method import Method
from rwkv_distill import binidx
from rwkv_distill.config import TrainConfig
from rwkv_distill.fla import use_fla
from rwkv_distill.rows import open_rows
from rwkv_distill.student import StudentModel

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from lm_core.data import Rows
    from lm_core.data.shards import Source


class StudentMethod(Method):
    """A stage: rows of text, chats, prompts with completions, or token ids."""

    config: TrainConfig
    resumable = frozenset({"max_trained_tokens", "max_epochs", "lr_final", "ckpt_file", "num_nodes", "wkv"})

    def data(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        return student_data(self.config, tokenizer)


def new_student(config: TrainConfig, teacher: Any) -> StudentModel:
    """The untrained student of a teacher, with the recurrences that `config` names."""
    student = StudentModel.from_teacher(teacher, config.student)
    if config.wkv == "fla":
        use_fla(student)
    return student


def student_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The rows that `config` names, padded on the side that it names."""
    vocab = len(tokenizer)
    pairs = {name: prefix for name in config.preprocessed_data if (prefix := binidx.prefix_of(name)) is not None}
    paths = [str(shards_of_pair(pairs[name], vocab)) if name in pairs else name for name in config.data]

    def opened(corpus: Corpus) -> Source:
        ready = bool(config.preprocessed_data) and corpus.argument.source in paths
        return open_rows(corpus, tokenizer, config.text_column, ready=ready)

    data = build_data(replace(config, data=paths, preprocessed_data=[]), tokenizer, opened)
    if config.padding_side == "right":
        return data
    return replace(data, train=_padded_left(data.train), valid=_padded_left(data.valid))


def shards_of_pair(prefix: Path, vocab_size: int) -> Path:
    """A `.bin`/`.idx` pair as token shards, made once and kept in the cache."""

    def write(folder: Path) -> None:
        with ShardWriter(folder, vocab_size=vocab_size) as writer:
            for ids in binidx.read(prefix):
                if len(ids):
                    writer.add(Document(ids, None, key_of(ids.tobytes())))
                writer.mark(1)
            writer.close(source=str(prefix))

    stats = [prefix.with_name(prefix.name + suffix).stat() for suffix in (".bin", ".idx")]
    key = cache.key_of(shards.FORMAT, "binidx", str(prefix.resolve()), [[stat.st_size, stat.st_mtime_ns] for stat in stats], vocab_size)
    return cache.build("shards", key, write)


def _padded_left(sources: Mapping[str, Rows]) -> dict[str, Rows]:
    return {name: LeftPadded(rows) for name, rows in sources.items()}


class LeftPadded:
    """Rows whose padding stands before them."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.fingerprint = rows.fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, k: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._rows[k]
        return row

    def length(self, k: int) -> int:
        return int(self._rows.length(k))

    def epoch(self, number: int) -> LeftPadded:
        return LeftPadded(self._rows.epoch(number))

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self._rows.collate(rows)
        if "attention_mask" not in batch:
            return batch
        missing = (batch["attention_mask"] == 0).sum(1, keepdim=True)
        width = batch["input_ids"].shape[1]
        # what lies behind a row moves before it
        place = (torch.arange(width) - missing) % width
        return {name: value.gather(1, place) for name, value in batch.items()}

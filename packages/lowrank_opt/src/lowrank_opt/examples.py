"""Labelled texts as samples: local files or the GLUE benchmark, tokenized, padded to the longest of a batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lm_core.data import Data
from lm_core.data.pack import collate
from lm_core.data.sources import Row, parse, resolve
from lm_core.errors import InputError
from lowrank_opt.config import TrainConfig
from lowrank_opt.tasks import HUB, TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# examples n with n mod 20 = 19 are held out where no other data are named
HELD_OUT_EVERY = 20


class Examples:
    """Tokenized texts with one label each; `input_ids` are cut to `max_length`."""

    def __init__(self, ids: Sequence[Sequence[int]], labels: Sequence[float], pad: int) -> None:
        self.ids, self.labels, self.pad = ids, labels, pad

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {"input_ids": np.asarray(self.ids[k], dtype=np.int64), "label": self.labels[k]}

    def length(self, k: int) -> int:
        return len(self.ids[k])

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of B x T, `labels` of B."""
        tensors = collate([{"input_ids": row["input_ids"]} for row in rows], self.pad)
        tensors.setdefault("attention_mask", torch.ones_like(tensors["input_ids"]))
        return {**tensors, "labels": torch.tensor([row["label"] for row in rows], dtype=torch.float64)}

    @property
    def fingerprint(self) -> str:
        """Changes when any sample changes."""
        digest = hashlib.blake2b(digest_size=12)
        for ids, label in zip(self.ids, self.labels):
            digest.update(np.asarray([*ids, -1], dtype=np.int64).tobytes() + np.float64(label).tobytes())
        return digest.hexdigest()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding id, else its end of text."""
    found = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return int(found)


def build(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Examples of --data and --eval-data for the task; without --data those of the benchmark, from the hub.

    Raises InputError naming file and line for a missing column and for a label that the task does not have.
    """
    task = TASKS[config.task]
    train_rows: dict[str, list[Row]] = {}
    valid_rows: dict[str, list[Row]] = {}
    for text in config.data or [f"{HUB}:{config.task}:train"]:
        train_rows[parse(text).name] = rows_of(text)
    if config.eval_data:
        for text in config.eval_data:
            valid_rows[parse(text).name] = rows_of(text)
    elif not config.data:
        for split in task.validation:
            valid_rows[split] = rows_of(f"{HUB}:{config.task}:{split}")
    elif config.hold_out > 0:
        for name, rows in list(train_rows.items()):
            if len(rows) < 2:
                raise InputError(f"data: {name} has {len(rows)} example, too few to hold any out; give more, or --eval-data")
            held = [row for n, row in enumerate(rows) if n % HELD_OUT_EVERY == HELD_OUT_EVERY - 1] or rows[-1:]
            train_rows[name] = [row for row in rows if row not in held]
            valid_rows[name] = held
    train = {name: examples(rows, config, task, tokenizer) for name, rows in train_rows.items()}
    valid = {name: examples(rows, config, task, tokenizer) for name, rows in valid_rows.items()}
    return Data(train=train, valid=valid, weights={name: float(len(rows)) for name, rows in train.items()})


def rows_of(text: str) -> list[Row]:
    argument = parse(text)
    corpus = resolve(argument)
    rows = [row for _, row in zip(range(argument.samples), corpus.rows())] if argument.samples else list(corpus.rows())
    if not rows:
        raise InputError(f"data: {argument.source} holds no example")
    return rows


def examples(rows: Sequence[Row], config: TrainConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Rows as samples."""
    count = config.num_labels or task.labels
    columns = next((names for names in (task.plain, task.columns) if all(name in rows[0].fields for name in names)), None)
    if columns is None or "label" not in rows[0].fields:
        raise InputError(
            f"data: {rows[0].where} has the columns {', '.join(rows[0].fields)}; --task {config.task} reads {', '.join(task.plain)} and label"
        )
    ids, labels = [], []
    for row in rows:
        ids.append(tokens(tokenizer, [str(row.fields[name]) for name in columns], config.max_length))
        labels.append(label_of(row, count))
    return Examples(ids, labels, pad_id(tokenizer))


def label_of(row: Row, count: int) -> float:
    """The label as a number: a whole one below `count`, any for a regression."""
    try:
        label = float(row.fields["label"])
    except (TypeError, ValueError, KeyError):
        label = math.nan
    if not math.isfinite(label) or (count > 1 and label not in range(count)):
        wanted = "a number" if count == 1 else f"one of 0 to {count - 1}"
        raise InputError(f"data: {row.where} has the label {row.fields.get('label')!r}, which is not {wanted}; correct it, or --num-labels")
    return label


def tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[int]:
    """One text or a pair as the tokenizer joins them; where it has no rule for that, begin, text, end, text."""
    if tokenizer.num_special_tokens_to_add(pair=len(texts) > 1) > 0:
        return list(tokenizer(*texts, truncation=True, max_length=max_length).input_ids)
    parts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id) else []
    room = max_length - len(begin) - (len(parts) - 1)
    while sum(map(len, parts)) > room:
        max(parts, key=len).pop()
    joined = [*begin, *parts[0]]
    for part in parts[1:]:
        joined += [tokenizer.eos_token_id, *part]
    # an empty text still is an example
    return joined or [tokenizer.eos_token_id]

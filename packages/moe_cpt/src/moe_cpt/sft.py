"""Supervised tuning on conversations: the loss counts what the assistant says, and nothing else."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lm_core.data import FIXED_HOLD_OUT, Data
from lm_core.data.pack import collate
from lm_core.data.shards import key_of
from lm_core.data.sources import Row, parse, resolve
from lm_core.errors import ConfigError, InputError
from lm_core.method import IGNORE
from moe_cpt.config import SFTConfig
from moe_cpt.data import expanded, first_file
from moe_cpt.method import MoeCPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = {"human": "USER:", "gpt": "ASSISTANT:"}
Columns = dict[str, NDArray[np.int64]]


class SupervisedTuning(MoeCPT):
    """MoeCPT on conversations."""

    config: SFTConfig

    def data(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        self._words = tokenizer
        data = conversations(self.config, tokenizer)
        self._sources = list(data.train)
        return data


@dataclass(frozen=True)
class Conversation:
    """A text in the template `system USER: ... ASSISTANT: ...<eos>`, and where in it the assistant speaks (characters)."""

    text: str
    answers: tuple[tuple[int, int], ...]


def conversation_of(row: Row, eos: str) -> Conversation:
    """The conversation of a row: its `conversations`, or its title as the question and its text as the answer."""
    fields = row.fields
    turns = fields.get("conversations")
    if turns is None and {"title", "text"} <= fields.keys():
        turns = [{"from": "human", "value": fields["title"]}, {"from": "gpt", "value": fields["text"]}]
    if not isinstance(turns, list):
        raise InputError(f"data: {row.where} has no conversations; write rows with a list of turns, each with from and value")
    text, answers = str(fields.get("system_prompt") or SYSTEM), list[tuple[int, int]]()
    for turn in turns:
        role = turn.get("from") if isinstance(turn, Mapping) else None
        if role not in ROLES or not isinstance(turn.get("value"), str):
            raise InputError(f"data: {row.where}: a turn is from {role!r}; each needs from (human or gpt) and a text as value")
        # a new question follows the end token of the last answer directly
        text += ("" if answers and role == "human" else " ") + ROLES[role]
        start = len(text)
        text += " " + turn["value"].strip()
        if role == "gpt":
            text += eos
            answers.append((start, len(text)))
    return Conversation(text, tuple(answers))


def encoded(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, length: int) -> Columns:
    """Ids of at most `length` tokens, and labels of those that lie within an answer, by their place in the text."""
    found: Any = tokenizer(conversation.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(found["input_ids"], dtype=np.int64)
    labels = np.full_like(ids, IGNORE)
    for at, (start, end) in enumerate(found["offset_mapping"]):
        if any(first <= start < end <= last for first, last in conversation.answers):
            labels[at] = ids[at]
    labels[:1] = IGNORE
    return {"input_ids": ids[:length], "labels": labels[:length]}


class Conversations:
    """One conversation per sample."""

    def __init__(self, rows: Sequence[Columns], pad: int) -> None:
        self._rows, self._pad = rows, pad

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, k: int) -> Columns:
        return self._rows[k]

    def length(self, k: int) -> int:
        return len(self._rows[k]["input_ids"])

    @property
    def fingerprint(self) -> str:
        """Changes when any sample changes."""
        seen = hashlib.blake2b(digest_size=12)
        for row in self._rows:
            seen.update(row["input_ids"].tobytes() + row["labels"].tobytes())
        return seen.hexdigest()

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(rows, self._pad)


def conversations(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Conversations of `data` and `eval_data` by source; without the latter the held-out part of each source."""
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise ConfigError("tokenizer: tuning needs a fast tokenizer with an end token; name another one")
    train: dict[str, Conversations] = {}
    valid: dict[str, Conversations] = {}
    for arguments, held_out in ((config.data, False), (config.eval_data, True)):
        for argument in expanded(arguments):
            name = parse(argument).name
            kept, held = list[Columns](), list[Columns]()
            for is_held, row in _rows(argument, config, tokenizer):
                (held if held_out or is_held else kept).append(row)
            if not held_out:
                train[name] = _described(kept, name, config, tokenizer)
            if held and (held_out or not config.eval_data):
                valid[name] = _described(held, f"held-out {name}", config, tokenizer)
    if not train:
        raise ConfigError("data: nothing to train on; give --data, for example --data builtin:python-docs")
    return Data(train=train, valid=valid, weights={name: float(len(rows)) for name, rows in train.items()})


def _rows(argument: str, config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, Columns]]:
    """Whether it is held out, and the columns, of every conversation; one token more than fits shows that it was cut."""
    corpus = resolve(parse(argument))
    corpus = first_file(corpus) if config.debug_mode else corpus
    share = FIXED_HOLD_OUT if corpus.fixed else config.hold_out
    most = corpus.argument.samples
    for number, row in enumerate(corpus.rows()):
        if most is not None and number >= most:
            return
        made = conversation_of(row, str(tokenizer.eos_token))
        yield key_of(made.text) >= (1 - share) * 2.0**64, encoded(made, tokenizer, config.max_length + 1)


def _described(rows: Sequence[Columns], name: str, config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Conversations:
    """The rows that hold an answer, cut to the length; says how many were cut and left out."""
    cut = [{column: values[: config.max_length] for column, values in row.items()} for row in rows]
    kept = [row for row in cut if (row["labels"] != IGNORE).any()]
    long = sum(len(row["input_ids"]) > config.max_length for row in rows)
    if long or len(kept) < len(rows):
        logger.warning(
            "%s: %d of %d conversations are cut at %d tokens, %d hold no answer before that and are left out",
            name, long, len(rows), config.max_length, len(rows) - len(kept),
        )  # fmt: skip
    if not kept:
        raise InputError(
            f"data: {name} has no conversation with an answer within {config.max_length} tokens; give others, or a larger length"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Conversations(kept, int(pad))

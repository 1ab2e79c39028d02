"""Rows of any kind to documents with labels: text, chats, prompts with completions, ready token ids. The kind is seen row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_core import cache
from lm_core.data import shards, vocab
from lm_core.data.shards import Document, ShardWriter, Source
from lm_core.data.sources import Corpus, Row
from lm_core.data.tokenize import TextEncoder, open_corpus, write_rows
from lm_core.errors import InputError
from lm_core.method import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# beside a saved dataset
ABOUT = "rwkv_distill.json"
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_VERSION = 1


def open_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, text_column: str, *, ready: bool = False, workers: int = 1) -> Source:
    """The documents of a corpus as tokens and labels; made once, then read from the cache. `ready` accepts token ids alone.

    Raises InputError for rows that cannot be used, by file and row.
    """
    if corpus.fixed or corpus.folder is not None:
        # built-in text, and shards
        return open_corpus(corpus, tokenizer, text_column=text_column, workers=workers)
    identity = vocab.fingerprint(tokenizer)
    shifted = labels_are_shifted(Path(corpus.argument.source).expanduser())
    encode = RowEncoder(tokenizer, text_column, ready=ready, shifted=shifted)

    def write(folder: Path) -> None:
        with ShardWriter(folder, vocab_size=len(tokenizer), labels=True) as writer:
            write_rows(writer, segments(corpus.rows()), encode, workers=workers, count=corpus.count, title=corpus.argument.name)
            writer.close(tokenizer_sha256=identity, source=corpus.argument.source)

    template = getattr(tokenizer, "chat_template", None)
    key = cache.key_of(shards.FORMAT, "rows", _VERSION, corpus.identity, identity, text_column, template, ready, shifted)
    source = Source.open(cache.build("shards", key, write, resume=True))
    if not source.tokens:
        raise InputError(f"data: {corpus.argument.source} holds no row with anything in it; name another source")
    return source


def labels_are_shifted(folder: Path) -> bool:
    """Whether the labels of a saved dataset stand one place before their tokens, as its metadata says."""
    about = folder / ABOUT
    return about.is_file() and bool(json.loads(about.read_text()).get("labels_shifted"))


def segments(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows, those that were packed already taken apart: their segments are documents."""
    for row in rows:
        numbers = row.fields.get("segment_ids")
        if numbers is None or "input_ids" not in row.fields:
            yield row
            continue
        columns = {name: row.fields[name] for name in ("input_ids", "labels", "attention_mask") if row.fields.get(name) is not None}
        for name, values in columns.items():
            if len(values) != len(numbers):
                raise InputError(f"data: {row.where}: {name} has {len(values)} entries and segment_ids {len(numbers)}; correct the row")
        edges = [0, *(t for t in range(1, len(numbers)) if numbers[t] != numbers[t - 1]), len(numbers)]
        for first, last in pairwise(edges):
            yield row._replace(fields={name: values[first:last] for name, values in columns.items()})


class RowEncoder:
    """Rows to documents: what a document teaches has a label, the rest (prompts, other speakers) has -100. None for empty rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_column: str, *, ready: bool = False, shifted: bool = False) -> None:
        self._tokenizer, self._column, self._ready, self._shifted = tokenizer, text_column, ready, shifted
        self._text = TextEncoder(tokenizer, text_column)

    def __call__(self, rows: Sequence[Row]) -> list[Document | None]:
        texts = [row for row in rows if self._column in row.fields and not self._ready]
        documents = iter(self._text(texts))
        plain = {id(row) for row in texts}
        return [_taught_throughout(next(documents)) if id(row) in plain else self._document(row) for row in rows]

    def _document(self, row: Row) -> Document | None:
        fields = row.fields
        if self._ready and "input_ids" not in fields:
            raise InputError(f"data: {row.where} has no input_ids (found: {_names(fields)}); give raw text with --raw-data")
        if "input_ids" in fields:
            return self._of_ids(row)
        if "messages" in fields or "conversations" in fields:
            messages = _messages(row)
            return self._chat(messages, row) if any(message["content"] for message in messages) else None
        if "prompt" in fields and "completion" in fields:
            return self._completion(row)
        raise InputError(
            f"data: {row.where} has no field that is known (found: {_names(fields)}); give {self._column}, messages, conversations, "
            "prompt and completion, or input_ids; --text-column names another text"
        )

    def _of_ids(self, row: Row) -> Document | None:
        mask = row.fields.get("attention_mask")
        found = self._text([row._replace(fields={name: row.fields.get(name) for name in ("input_ids", "labels")})])[0]
        if found is None:
            return None
        ids, labels = np.asarray(found.ids), None if found.labels is None else np.asarray(found.labels)
        if labels is not None and labels.shape != ids.shape:
            raise InputError(f"data: {row.where}: {labels.size} labels for {ids.size} input_ids; give one per id, -100 for no target")
        if labels is not None and self._shifted:
            labels = np.concatenate([[IGNORE], labels[:-1]])
        if mask is not None:
            if len(mask) != len(ids):
                raise InputError(f"data: {row.where}: attention_mask has {len(mask)} entries for {ids.size} input_ids; correct the row")
            real = np.asarray(mask, dtype=bool)
            ids, labels = ids[real], None if labels is None else labels[real]
        return None if not ids.size else Document(ids, ids if labels is None else labels, found.key)

    def _completion(self, row: Row) -> Document | None:
        prompt, completion = (row.fields[name] or "" for name in ("prompt", "completion"))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise InputError(f"data: {row.where}: prompt and completion are not both texts; correct the row")
        if not completion:
            return None
        first, second = (self._ids(text) for text in (prompt, completion))
        end = [] if self._tokenizer.eos_token_id is None else [int(self._tokenizer.eos_token_id)]
        return Document([*first, *second, *end], [IGNORE] * len(first) + [*second, *end], shards.key_of(f"{prompt}\0{completion}"))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _chat(self, messages: list[dict[str, str]], row: Row) -> Document:
        """The chat as the tokenizer's template writes it; what an assistant says has labels, up to the mark of its end."""
        text = render(self._tokenizer, messages)
        taught: list[tuple[int, int]] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render(self._tokenizer, messages[:place], answer=True) if place else ""
            behind = render(self._tokenizer, messages[: place + 1])
            if not (text.startswith(behind) and behind.startswith(before)):
                raise InputError(
                    f"data: {row.where}: this tokenizer's chat template rewrites earlier turns, so answers cannot be told apart; "
                    "give rows of prompt and completion"
                )
            taught.append((len(before), len(behind)))
        encoding: Any = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoding["input_ids"])
        inside = [any(first <= start < last for first, last in taught) for start, _ in encoding["offset_mapping"]]
        return Document(ids, [token if own else IGNORE for token, own in zip(ids, inside)], shards.key_of(text))


def render(tokenizer: Any, messages: list[dict[str, str]], *, answer: bool = False) -> str:
    """A chat as text; with `answer` up to where the assistant begins. Raises InputError where the tokenizer has no template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("tokenizer: it has no chat template, which chats need; use the tokenizer of a chat model, or rows of text")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))


def _messages(row: Row) -> list[dict[str, str]]:
    """The turns of a chat, by role and content."""
    messages = row.fields.get("messages")
    keys = ("role", "content")
    if messages is None:
        messages, keys = row.fields["conversations"], ("from", "value")
    return check_messages(messages or [], row.where, keys)


def check_messages(messages: Any, where: str, keys: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    """Turns with the roles system, user and assistant. Raises InputError that names the place of any other."""
    found = []
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, Mapping) or any(not isinstance(message.get(key), str) for key in keys):
            raise InputError(f"data: {where}: a turn is no pair of {keys[0]} and {keys[1]}; correct the chat")
        if message[keys[0]] not in ROLES:
            raise InputError(f"data: {where}: the role {message[keys[0]]!r} is unknown; use {', '.join(ROLES)}")
        found.append({"role": ROLES[message[keys[0]]], "content": message[keys[1]]})
    return found


def _taught_throughout(document: Document | None) -> Document | None:
    return None if document is None else document._replace(labels=document.ids)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "nothing"

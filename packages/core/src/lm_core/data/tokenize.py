"""Rows to token shards: in order, by any number of processes with the same result, going on where it was interrupted."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_core import cache
from lm_core.data import shards, vocab
from lm_core.data.shards import Document, ShardWriter, Source
from lm_core.data.sources import Corpus, Row
from lm_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Rows per task. Part of the format: shards end between two tasks.
_BATCH = 64

Encode = Callable[[Sequence[Row]], Sequence[Document | None]]
"""Rows to documents, one each; None where a row holds nothing. It must pickle when several workers run it."""


def open_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, text_column: str = "text", workers: int = 1) -> Source:
    """The documents of a corpus as tokens; tokenised once, then read from the cache.

    Raises InputError for rows that cannot be used, by file and row, and for shards of another tokenizer.
    """
    if corpus.folder is not None:
        source = Source.open(corpus.folder)
        _check_tokenizer(corpus.folder, source, tokenizer)
        return _not_empty(source, corpus)
    identity = vocab.fingerprint(tokenizer)

    def write(folder: Path) -> None:
        first = next(corpus.rows(), None)
        labels = first is not None and text_column not in first.fields and "labels" in first.fields
        encode = TextEncoder(tokenizer, text_column)
        with ShardWriter(folder, vocab_size=len(tokenizer), labels=labels) as writer:
            empty = write_rows(writer, corpus.rows(), encode, workers=workers, count=corpus.count, title=corpus.argument.name)
            log.info("%s: %d documents, %d tokens, %d empty rows left out", corpus.argument.name, writer.documents, writer.tokens, empty)
            writer.close(tokenizer_sha256=identity, source=corpus.argument.source)

    key = cache.key_of(shards.FORMAT, corpus.identity, identity, text_column)
    return _not_empty(Source.open(cache.build("shards", key, write, resume=True)), corpus)


def write_rows(
    writer: ShardWriter, rows: Iterable[Row], encode: Encode, *, workers: int = 1, count: int | None = None, title: str = "data"
) -> int:
    """Encode `rows` in order and append them to `writer`, from the row it stopped at; the number of empty rows left out.

    `count` is the number of rows, where known, for the progress bar of a terminal.
    """
    empty = 0
    with _bar(title, count) as advance:
        advance(writer.rows)
        for batch, documents in _encoded(_batches(islice(rows, writer.rows, None)), encode, workers):
            for row, document in zip(batch, documents, strict=True):
                if document is None:
                    empty += 1
                    continue
                try:
                    writer.add(document)
                except InputError as error:
                    raise InputError(f"data: {row.where}: {error}") from None
            writer.mark(len(batch))
            advance(len(batch))
    return empty


class TextEncoder:
    """Rows of text, or of ready `input_ids` (with `labels` or without), to documents that end with the end token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_column: str) -> None:
        self._tokenizer, self._column = tokenizer, text_column
        # a start token only where the tokenizer itself sets one
        begins = tokenizer("")["input_ids"]
        self._start = [tokenizer.bos_token_id] if begins and begins[0] == tokenizer.bos_token_id else []
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if self._start == self._end and len(begins) == 1:
            # one token for both, set once: it ends the document
            self._start = []

    def __call__(self, rows: Sequence[Row]) -> list[Document | None]:
        texts = {at: text_of(row, self._column) for at, row in enumerate(rows) if not self._is_ready(row)}
        filled = {at: text for at, text in texts.items() if text}
        encoded = iter(self._ids(list(filled.values())))
        return [
            Document([*self._start, *next(encoded), *self._end], None, shards.key_of(filled[at]))
            if at in filled
            else (None if at in texts else _ready(row))
            for at, row in enumerate(rows)
        ]

    def _is_ready(self, row: Row) -> bool:
        return self._column not in row.fields and "input_ids" in row.fields

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: documents may be longer than the model's context, they are cut later
        encoding: Any = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        ids: list[list[int]] = encoding["input_ids"]
        return ids


def text_of(row: Row, column: str) -> str:
    """The text of a row; null counts as empty. Raises InputError when the column is missing or no text."""
    if column not in row.fields:
        found = ", ".join(map(str, row.fields)) or "nothing"
        raise InputError(f"data: {row.where} has no field {column!r} (found: {found}); name the field with --text-column")
    value = row.fields[column]
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"data: {row.where}: {column} is a {type(value).__name__}, not a text; correct it or name another field with --text-column"
        )
    return value or ""


def _ready(row: Row) -> Document | None:
    ids, labels = (_integers(row, name) for name in ("input_ids", "labels"))
    if ids is None or not ids.size:
        return None
    return Document(ids, labels, shards.key_of(ids.tobytes()))


def _integers(row: Row, name: str) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    value = row.fields.get(name)
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise InputError(f"data: {row.where}: {name} is not a list of whole numbers; correct the row")
    return array.astype(np.int64)


def _not_empty(source: Source, corpus: Corpus) -> Source:
    if not source.tokens:
        raise InputError(
            f"data: {corpus.argument.source} holds no document with text; name another source, or another field with --text-column"
        )
    return source


def _check_tokenizer(folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    made = source.meta.get("tokenizer_sha256")
    if made is not None and made != vocab.fingerprint(tokenizer):
        raise InputError(f"data: {folder / 'meta.json'} names another tokenizer than this run's; use the one that made the shards")
    if made is None and source.meta["vocab_size"] > len(tokenizer):
        sizes = f"{source.meta['vocab_size']} ids, the tokenizer {len(tokenizer)}"
        raise InputError(f"data: the shards in {folder} were made for {sizes}; use the tokenizer that made them")


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _encoded(batches: Iterator[list[Row]], encode: Encode, workers: int) -> Iterator[tuple[list[Row], Sequence[Document | None]]]:
    if workers <= 1:
        for batch in batches:
            yield batch, encode(batch)
        return
    # spawned, since a forked tokenizer or torch may hold locks of threads that the child does not have
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_adopt, initargs=(encode,))
    try:
        pending: deque[tuple[list[Row], Future[Sequence[Document | None]]]] = deque()
        for batch in batches:
            pending.append((batch, pool.submit(_apply, batch)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_adopted: Encode


def _adopt(encode: Encode) -> None:
    global _adopted
    _adopted = encode


def _apply(batch: list[Row]) -> Sequence[Document | None]:
    return _adopted(batch)


class _bar:
    """A progress bar on a terminal, nothing elsewhere; gives the function that advances it."""

    def __init__(self, title: str, count: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        disable = not sys.stderr.isatty() or not log.isEnabledFor(logging.INFO)
        columns = (TextColumn("tokenise {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=disable)
        self._task = self._progress.add_task(title, total=count)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda rows: self._progress.advance(self._task, rows)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

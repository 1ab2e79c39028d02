"""Rows of a corpus as token shards by an encoder of this package: written once, then read from the cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_core import cache
from lm_core.data import shards
from lm_core.data.shards import Document, ShardWriter, Source, key_of
from lm_core.data.sources import Corpus, Row
from lm_core.data.tokenize import Encode, text_of, write_rows
from lm_core.data.vocab import fingerprint
from lm_core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def encoded(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, encode: Encode, identity: list[Any], *, labels: bool, workers: int
) -> Source:
    """What `encode` makes of the rows of a corpus, in their order for any number of workers; `identity` names the encoder."""

    def write(folder: Path) -> None:
        with ShardWriter(folder, vocab_size=len(tokenizer), labels=labels) as writer:
            write_rows(writer, corpus.rows(), encode, workers=workers, count=corpus.count, title=corpus.argument.name)
            log.info("%s: %d rows, %d tokens", corpus.argument.name, writer.documents, writer.tokens)
            writer.close(tokenizer_sha256=fingerprint(tokenizer), source=corpus.argument.source)

    key = cache.key_of("beacon", shards.FORMAT, corpus.identity, fingerprint(tokenizer), identity)
    source = Source.open(cache.build("shards", key, write, resume=True))
    if not source.tokens:
        raise InputError(f"data: {corpus.argument.source} holds nothing to read; name another source")
    return source


class PlainEncoder:
    """Rows of text to documents without any special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, column: str) -> None:
        self._tokenizer, self._column = tokenizer, column

    def __call__(self, rows: Sequence[Row]) -> list[Document | None]:
        texts = [text_of(row, self._column) for row in rows]
        ids: Any = (
            self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"] if texts else []
        )
        return [Document(own, None, key_of(text)) if own else None for own, text in zip(ids, texts)]

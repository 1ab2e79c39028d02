"""Text to Megatron's indexed files."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lm_core.data.sources import Corpus, Row, parse, resolve
from lm_core.data.tokenize import open_corpus
from lm_core.data.vocab import build_tokenizer
from lm_core.errors import ConfigError
from mdm_scaling.data.indexed import Writer, token_type
from mdm_scaling.options import TokenizeConfig

logger = logging.getLogger(__name__)


def tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Write `<prefix>_text_document.{bin,idx}`: one sequence per document, in order, the same bytes for any number of workers.

    Tokens come from core's shards, which an interrupted command goes on from; empty documents are left out and counted there.
    """
    prefix = Path(f"{config.output_prefix}_text_document")
    if Path(f"{prefix}.bin").exists() and not config.overwrite:
        raise ConfigError(f"output_prefix: {prefix}.bin is there already; add --overwrite, or choose another prefix")
    tokenizer = build_tokenizer(
        SimpleNamespace(
            tokenizer=config.tokenizer, model="", data=[config.input], eval_data=[], text_column=config.text_column, hold_out=0.0
        )
    )
    corpus = resolve(parse(config.input))
    bad = 0
    if config.skip_bad_lines:
        corpus, bad = without_bad_lines(corpus, config.text_column)
    source = open_corpus(corpus, tokenizer, text_column=config.text_column, workers=config.workers)
    samples = parse(config.input).samples
    if samples is not None:
        source = source.take(samples)
    end = tokenizer.eos_token_id
    if config.append_eod and end is None:
        raise ConfigError(f"append_eod: the tokenizer {config.tokenizer} has no end token; add --no-append-eod")
    dtype = token_type(len(tokenizer))
    tokens = documents = 0
    with Writer(prefix, dtype) as writer:
        for document in source:
            # shards end every document with the end token
            kept = document if config.append_eod or document[-1] != end else document[:-1]
            if len(kept):
                writer.add(kept)
                tokens, documents = tokens + len(kept), documents + 1
    left_out = f", {bad} bad lines left out" if config.skip_bad_lines else ""
    print(f"{prefix}.bin: {documents} documents, {tokens} tokens of {dtype.itemsize * 8} bits{left_out}")
    return {
        "prefix": str(prefix),
        "documents": documents,
        "bad_lines": bad,
        "tokens": tokens,
        "vocabulary": len(tokenizer),
        "dtype": str(dtype),
    }


def without_bad_lines(corpus: Corpus, column: str) -> tuple[Corpus, int]:
    """A file of lines without those that are no object with a text in `column`, and how many these are."""
    path = Path(corpus.argument.source).expanduser()
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"skip_bad_lines: {corpus.argument.source} has no lines of JSON; drop it, or name a .jsonl file")

    def lines() -> Iterator[Row | None]:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(path, number, line, column)

    bad = sum(row is None for row in lines())
    good = replace(
        corpus, identity=[*corpus.identity, "without bad lines", column], rows=lambda: (row for row in lines() if row is not None)
    )
    return good, bad


def _row(path: Path, number: int, line: bytes, column: str) -> Row | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return Row(str(path), number, fields) if isinstance(fields, dict) and isinstance(fields.get(column), str) else None

"""Corpora on their way to training: tokenise, keep what is good, pack into shards."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_core.data import vocab
from lm_core.data.shards import ShardWriter
from lm_core.data.sources import Row, parse, read, resolve
from lm_core.data.tokenize import TextEncoder, text_of, write_rows
from lm_core.errors import InputError
from moe_cpt.data import expanded
from moe_cpt.targets import require_free

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_cpt.options.corpus import FilterConfig, PackConfig, TokenizeConfig

BATCH = 256


@dataclass(frozen=True)
class Count:
    """What became of the documents of one file or source."""

    kept: int = 0
    dropped: int = 0
    tokens: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.kept + other.kept, self.dropped + other.dropped, self.tokens + other.tokens)


def files_of(path: Path, suffix: str) -> list[Path]:
    """The files of a kind at or under `path`. Raises InputError when there is none."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob(f"*{suffix}") if file.is_file())
    if not found:
        raise InputError(f"input: {path} holds no {suffix} file; name another file or folder")
    return found


def tokenize(config: TokenizeConfig) -> dict[str, Count]:
    """Write `{"input_ids": [...]}` lines for every file, under the same names; counts by file. The result does not depend on `num_proc`."""
    files = files_of(config.input, f".{config.format}")
    names = [file.name if config.input.is_file() else str(file.relative_to(config.input)) for file in files]
    targets = [config.output / Path(name).with_suffix(".jsonl") for name in names]
    require_free("output", config.output, config.overwrite)
    if config.use_fast and not _tokenizer(config.tokenizer).is_fast:
        raise InputError(f"use_fast: {config.tokenizer} has no fast tokenizer; leave out --use_fast")
    one = partial(_tokenize_file, config)
    workers = min(config.num_proc or len(os.sched_getaffinity(0)), len(files))
    if workers == 1:
        counts = [one(file, target) for file, target in zip(files, targets)]
    else:
        # spawned, since a forked tokenizer may hold locks of threads that the child does not have
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            counts = list(pool.map(one, files, targets))
    return dict(zip(names, counts))


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from lm_core.models import load_tokenizer

    return vocab.byte_tokenizer() if name == "bytes" else load_tokenizer(name)


def _tokenize_file(config: TokenizeConfig, file: Path, target: Path) -> Count:
    tokenizer = _tokenizer(config.tokenizer)
    decoder = None if config.src_tokenizer is None else _tokenizer(config.src_tokenizer)
    column = config.content_column
    encode = TextEncoder(tokenizer, column)
    end = tokenizer.eos_token_id
    total = Count()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_file = target.with_name(target.name + ".tmp")
    with partial_file.open("w") as out:
        rows = _rows(file, config)
        while batch := list(islice(rows, BATCH)):
            documents = encode(_texts(batch, column, decoder, skip=config.on_bad_line == "skip"))
            kept = [np.asarray(document.ids).tolist() for document in documents if document is not None]
            if not config.append_eos:
                kept = [ids[:-1] if ids and ids[-1] == end else ids for ids in kept]
            out.writelines(json.dumps({"input_ids": ids}) + "\n" for ids in kept)
            total += Count(len(kept), len(batch) - len(kept), sum(map(len, kept)))
    partial_file.replace(target)
    return total


def _rows(file: Path, config: TokenizeConfig) -> Iterator[Row]:
    """Lines of a text file as documents, or the objects of a JSONL file; an unreadable line has no fields where it may be skipped."""
    if config.format == "jsonl" and config.on_bad_line == "error":
        yield from read(file)
        return
    with file.open(encoding="utf-8", errors="strict") as lines:
        for number, line in enumerate(lines, start=1):
            if config.format == "txt":
                yield Row(str(file), number, {config.content_column: line.rstrip("\n")})
                continue
            try:
                fields = json.loads(line)
            except ValueError:
                fields = {}
            yield Row(str(file), number, fields if isinstance(fields, dict) else {})


def _texts(rows: Sequence[Row], column: str, decoder: Any, *, skip: bool) -> list[Row]:
    """Rows with their text, ids of another tokenizer decoded; those without text are left out where that is allowed."""
    kept: list[Row] = []
    for row in rows:
        try:
            if decoder is not None:
                ids = row.fields.get(column)
                if not isinstance(ids, list):
                    raise InputError(
                        f"input: {row.where}: {column} holds no list of ids; leave out --src_tokenizer, or name another column"
                    )
                row = Row(row.file, row.number, {column: decoder.decode(ids, skip_special_tokens=True)})
            text_of(row, column)
        except InputError:
            if not skip:
                raise
            continue
        kept.append(row)
    return kept


def pack(config: PackConfig) -> dict[str, Count]:
    """Write every source of a tokenised folder as token shards; counts by source."""
    require_free("output", config.output, config.overwrite)
    tokenizer = _tokenizer(config.tokenizer)
    counts = {}
    for source in expanded([str(config.input)]):
        corpus = resolve(parse(source))
        if corpus.folder is not None:
            raise InputError(f"input: {source} holds shards already; name a folder of tokenised .jsonl files")
        name = corpus.argument.name
        encode = TextEncoder(tokenizer, config.text_column)
        limit = int(config.shard_tokens)
        with ShardWriter(config.output / name, vocab_size=len(tokenizer), shard_tokens=limit, dtype=config.dtype) as writer:
            empty = write_rows(writer, corpus.rows(), encode, title=name)
            counts[name] = Count(writer.documents, empty, writer.tokens)
            writer.close(tokenizer_sha256=vocab.fingerprint(tokenizer), source=source)
    return counts


def keep_between(config: FilterConfig) -> dict[str, Count]:
    """Copy the records whose numeric column lies within the bounds, both included; counts by source."""
    files = files_of(config.input, ".jsonl")
    require_free("output", config.output, config.overwrite)
    low, high = -math.inf if config.min is None else config.min, math.inf if config.max is None else config.max
    counts: dict[str, Count] = {}
    for file in files:
        name = file.stem if file.parent == config.input or config.input.is_file() else file.relative_to(config.input).parts[0]
        target = config.output / (file.name if config.input.is_file() else file.relative_to(config.input))
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w") as out:
            for row in read(file):
                value = row.fields.get(config.column)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise InputError(f"column: {row.where}: {config.column} is {value!r}, not a number; name another column")
                inside = low <= value <= high
                if inside:
                    out.write(json.dumps(dict(row.fields)) + "\n")
                counts[name] = counts.get(name, Count()) + Count(int(inside), int(not inside))
    return counts

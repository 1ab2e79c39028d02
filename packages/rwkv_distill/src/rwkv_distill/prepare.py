"""What `rwkv-distill prepare-data` writes: rows of token ids, cut to length."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_core.data.shards import Document, ShardWriter, Source, key_of
from lm_core.data.sources import parse, resolve
from lm_core.data.vocab import build_tokenizer, fingerprint
from lm_core.errors import ConfigError, InputError
from rwkv_distill.binidx import BinidxWriter
from rwkv_distill.command_config import PrepareConfig
from rwkv_distill.config import paths
from rwkv_distill.export import refuse_occupied
from rwkv_distill.rows import ABOUT, open_rows

Integers = NDArray[np.int64]


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Tokenise what `config` names; the result says where and how much."""
    arguments = paths(config.raw_data)
    if not arguments:
        raise ConfigError("raw_data: nothing to read; give --raw-data, for example --raw-data builtin:python-docs")
    refuse_occupied(config.output_dir)
    tokenizer = build_tokenizer(SimpleNamespace(tokenizer=config.tokenizer, model=config.tokenizer, data=arguments))
    sources = []
    for text in arguments:
        argument = parse(text)
        source = open_rows(resolve(argument), tokenizer, config.text_column, workers=config.num_proc)
        sources.append(source if argument.samples is None else source.take(argument.samples))
    about = {"tokenizer_sha256": fingerprint(tokenizer), "labels_shifted": False, "source": " ".join(arguments)}
    config.output_dir.mkdir(parents=True, exist_ok=True)
    pieces = _pieces(sources, config.max_length, plain=config.format != "hf")
    if config.format == "hf":
        rows, tokens = _saved(config.output_dir, pieces)
        (config.output_dir / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    elif config.format == "shards":
        with ShardWriter(config.output_dir, vocab_size=len(tokenizer)) as writer:
            for ids, _ in pieces:
                writer.add(Document(ids, None, key_of(ids.tobytes())))
                writer.mark(1)
            rows, tokens = writer.documents, writer.tokens
            writer.close(tokenizer_sha256=about["tokenizer_sha256"], source=about["source"])
    else:
        pair = BinidxWriter(config.output_dir / "data", len(tokenizer))
        for ids, _ in pieces:
            pair.add(ids)
        pair.close()
        rows, tokens = len(pair.sizes), sum(pair.sizes)
    return {"output_dir": str(config.output_dir), "rows": rows, "tokens": tokens}


def _pieces(sources: list[Source], length: int, *, plain: bool) -> Iterator[tuple[Integers, Integers]]:
    """Ids and labels of at most `length` tokens. With `plain` labels that are not the ids are refused: the format has no place for them."""
    for source in sources:
        for number in range(len(source)):
            size = int(source.length[number])
            for first in range(0, size, length):
                last = min(first + length, size)
                ids, labels = (read(number, first, last).astype(np.int64) for read in (source.read, source.labels))
                if plain and not np.array_equal(ids, labels):
                    raise InputError("format: only a saved dataset (--format hf) holds labels, which chats and completions have; use it")
                yield ids, labels


def _saved(folder: Path, pieces: Iterator[tuple[Integers, Integers]]) -> tuple[int, int]:
    """A saved dataset; its rows and tokens."""
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features, tokens = Features({name: List(Value("int32")) for name in ("input_ids", "labels")}), 0
    # beside the target, since it becomes as large
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        with ArrowWriter(features=features, path=f"{place}/rows.arrow") as writer:
            for ids, labels in pieces:
                writer.write({"input_ids": ids.tolist(), "labels": labels.tolist()})
                tokens += len(ids)
            writer.finalize()
        dataset = Dataset.from_file(f"{place}/rows.arrow")
        dataset.save_to_disk(str(folder))
        return len(dataset), tokens

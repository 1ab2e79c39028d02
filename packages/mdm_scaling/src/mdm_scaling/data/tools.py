"""Looking at corpora in Megatron's format, joining them, and cutting text to a number of documents."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lm_core.engine.state import write_json
from lm_core.errors import ConfigError, InputError
from mdm_scaling.data.indexed import Indexed, Writer, prefix_of
from mdm_scaling.options import ConcatConfig, SubsetConfig
from mdm_scaling.planner import documents, tokens_per_doc


def inspect(prefix: str) -> dict[str, Any]:
    """What the header says, and counts."""
    store = Indexed.open(prefix_of(prefix))
    lengths = store.length.astype(np.int64)
    result = {
        "prefix": str(store.prefix), "dtype": str(store.dtype), "sequences": len(store), "documents": len(store.documents) - 1,
        "tokens": store.tokens, "shortest": int(lengths.min()), "longest": int(lengths.max()), "mean": float(lengths.mean()),
        "bin_bytes": Path(f"{store.prefix}.bin").stat().st_size,
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:10} {value:,}" if isinstance(value, int) else f"{name:10} {value}")
    return result


def verify(prefix: str, vocabulary: int | None) -> dict[str, Any]:
    """Raise InputError for the first thing that is wrong: header, sizes, offsets, document marks, trailing bytes, token range."""
    store = Indexed.open(prefix_of(prefix))
    index = f"{store.prefix}.idx"
    lengths = store.length.astype(np.int64)
    if (lengths < 0).any():
        raise InputError(f"data: {index} has a negative length at sequence {int(np.argmax(lengths < 0))}; write the files again")
    expected = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * store.dtype.itemsize
    if (store.offset != expected).any():
        raise InputError(
            f"data: {index}: sequence {int(np.argmax(store.offset != expected))} does not begin where the one before it ends; write the files again"
        )
    marks = store.documents
    if marks[0] != 0 or marks[-1] != len(store) or (np.diff(marks) < 0).any():
        raise InputError(f"data: {index}: document marks do not rise from 0 to {len(store)}; write the files again")
    size, needed = Path(f"{store.prefix}.bin").stat().st_size, store.tokens * store.dtype.itemsize
    if size != needed:
        raise InputError(f"data: {store.prefix}.bin has {size - needed} bytes behind its last token; copy or write it again")
    bad = store.beyond(vocabulary if vocabulary is not None else np.iinfo(store.dtype).max + 1)
    if bad is not None:
        raise InputError(f"data: {store.prefix}.bin holds token {bad}, outside the vocabulary; tokenise it with the right tokenizer")
    print(f"{store.prefix}: {len(store)} sequences, {store.tokens} tokens, whole")
    return {"prefix": str(store.prefix), "sequences": len(store), "tokens": store.tokens}


def concat(config: ConcatConfig, pattern: str) -> dict[str, Any]:
    """Join the corpora that match a pattern, in natural order. Raises InputError for a gap in their numbers."""
    found = {prefix_of(name) for name in glob.glob(pattern) if name.endswith((".bin", ".idx"))}
    prefixes = sorted(found, key=lambda path: _natural(path.name))
    if not prefixes:
        raise InputError(f"data: {pattern} matches no .bin or .idx file; quote the pattern")
    if Path(f"{config.output_prefix}.bin").exists() and not config.overwrite:
        raise ConfigError(f"output_prefix: {config.output_prefix}.bin is there already; add --overwrite, or choose another prefix")
    _no_gaps(prefixes)
    stores = [Indexed.open(prefix) for prefix in prefixes]
    kinds = {str(store.dtype) for store in stores}
    if len(kinds) > 1:
        raise InputError(f"data: the parts are of types {', '.join(sorted(kinds))}; tokenise them with one tokenizer")
    with Writer(config.output_prefix, stores[0].dtype) as writer:
        for store in stores:
            for first, last in zip(store.documents[:-1].tolist(), store.documents[1:].tolist()):
                writer.add_document(store[n] for n in range(first, last))
    print(f"{config.output_prefix}.bin: {len(stores)} parts, {sum(store.tokens for store in stores)} tokens")
    return {
        "prefix": str(config.output_prefix),
        "parts": [str(prefix) for prefix in prefixes],
        "tokens": sum(store.tokens for store in stores),
    }


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _no_gaps(prefixes: list[Path]) -> None:
    """The number in which the names differ runs without a hole."""
    names = [re.findall(r"\d+", path.name) for path in prefixes]
    if len(prefixes) < 2 or len({len(numbers) for numbers in names}) > 1:
        return
    for column in zip(*names):
        numbers = sorted({int(text) for text in column})
        missing = set(range(numbers[0], numbers[-1] + 1)) - set(numbers)
        if len(numbers) > 1 and missing:
            raise InputError(f"data: part {min(missing)} is missing between {prefixes[0].name} and {prefixes[-1].name}; add it")


def subset(config: SubsetConfig, source: Path) -> dict[str, Any]:
    """The first K lines of a .jsonl file, K from a number of tokens; beside it a manifest with K, bytes and SHA-256."""
    if config.out.exists() and not config.overwrite:
        raise ConfigError(f"out: {config.out} is there already; add --overwrite, or choose another name")
    count = None if config.exact else documents(float(config.tokens), tokens_per_doc(config.tokens_per_doc))
    lines = _counted(config, source) if config.exact else islice(_lines(source), count)
    seen, size, written = hashlib.sha256(), 0, 0
    config.out.parent.mkdir(parents=True, exist_ok=True)
    partial = config.out.with_name(config.out.name + ".partial")
    try:
        with partial.open("wb") as file:
            for line in lines:
                file.write(line)
                seen.update(line)
                size, written = size + len(line), written + 1
    except InputError:
        partial.unlink()
        raise
    if count is not None and written < count:
        partial.unlink()
        raise InputError(
            f"data: {source} has {written} lines, but {config.tokens:g} tokens need {count}; give a larger file or fewer tokens"
        )
    shutil.move(partial, config.out)
    result = {
        "source": str(source),
        "documents": written,
        "bytes": size,
        "sha256": seen.hexdigest(),
        "tokens": float(config.tokens),
        **({"tokenizer": config.tokenizer} if config.exact else {"tokens_per_doc": config.tokens_per_doc}),
    }
    write_json(config.out.with_name(config.out.name + ".manifest.json"), result)
    print(f"{config.out}: {written} documents, {size} bytes")
    return {**result, "out": str(config.out)}


def _counted(config: SubsetConfig, source: Path) -> Iterator[bytes]:
    """Lines until their texts have so many tokens. Raises InputError for a line without text, and for a file with fewer tokens."""
    from lm_core.data.vocab import build_tokenizer

    tokenizer, total = build_tokenizer(SimpleNamespace(tokenizer=config.tokenizer, model="")), 0
    for number, line in enumerate(_lines(source), 1):
        try:
            text = str(json.loads(line)[config.text_column])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"data: line {number} of {source} has no {config.text_column!r} ({error!r}); correct it") from None
        yield line
        total += len(tokenizer(text, add_special_tokens=False).input_ids)
        if total >= config.tokens:
            return
    raise InputError(f"data: {source} has {total} tokens, but {config.tokens:g} were asked for; give a larger file or ask for fewer")


def _lines(source: Path) -> Iterator[bytes]:
    """Lines that hold something, each ending with a newline."""
    opener: Any = gzip.open if source.suffix == ".gz" else open
    try:
        with opener(source, "rb") as file:
            for line in file:
                if line.strip():
                    yield line if line.endswith(b"\n") else line + b"\n"
    except (OSError, EOFError) as error:
        raise InputError(f"data: {source} cannot be read ({error}); name a .jsonl or .jsonl.gz file") from None

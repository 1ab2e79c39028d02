"""What a data argument means: `SOURCE[N]@W` to rows of text or token ids, each with the place it came from.

SOURCE is `builtin:python-docs`, `builtin:stdlib`, `synthetic:NAME`, a file (.txt, .jsonl, .jsonl.gz, .json, .csv,
.parquet), a folder of such files, a folder written by datasets' `save_to_disk`, a folder of token shards, or a hub id
`OWNER/NAME[:CONFIG[:SPLIT]]`. N takes so many documents of it, W is its weight in a mixture.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from lm_core.data import shards, synthetic
from lm_core.errors import ConfigError, InputError
from lm_core.values import read_count

# Longer text files are read as documents of about this many characters, cut at line ends, so none fills the memory
_TEXT_PIECE = 1 << 20
_BUILTIN = ("python-docs", "stdlib")
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^:/]*){0,2}")


class Row(NamedTuple):
    """One input row: where it stands (for messages) and its fields."""

    file: str
    number: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class Argument:
    """A data argument taken apart."""

    source: str
    samples: int | None = None
    weight: float | None = None

    @property
    def name(self) -> str:
        """The last part of the source without its suffix: what metrics call it.

        >>> Argument("data/corpus.jsonl.gz").name, Argument("builtin:python-docs").name
        ('corpus', 'python-docs')
        """
        if self.source.startswith(("builtin:", "synthetic:")):
            return self.source.split(":", 1)[1]
        path = Path(self.source).expanduser()
        last = path.resolve().name if path.exists() else self.source.split(":")[0].rsplit("/", 1)[-1]
        suffix = next((suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if last.endswith(suffix)), "")
        return last.removesuffix(suffix) or "data"


def parse(text: str) -> Argument:
    """Take `SOURCE[N]@W` apart; a value that exists as a path is a path, whatever characters it holds.

    >>> parse("builtin:stdlib[1k]@0.3")
    Argument(source='builtin:stdlib', samples=1000, weight=0.3)
    """
    if text.strip() and Path(text).expanduser().exists():
        return Argument(text)
    source, weight, samples = text.strip(), None, None
    if (match := re.fullmatch(r"(.*)@([^@/\[\]]*)", source)) is not None:
        source, weight = match[1], _weight(match[2], text)
    if (match := re.fullmatch(r"(.*)\[([^\[\]]*)\]", source)) is not None:
        source, samples = match[1], _samples(match[2], text)
    if not source:
        raise ConfigError("data: empty; name a source such as builtin:python-docs, a file or a folder")
    return Argument(source, samples, weight)


def _weight(value: str, text: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"data: {text}: the weight {value!r} is not a number of at least 0; write SOURCE@0.3")
    return weight


def _samples(value: str, text: str) -> int:
    try:
        samples = read_count(value)
    except ValueError:
        samples = 0
    if not isinstance(samples, int) or samples < 1:
        raise ConfigError(f"data: {text}: {value!r} is not a whole number of at least 1; write SOURCE[1000] or SOURCE[10k]")
    return samples


@dataclass(frozen=True)
class Corpus:
    """A source that was found. `rows` starts a fresh pass over it; `identity` is JSON-able and changes with its content.

    `fixed` says that its held-out documents are always the same twentieth; `valid` is a held-out part of its own;
    `folder` is set when it is token shards already, and there are no rows then.
    """

    argument: Argument
    identity: Sequence[Any]
    rows: Callable[[], Iterator[Row]]
    fixed: bool = False
    count: int | None = None
    valid: Corpus | None = None
    folder: Path | None = None


def resolve(argument: Argument) -> Corpus:
    """Find a source. Raises InputError when there is none of that name, ConfigError for an unknown built-in."""
    source = argument.source
    if source.startswith("builtin:"):
        return _builtin(argument, source.removeprefix("builtin:"))
    if source.startswith("synthetic:"):
        return _synthetic(argument, source.removeprefix("synthetic:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(argument, path)
    if path.is_file():
        return _files(argument, [path])
    if source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise InputError(f"data: {source!r} does not exist (looked for {path.absolute()}); name a file, a folder or builtin:python-docs")
    return _hub(argument)


def _builtin(argument: Argument, name: str) -> Corpus:
    if name == "python-docs":
        from pydoc_data.topics import topics

        texts = [topics[topic] for topic in sorted(topics)]
        rows = [Row(f"builtin:python-docs/{topic}", 1, {"title": topic, "text": text}) for topic, text in zip(sorted(topics), texts)]
        identity = ["builtin", name, shards.key_of("\0".join(texts))]
        return Corpus(argument, identity, lambda: iter(rows), fixed=True, count=len(rows))
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _stdlib_files(root)
        identity = ["builtin", name, sys.version, [[str(path), path.stat().st_size] for path in files]]
        return Corpus(argument, identity, lambda: _stdlib(root, files), fixed=True, count=len(files))
    raise ConfigError(f"data: builtin:{name} is not built in; choose builtin:{' or builtin:'.join(_BUILTIN)}")


def _stdlib_files(root: Path) -> list[Path]:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    found = (path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts[:-1]))
    # documentation texts are the other built-in source
    return sorted(path for path in found if path.parent.name != "pydoc_data")


def _stdlib(root: Path, files: Sequence[Path]) -> Iterator[Row]:
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield Row(f"builtin:stdlib/{path.relative_to(root)}", 1, {"title": str(path.relative_to(root)), "text": text})


def _synthetic(argument: Argument, name: str) -> Corpus:
    if name not in synthetic.CORPORA:
        raise ConfigError(f"data: synthetic:{name} does not exist; choose synthetic:{', synthetic:'.join(synthetic.CORPORA)}")
    documents = synthetic.CORPORA[name]

    def rows() -> Iterator[Row]:
        return (Row(argument.source, n, {"text": text}) for n, text in enumerate(documents(), start=1))

    # the first document stands for the code that writes them all
    return Corpus(argument, ["synthetic", name, next(documents())], rows, fixed=True, count=synthetic.DOCUMENTS)


def _folder(argument: Argument, path: Path) -> Corpus:
    if shards.is_shards(path) or (path / "meta.json").is_file():
        return Corpus(argument, [], lambda: iter(()), folder=path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(argument, path)
    files = sorted(file for file in path.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
    if not files:
        kinds = ", ".join(_SUFFIXES)
        raise InputError(f"data: the folder {path} holds no {kinds} file, saved dataset or token shards; name another folder")
    return _files(argument, files)


def _files(argument: Argument, files: Sequence[Path]) -> Corpus:
    for path in files:
        if not path.name.endswith(_SUFFIXES):
            raise InputError(f"data: {path} is of an unknown kind; use {', '.join(_SUFFIXES)}, or a folder of them")
    stats = [(path, path.stat()) for path in files]
    identity = ["files", [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]]
    return Corpus(argument, identity, lambda: (row for path in files for row in read(path)))


def read(path: Path) -> Iterator[Row]:
    """The rows of one file. Raises InputError with file and line for what cannot be read."""
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl(path)
        elif path.suffix == ".json":
            yield from _json(path)
        elif path.suffix == ".csv":
            yield from _csv(path)
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield from _text(path)
    except UnicodeDecodeError as error:
        raise InputError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data: {path} cannot be read ({error})") from None


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    # csv wants line ends as they are
    return open(path, encoding="utf-8", newline="" if path.suffix == ".csv" else None)


def _text(path: Path) -> Iterator[Row]:
    with _opened(path) as lines:
        piece, size, first = list[str](), 0, 1
        for number, line in enumerate(lines, start=1):
            piece.append(line)
            size += len(line)
            if size >= _TEXT_PIECE:
                yield Row(str(path), first, {"text": "".join(piece)})
                piece, size, first = [], 0, number + 1
        yield Row(str(path), first, {"text": "".join(piece)})


def _jsonl(path: Path) -> Iterator[Row]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise InputError(f"data: {path}:{number} is not valid JSON ({error}); correct or remove the line") from None
            yield _row(path, number, fields)


def _json(path: Path) -> Iterator[Row]:
    """An array of objects, or one object per line under the wrong name."""
    with _opened(path) as file:
        text = file.read()
    try:
        entries = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{"):
            yield from _jsonl(path)
            return
        raise InputError(f"data: {path} is not valid JSON ({error}); correct it, or write one object per line as .jsonl") from None
    for number, fields in enumerate(entries if isinstance(entries, list) else [entries], start=1):
        yield _row(path, number, fields)


def _row(path: Path, number: int, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise InputError(f'data: {path}:{number} is a {type(fields).__name__}, not an object; write rows such as {{"text": "..."}}')
    return Row(str(path), number, fields)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as lines:
        reader = csv.DictReader(lines)
        try:
            for fields in reader:
                if None in fields or None in fields.values():
                    raise InputError(
                        f"data: {path}:{reader.line_num} has not the {len(reader.fieldnames or [])} cells of the header; correct the row"
                    )
                yield Row(str(path), reader.line_num, fields)
        except csv.Error as error:
            raise InputError(f"data: {path}:{reader.line_num} is not valid CSV ({error}); correct the row") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, fields)
    except pyarrow.ArrowException as error:
        raise InputError(f"data: {path} is not a readable parquet file ({error}); write it again") from None


def _saved(argument: Argument, path: Path) -> Corpus:
    """A folder written by `save_to_disk`: its train split, and its validation or test split as the held-out part."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises whatever its readers raise
        raise InputError(f"data: the saved dataset {path} cannot be loaded ({error}); save it again with save_to_disk") from None
    if isinstance(loaded, datasets.Dataset):
        return _dataset(argument, loaded, str(path))
    train = "train" if "train" in loaded else next(iter(loaded))
    held = next((name for name in ("validation", "valid", "test") if name in loaded and name != train), None)
    valid = _dataset(argument, loaded[held], f"{path}[{held}]") if held else None
    return _dataset(argument, loaded[train], f"{path}[{train}]", valid)


def _dataset(argument: Argument, table: Any, where: str, valid: Corpus | None = None) -> Corpus:
    def rows() -> Iterator[Row]:
        return (Row(where, number, fields) for number, fields in enumerate(table, start=1))

    return Corpus(argument, ["dataset", where, table._fingerprint, len(table)], rows, count=len(table), valid=valid)


def _hub(argument: Argument) -> Corpus:
    """A hub dataset, read as a stream; with [N] only its first N rows are fetched."""
    import datasets

    name, config, split = (*argument.source.split(":"), "", "")[:3]

    def reached(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Exception as error:  # connection, missing repository, missing split: all the user's to fix
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"data: {argument.source!r} is no file or folder here, and as a hub dataset it cannot be loaded ({reason}); "
                "check the name and the network, or use a local file, a saved dataset or builtin:python-docs"
            ) from None

    splits = [split] if split else reached(lambda: datasets.get_dataset_split_names(name, config or None))
    train = "train" if "train" in splits else splits[0]
    held = next((other for other in ("validation", "valid", "test") if other in splits and other != train), None)

    def part(which: str, count: int | None, valid: Corpus | None = None) -> Corpus:
        def rows() -> Iterator[Row]:
            stream = reached(lambda: iter(datasets.load_dataset(name, config or None, split=which, streaming=True)))
            for number in range(1, 1 + (sys.maxsize if count is None else count)):
                fields = reached(lambda: next(stream, None))
                if fields is None:
                    return
                yield Row(f"{name}[{which}]", number, fields)

        return Corpus(argument, ["hub", name, config, which, count], rows, count=count, valid=valid)

    return part(train, argument.samples, part(held, None) if held else None)

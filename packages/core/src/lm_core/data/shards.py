"""Token shards on disk: written once, front to back; read memory-mapped, by document.

A folder holds, for each shard number, `NNNNN.bin` (token ids, little-endian uint16 or uint32, documents back to back),
`NNNNN.idx` (int64 start of every document and the end of the last), `NNNNN.key` (uint64 hash of every document),
`NNNNN.labels` (int32 per token, -100 for no target; only with a label column) and `NNNNN.json` (what the shard holds;
written when the shard is complete). `meta.json` comes last: a folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm_core.data.order import Integers, Permutation
from lm_core.errors import ConfigError, InputError, reading

FORMAT = 1
# 64 MiB of uint16: what an interrupted run loses at most
_SHARD_TOKENS = 1 << 25
# each map holds an open file
_OPEN_MAPS = 256


class Document(NamedTuple):
    """Token ids of one document, their labels if they have any, and the hash that decides its split."""

    ids: ArrayLike
    labels: ArrayLike | None
    key: int


def key_of(content: str | bytes) -> int:
    """The 64-bit hash by which a document is held out or not."""
    return int.from_bytes(
        hashlib.blake2b(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content, digest_size=8).digest(), "little"
    )


class ShardWriter:
    """Writes documents into `folder`; after an interruption it goes on behind the last complete shard.

    `rows` is the number of input rows behind those complete shards, so the caller knows where to go on. The bytes
    depend on the documents and on the calls to `mark` alone.
    """

    def __init__(
        self, folder: Path, *, vocab_size: int, labels: bool = False, shard_tokens: int = _SHARD_TOKENS, dtype: str = "auto"
    ) -> None:
        """`dtype` of the ids is uint16, uint32, or auto: the smaller one that holds the vocabulary."""
        self._folder, self._limit, self._vocab_size = folder, shard_tokens, vocab_size
        if dtype == "uint16" and vocab_size > 1 << 16:
            raise ConfigError(f"dtype: uint16 holds {1 << 16} ids, not the {vocab_size} of the tokenizer; use auto")
        self._dtype = np.dtype("<u2" if dtype == "uint16" or (dtype == "auto" and vocab_size <= 1 << 16) else "<u4")
        self._has_labels = labels
        folder.mkdir(parents=True, exist_ok=True)
        self._shards: list[dict[str, int]] = []
        while (done := folder / f"{len(self._shards):05}.json").is_file():
            self._shards.append(json.loads(done.read_text()))
        self.rows = sum(shard["rows"] for shard in self._shards)
        self._open()

    @property
    def documents(self) -> int:
        return sum(shard["documents"] for shard in self._shards) + len(self._keys)

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self._shards) + self._starts[-1]

    def add(self, document: Document) -> None:
        """Append one document of at least one token.

        Raises InputError for an id outside the vocabulary, or labels that do not fit.
        """
        ids = np.asarray(document.ids, dtype=np.int64)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            wrong = low if low < 0 else high
            raise InputError(
                f"input_ids: {wrong} is outside the vocabulary of {self._vocab_size}; was the data made with another tokenizer?"
            )
        if self._has_labels != (document.labels is not None):
            raise InputError("labels: some rows have them and some have not; give labels in every row, or in none")
        if self._has_labels:
            labels = np.asarray(document.labels, dtype=np.int64)
            if labels.shape != ids.shape:
                raise InputError(f"labels: {labels.size} labels for {ids.size} input_ids; give one label per id, -100 for no target")
            wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self._vocab_size))]
            if wrong.size:
                raise InputError(f"labels: {wrong[0]} is outside the vocabulary of {self._vocab_size}; use -100 for no target")
            self._files["labels"].write(labels.astype("<i4").tobytes())
        self._files["bin"].write(ids.astype(self._dtype).tobytes())
        self._starts.append(self._starts[-1] + ids.size)
        self._keys.append(document.key)

    def mark(self, rows: int) -> None:
        """Say that `rows` more input rows are fully written; a shard that is large enough ends here."""
        self._rows += rows
        self.rows += rows
        if self._starts[-1] >= self._limit:
            self._finish()
            self._open()

    def close(self, **meta: Any) -> None:
        """Finish the last shard and write meta.json."""
        if self._keys or self._rows:
            self._finish()
        self._discard()
        total = {name: sum(shard[name] for shard in self._shards) for name in ("documents", "tokens")}
        facts = {"format": FORMAT, "dtype": self._dtype.name, "labels": self._has_labels, "vocab_size": self._vocab_size, **total, **meta}
        _write(self._folder / "meta.json", facts | {"shards": self._shards})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the unfinished shard, if any; complete ones stay for the next writer."""
        self._discard()

    def _path(self, kind: str) -> Path:
        return self._folder / f"{len(self._shards):05}.{kind}"

    def _open(self) -> None:
        kinds = ["bin", "labels"] if self._has_labels else ["bin"]
        self._files: dict[str, BinaryIO] = {kind: open(self._path(kind), "wb") for kind in kinds}  # noqa: SIM115 - lives as long as the shard
        self._starts, self._keys, self._rows = [0], list[int](), 0

    def _finish(self) -> None:
        for file in self._files.values():
            file.close()
        np.array(self._starts, dtype="<i8").tofile(self._path("idx"))
        np.array(self._keys, dtype="<u8").tofile(self._path("key"))
        shard = {"documents": len(self._keys), "tokens": self._starts[-1], "rows": self._rows}
        _write(self._path("json"), shard)
        self._shards.append(shard)
        self._files = {}

    def _discard(self) -> None:
        for kind, file in self._files.items():
            file.close()
            self._path(kind).unlink(missing_ok=True)
        self._files = {}


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    temporary.replace(path)


class _Store:
    """The open files of one shard folder; pickles as its path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _meta(folder)
        tokens = [shard["tokens"] for shard in self.meta["shards"]]
        self._ends = np.cumsum([0, *tokens])
        self._maps: dict[str, NDArray[Any]] = {}

    def __reduce__(self) -> tuple[type[_Store], tuple[Path]]:
        return _Store, (self.folder,)

    def read(self, kind: str, first: int, last: int) -> NDArray[Any]:
        """Elements first .. last-1 of a column, all inside one shard; a view of the file."""
        shard = int(np.searchsorted(self._ends, first, side="right")) - 1 if len(self._ends) > 2 else 0
        base = int(self._ends[shard])
        part = self._map(shard, kind)[first - base : last - base]
        wrong = (
            part[part >= self.meta["vocab_size"]]
            if kind == "bin"
            else part[(part < 0) & (part != -100) | (part >= self.meta["vocab_size"])]
        )
        if wrong.size:
            raise self._damaged(
                self.folder / f"{shard:05}.{kind}", f"holds {wrong[0]}, outside the vocabulary of {self.meta['vocab_size']}"
            )
        return part

    def _damaged(self, path: Path, how: str) -> InputError:
        return InputError(f"data: {path} {how}; remove {self.folder} and have the shards written again")

    def _map(self, shard: int, kind: str) -> NDArray[Any]:
        name = f"{shard:05}.{kind}"
        if name not in self._maps:
            dtype = np.dtype("<i4") if kind == "labels" else np.dtype(self.meta["dtype"]).newbyteorder("<")
            if len(self._maps) >= _OPEN_MAPS:
                self._maps.pop(next(iter(self._maps)))
            self._maps[name] = self.column(shard, kind, dtype, self.meta["shards"][shard]["tokens"])
        return self._maps[name]

    def column(self, shard: int, kind: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        path = self.folder / f"{shard:05}.{kind}"
        size = path.stat().st_size if path.is_file() else -1
        if size != count * dtype.itemsize:
            found = "is missing" if size < 0 else f"has {size} bytes instead of {count * dtype.itemsize}"
            raise self._damaged(path, found)
        # an ordinary array over the map: slices of np.memmap cost several times more
        return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if count else np.empty(0, dtype=dtype)

    def spans(self) -> tuple[Integers, Integers, NDArray[np.uint64]]:
        """Start and length of every document, in tokens of the whole folder, and its hash."""
        starts, lengths, keys = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
        for number, shard in enumerate(self.meta["shards"]):
            edges = self.column(number, "idx", np.dtype("<i8"), shard["documents"] + 1)
            if edges[0] != 0 or edges[-1] != shard["tokens"] or (np.diff(edges) < 0).any():
                raise self._damaged(self.folder / f"{number:05}.idx", "does not fit its shard")
            starts.append(edges[:-1] + self._ends[number])
            lengths.append(np.diff(edges))
            keys.append(self.column(number, "key", np.dtype("<u8"), shard["documents"]))
        return np.concatenate(starts), np.concatenate(lengths), np.concatenate(keys)


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    with reading(f"data: {path}", "the shards are unfinished or damaged, write them again"):
        meta = json.loads(path.read_text())
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"data: {path} is not of format {FORMAT}; write the shards again")
    return meta


def is_shards(folder: Path) -> bool:
    """Whether a folder is meant to hold token shards (it need not be complete)."""
    return (folder / "00000.bin").is_file() or (folder / "00000.json").is_file()


class Source:
    """Documents of tokens, memory-mapped: those of a shard folder, or some of them, or parts of them."""

    def __init__(self, store: _Store, start: Integers, length: Integers, key: NDArray[np.uint64]) -> None:
        self._store, self._start, self._key = store, start, key
        self.length = length

    @classmethod
    def open(cls, folder: Path) -> Source:
        """All documents of a shard folder. Raises InputError when it is unfinished or damaged."""
        store = _Store(folder)
        return cls(store, *store.spans())

    @property
    def meta(self) -> Mapping[str, Any]:
        """What meta.json says of the whole folder."""
        return self._store.meta

    @property
    def has_labels(self) -> bool:
        return bool(self._store.meta["labels"])

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    @property
    def fingerprint(self) -> str:
        """Changes when the documents, their order or their tokens change."""
        seen = hashlib.blake2b(digest_size=12)
        for part in (self._start, self.length, self._key):
            seen.update(np.ascontiguousarray(part).tobytes())
        seen.update(json.dumps([self.meta["dtype"], self.meta["labels"], self.meta.get("tokenizer_sha256")]).encode())
        return seen.hexdigest()

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, n: int) -> NDArray[Any]:
        """Token ids of document n, as stored; a view of the file."""
        return self.read(n, 0, int(self.length[n]))

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[n] for n in range(len(self)))

    def read(self, n: int, first: int, last: int) -> NDArray[Any]:
        """Token ids first .. last-1 of document n."""
        start = int(self._start[n])
        return self._store.read("bin", start + first, start + last)

    def labels(self, n: int, first: int, last: int) -> NDArray[Any]:
        """Labels first .. last-1 of document n: the label column, else the ids themselves."""
        start = int(self._start[n])
        return self._store.read("labels" if self.has_labels else "bin", start + first, start + last)

    def select(self, at: Integers | NDArray[np.bool_] | Sequence[int]) -> Source:
        """The documents at these numbers, in this order."""
        where = np.asarray(at)
        return Source(self._store, self._start[where], self.length[where], self._key[where])

    def take(self, count: int) -> Source:
        """`count` documents drawn without replacement, always the same ones, in their order; all if there are fewer."""
        if count >= len(self):
            return self
        return self.select(np.sort(Permutation(len(self), 0, 1)(np.arange(count))))

    def split(self, fraction: float) -> tuple[Source, Source]:
        """(rest, held out): documents whose hash lies in the last `fraction` of all hashes are held out.

        Neither part is empty: when no hash lies there the largest one does, and a single document gives its last
        tokens.
        """
        if len(self) == 1:
            cut = min(max(round(self.tokens * (1 - fraction)), 1), self.tokens - 1) if self.tokens > 1 else 1
            rest = Source(self._store, self._start, np.array([cut]), self._key)
            return rest, Source(self._store, self._start + cut, np.array([self.tokens - cut]), self._key)
        held = self._key.astype(np.float64) >= (1 - fraction) * 2.0**64
        if not held.any():
            held = self._key == self._key.max()
        if held.all():
            held = self._key != self._key.min()
        if not held.any():
            # copies of one document: the last one is held out
            held = np.arange(len(self)) == len(self) - 1
        return self.select(~held), self.select(held)

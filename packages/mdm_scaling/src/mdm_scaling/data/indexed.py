"""Megatron's indexed files: `<prefix>.bin` holds tokens, `<prefix>.idx` where each sequence and document begins.

.idx    MMIDIDX\\0\\0, u64 version 1, u8 type code, u64 sequences, u64 document marks,
        i32 lengths[sequences], i64 byte offsets[sequences], i64 document marks (from 0 to the number of sequences)
.bin    tokens, little-endian, back to back
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lm_core.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in TYPES.items()}
# Vocabularies below this are written in 16 bits, as Megatron does
SMALL_VOCABULARY = 65500
_LOOK = 1 << 24


def prefix_of(name: str) -> Path:
    """The path without .bin or .idx."""
    path = Path(name).expanduser()
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def is_prefix(name: str) -> bool:
    """Whether a data argument names such files (one of the two is enough, so that the other can be reported missing)."""
    prefix = str(prefix_of(name))
    return Path(prefix + ".bin").is_file() or Path(prefix + ".idx").is_file()


def token_type(vocabulary: int) -> np.dtype[Any]:
    """What tokens of such a vocabulary are kept in."""
    return np.dtype("<u2" if vocabulary < SMALL_VOCABULARY else "<i4")


class Indexed:
    """Sequences of a prefix, memory-mapped."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any], length: NDArray[Any], offset: NDArray[Any], documents: NDArray[Any]) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.length, self.offset, self.documents = length, offset, documents
        path = Path(f"{prefix}.bin")
        self._tokens = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

    @classmethod
    def open(cls, prefix: Path) -> Indexed:
        """Raises InputError for files that are missing, damaged, cut off or empty."""
        index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, tokens):
            if not path.is_file():
                raise InputError(f"data: {path} is missing beside {(tokens if path is index else index).name}; both files are needed")
        raw = np.memmap(index, dtype=np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
        if len(raw) < HEADER.size or bytes(raw[:9]) != MAGIC:
            raise InputError(
                f"data: {index} does not begin with MMIDIDX; it is no Megatron index, write it with `mdm-scaling data tokenize`"
            )
        _, version, code, sequences, marks = HEADER.unpack(bytes(raw[: HEADER.size]))
        if version != 1 or code not in TYPES:
            raise InputError(f"data: {index} has version {version} and type code {code}; only version 1 and codes 1 to 8 can be read")
        dtype = np.dtype(TYPES[code])
        if dtype.kind == "f":
            raise InputError(f"data: {index} says that tokens are {dtype}; tokens are whole numbers, write the files again")
        size = HEADER.size + 12 * sequences + 8 * marks
        if len(raw) != size:
            raise InputError(f"data: {index} has {len(raw)} bytes, but its header promises {size}; copy or write it again")
        at = HEADER.size
        length = np.frombuffer(raw, "<i4", sequences, at)
        offset = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
        documents = np.frombuffer(raw, "<i8", marks, at + 12 * sequences)
        if not sequences or not marks:
            raise InputError(f"data: {index} lists no document; tokenise text into it first")
        needed = int(offset[-1]) + int(length[-1]) * dtype.itemsize
        if tokens.stat().st_size < needed:
            raise InputError(f"data: {tokens} has {tokens.stat().st_size} bytes, but its index needs {needed}; copy it again")
        return cls(prefix, dtype, length, offset, documents)

    def __len__(self) -> int:
        return len(self.length)

    @property
    def tokens(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the index or the size of the tokens."""
        seen = hashlib.blake2b(Path(f"{self.prefix}.idx").read_bytes(), digest_size=12)
        seen.update(str(len(self._tokens)).encode())
        return seen.hexdigest()

    def read(self, n: int, first: int, last: int) -> NDArray[Any]:
        """Tokens first .. last-1 of sequence n; a view of the file."""
        start = int(self.offset[n]) // self.dtype.itemsize
        return self._tokens[start + first : start + last]

    def __getitem__(self, n: int) -> NDArray[Any]:
        return self.read(n, 0, int(self.length[n]))

    def beyond(self, vocabulary: int) -> int | None:
        """The first token that is not below `vocabulary`, or None; reads the whole file once."""
        for first in range(0, len(self._tokens), _LOOK):
            part = self._tokens[first : first + _LOOK]
            bad = part[(part >= vocabulary) | (part < 0)]
            if len(bad):
                return int(bad[0])
        return None


class Writer:
    """Writes `<prefix>.bin` as documents arrive and `<prefix>.idx` at the end; both appear under their names together."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.lengths: list[int] = []
        self.marks: list[int] = [0]
        self._file: BinaryIO

    def __enter__(self) -> Writer:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(f"{self.prefix}.bin.partial", "wb")
        return self

    def add(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """One sequence, which is a document of its own."""
        self.add_document([tokens])

    def add_document(self, sequences: Iterable[Sequence[int] | NDArray[Any]]) -> None:
        """Several sequences that are one document."""
        for tokens in sequences:
            array = np.asarray(tokens)
            info = np.iinfo(self.dtype)
            assert not len(array) or (array.min() >= info.min and array.max() <= info.max)
            self._file.write(array.astype(self.dtype).tobytes())
            self.lengths.append(len(array))
        self.marks.append(len(self.lengths))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        bins = Path(f"{self.prefix}.bin.partial")
        if kind is not None:
            bins.unlink()
            return
        index = Path(f"{self.prefix}.idx.partial")
        index.write_bytes(index_bytes(self.lengths, self.marks, self.dtype))
        bins.replace(f"{self.prefix}.bin")
        index.replace(f"{self.prefix}.idx")


def index_bytes(lengths: Sequence[int], marks: Sequence[int], dtype: np.dtype[Any]) -> bytes:
    """The content of an .idx file."""
    sizes = np.asarray(lengths, dtype="<i4")
    offsets = (
        np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]]).astype("<i8") * dtype.itemsize if len(sizes) else sizes.astype("<i8")
    )
    header = HEADER.pack(MAGIC, 1, CODES[dtype], len(sizes), len(marks))
    return header + sizes.tobytes() + offsets.astype("<i8").tobytes() + np.asarray(marks, dtype="<i8").tobytes()

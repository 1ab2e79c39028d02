"""RWKV's `.bin` and `.idx` pairs: token ids back to back, and where each document lies (Megatron's memory-mapped format)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_core.errors import InputError

_MAGIC = b"MMIDIDX\x00\x00"
_CODES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}


class BinidxWriter:
    """Appends documents to `<prefix>.bin`; `close` writes `<prefix>.idx`."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._code = 8 if vocab_size <= 1 << 16 else 4
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(_file(prefix, ".bin"), "wb")  # noqa: SIM115 - lives as long as the writer
        self.sizes: list[int] = []

    def add(self, ids: Sequence[int] | NDArray[Any]) -> None:
        values = np.asarray(ids).astype(_CODES[self._code])
        self._file.write(values.tobytes())
        self.sizes.append(len(values))

    def close(self) -> None:
        self._file.close()
        sizes = np.array(self.sizes, dtype="<i4")
        starts = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)]) * _CODES[self._code].itemsize
        with open(_file(self._prefix, ".idx"), "wb") as file:
            file.write(_MAGIC + struct.pack("<QBQQ", 1, self._code, len(sizes), len(sizes) + 1))
            file.write(sizes.tobytes() + starts.astype("<i8").tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes())


def prefix_of(name: str) -> Path | None:
    """The common path of the pair that `name` (either file, or the path without suffix) means, or None."""
    path = Path(name).expanduser()
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return prefix if all(_file(prefix, suffix).is_file() for suffix in (".bin", ".idx")) else None


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def read(prefix: Path) -> Iterator[NDArray[Any]]:
    """The documents of a pair. Raises InputError when it is damaged or of another kind."""
    index = _file(prefix, ".idx")
    content = index.read_bytes()
    if content[:9] != _MAGIC or len(content) < 34:
        raise InputError(f"data: {index} is no index of token ids; name a .bin/.idx pair")
    _, code, count, _ = struct.unpack("<QBQQ", content[9:34])
    if code not in _CODES:
        raise InputError(f"data: {index} holds ids of type {code}, neither uint16 (8) nor int32 (4); write it again")
    if len(content) < 34 + 12 * count:
        raise InputError(f"data: {index} ends early; write it again")
    sizes = np.frombuffer(content, "<i4", count, 34)
    starts = np.frombuffer(content, "<i8", count, 34 + 4 * count)
    tokens = np.memmap(_file(prefix, ".bin"), dtype=_CODES[code], mode="r")
    for start, size in zip(starts.tolist(), sizes.tolist()):
        first = start // _CODES[code].itemsize
        if first + size > len(tokens):
            raise InputError(f"data: {index} names tokens beyond the end of its .bin file; write both again")
        yield tokens[first : first + size]

"""A folder of things made once: tokenised shards, trained tokenizers, converted models.

A folder in it is complete or absent: it is filled under another name and renamed, under a lock that the system frees
when its holder dies, so any number of processes may ask for the same folder at once and one of them makes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from lm_core.errors import DISK_ERRORS, ConfigError

log = logging.getLogger(__name__)


_elsewhere: ContextVar[Path | None] = ContextVar("elsewhere", default=None)


@contextmanager
def kept_in(place: Path | None) -> Iterator[None]:
    """Within, things are looked for and made in `place` instead of `root()`; None changes nothing."""
    token = _elsewhere.set(place or _elsewhere.get())
    try:
        yield
    finally:
        _elsewhere.reset(token)


def root() -> Path:
    """The folder of `kept_in`, else $LM_CORE_CACHE, else ~/.cache/lm_core."""
    if (place := _elsewhere.get()) is not None:
        return place.expanduser()
    chosen = os.environ.get("LM_CORE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lm_core"


def folder(kind: str, key: str) -> Path:
    """Where the thing of that kind and key is kept. It may not exist yet."""
    return root() / kind / key


def key_of(*parts: Any) -> str:
    """A short name for JSON-able `parts`: equal parts, equal name.

    >>> key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    True
    """
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def build(kind: str, key: str, write: Callable[[Path], None], *, resume: bool = False) -> Path:
    """The folder of that kind and key, filled by `write` if it is not there.

    `write` gets an empty folder to fill; with `resume` it gets what an interrupted call left in it.
    Raises ConfigError when the cache cannot be written.
    """
    final = folder(kind, key)
    if final.is_dir():
        return final
    partial = final.with_name(f".{key}.partial")
    with lock(final):
        if final.is_dir():
            return final
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        try:
            write(partial)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise _unwritable(error) from error
        partial.rename(final)
    return final


def _unwritable(error: OSError) -> ConfigError:
    option = "LM_CORE_CACHE" if _elsewhere.get() is None else "data_cache_dir"
    return ConfigError(f"{option}: {root()} cannot be written ({error.strerror}); set {option} to a folder that is yours and has room")


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Only one process at a time holds the lock of `path`; others wait, and say so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115 - closed below, on every way out
    except OSError as error:
        raise _unwritable(error) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process to make %s", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield

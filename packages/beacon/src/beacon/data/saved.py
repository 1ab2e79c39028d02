"""Rows written as `datasets` reads them; the folder is complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_core import cache
from lm_core.errors import ConfigError, InputError


def require_empty(folder: Path) -> None:
    """Raise ConfigError where `folder` holds something."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"output_dir: {folder} is not empty; choose another folder")


def write_rows(
    folder: Path,
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, bool],
    decides: Mapping[str, Any],
    empty: str,
    shard_size: str = "500MB",
) -> int:
    """Write `rows` of int32 `columns` (True: a list of them) and return how many there were, streaming them.

    `decides` are the options that decide the rows, so that the same rows are the same files.
    Raises InputError with the message `empty` where there is no row.
    """
    import datasets

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        path, number = str(partial / "rows.arrow"), datasets.Value("int32")
        features = datasets.Features({name: datasets.Sequence(number) if many else number for name, many in columns.items()})
        with datasets.arrow_writer.ArrowWriter(path=path, features=features, writer_batch_size=256) as writer:
            count = 0
            for row in rows:
                writer.write({name: row[name] for name in columns})
                count += 1
            if not count:
                raise InputError(empty)
            writer.finalize()
        table: Any = datasets.Dataset.from_file(path)
        # by default a fingerprint of the moment
        table._fingerprint = cache.key_of(dict(decides), count)[:16]
        table.save_to_disk(str(partial / "data"), max_shard_size=shard_size)
        del table
        if folder.exists():
            folder.rmdir()
        folder.parent.mkdir(parents=True, exist_ok=True)
        (partial / "data").rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not bars:
            datasets.enable_progress_bars()
    return count

"""Files and folders that commands write. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from lm_core.errors import ConfigError


def require_free(field: str, path: Path, overwrite: bool) -> None:
    """Make the folder around `path`. Raises ConfigError, before anything takes time, where `path` exists or that folder cannot be had."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{field}: {path} exists; add --overwrite, or choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{field}: {path.parent} cannot be made ({error.strerror}); choose another folder") from None

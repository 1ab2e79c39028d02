"""The TensorBoard command that shows several runs under short names. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path

from lm_core.errors import ConfigError, InputError


def command(runs: Sequence[str], port: int) -> list[str]:
    """`tensorboard --logdir_spec name:folder,... --port PORT`. Raises ConfigError for names that do not tell runs apart."""
    named: dict[str, Path] = {}
    for text in runs:
        for name, folder in _named(text):
            if ":" in name or "," in name or "," in str(folder):
                raise ConfigError(f"runs: {name}:{folder} has a colon or comma, which separate runs here; give it another NAME:")
            if name in named:
                raise ConfigError(f"runs: {named[name]} and {folder} are both called {name}; write NAME:FOLDER for one of them")
            named[name] = newest(folder)
    return ["tensorboard", "--logdir_spec", ",".join(f"{name}:{folder}" for name, folder in named.items()), "--port", str(port)]


def _named(text: str) -> list[tuple[str, Path]]:
    name, colon, place = text.partition(":")
    if colon and not Path(text).exists():
        return [(name, Path(place))]
    found = sorted(glob(text))
    if not found:
        raise InputError(f"runs: {text} matches no folder; name a run folder, or NAME:FOLDER")
    return [(Path(folder).name, Path(folder)) for folder in found]


def newest(folder: Path) -> Path:
    """The newest folder of TensorBoard files of a run; a folder without `runs/` stands for itself."""
    if not folder.is_dir():
        raise InputError(f"runs: {folder} is no folder; name a run folder")
    inner = [path for path in (folder / "runs").glob("*") if path.is_dir()]
    return max(inner, key=lambda path: (path.stat().st_mtime_ns, path.name), default=folder)

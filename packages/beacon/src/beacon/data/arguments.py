"""Data arguments of the guide: `activation-beacon:rel` lies under the data root, and `*` stands for several files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lm_core.errors import InputError

PREFIXES = ("activation-beacon", "long-llm", "data")


def data_root(root: Path | None) -> Path:
    """The base of prefixed paths: the option, else $BEACON_DATA_ROOT, else ./data."""
    return root if root is not None else Path(os.environ.get("BEACON_DATA_ROOT") or "data")


def located(arguments: Sequence[str], root: Path | None) -> list[str]:
    """`arguments` with prefixes replaced by the data root and patterns by the files they match, each with its [N] and @W.

    Raises InputError for a prefixed path that does not exist, naming where it was looked for.

    >>> located(["builtin:stdlib[5]"], None)
    ['builtin:stdlib[5]']
    """
    return [found for argument in arguments for found in _located(argument, root)]


def _located(argument: str, root: Path | None) -> list[str]:
    match = re.fullmatch(r"(.*?)((?:\[[^\[\]]*\])?(?:@[^@/\[\]]*)?)", argument.strip(), re.DOTALL)
    assert match is not None
    source, suffix = match[1], match[2]
    prefix, colon, rest = source.partition(":")
    if colon and prefix in PREFIXES:
        source = str(data_root(root).expanduser() / rest)
        if "*" not in source and not Path(source).exists():
            raise InputError(f"train_data: {argument} does not exist (looked for {Path(source).absolute()}); set --data-root to its base")
    if "*" not in source:
        return [source + suffix]
    paths = sorted(glob.glob(os.path.expanduser(source), recursive=True))
    if not paths:
        raise InputError(f"train_data: {argument} matches nothing (looked for {Path(source).absolute()}); correct the pattern")
    return [path + suffix for path in paths]

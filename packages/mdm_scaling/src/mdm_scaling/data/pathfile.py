"""Lists of corpora with weights: Megatron's path files, and the options that stand for them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lm_core.errors import InputError
from lm_core.yaml12 import parse

_PAIR = re.compile(r"\s*(\S+)\s+(.+?)\s*")


def read(path: Path) -> list[str]:
    """Data arguments, each with its weight, from a file of quoted pairs `"1.0 prefix"` or a YAML list of {weight, prefix}.

    Relative prefixes are looked for beside the file, then in the working directory.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"train_data_path_file: {path} cannot be read ({error}); name a text file") from None
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if lines and lines[0].lstrip().startswith("-"):
        entries = parse("list:\n" + "\n".join("  " + line for line in lines), str(path))["list"]
        if not all(isinstance(entry, dict) and {"weight", "prefix"} <= entry.keys() for entry in entries):
            raise InputError(
                f"train_data_path_file: {path} has an entry without weight and prefix; write - {{weight: 1.0, prefix: dir/name}}"
            )
        pairs = [(str(entry["weight"]), str(entry["prefix"])) for entry in entries]
    else:
        pairs = [_pair(word, path) for line in lines for word in _words(line, path)]
    if not pairs:
        raise InputError(f'train_data_path_file: {path} names no corpus; write lines such as "1.0 dir/prefix"')
    return [f"{_found(prefix, path)}@{_weight(weight, path)}" for weight, prefix in pairs]


def _words(line: str, path: Path) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InputError(f"train_data_path_file: {path}: {line.strip()} is not closed ({error}); quote every pair") from None


def _pair(word: str, path: Path) -> tuple[str, str]:
    match = _PAIR.fullmatch(word)
    if match is None:
        raise InputError(
            f'train_data_path_file: {path}: {word!r} is no pair of weight and prefix; quote both together, as in "1.0 dir/prefix"'
        )
    return match[1], match[2]


def _weight(text: str, path: Path) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise InputError(f"train_data_path_file: {path}: the weight {text!r} is not a number above 0; correct it")
    return weight


def _found(prefix: str, path: Path) -> str:
    beside = path.parent / prefix
    return str(beside) if any(Path(f"{beside}{suffix}").exists() for suffix in (".idx", ".bin", "")) else prefix


def weighted(texts: Sequence[str]) -> tuple[list[str], list[float]]:
    """Data arguments without their weights, and the weights, 1 for all where none has one."""
    from lm_core.data.sources import parse as taken_apart

    arguments = [taken_apart(text) for text in texts]
    if any(argument.weight is None for argument in arguments) and any(argument.weight is not None for argument in arguments):
        missing = next(argument for argument in arguments if argument.weight is None)
        raise InputError(f"data: {missing.source} has no weight, but others have; give every source one, as in SOURCE@0.3")
    names = [argument.source + (f"[{argument.samples}]" if argument.samples is not None else "") for argument in arguments]
    return names, [1.0 if argument.weight is None else argument.weight for argument in arguments]

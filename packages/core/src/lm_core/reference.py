"""docs/options.md, written from the declarations: `python -m lm_core.reference docs/options.md`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import click

from lm_core.config import Leaf, leaves
from lm_core.options import RunConfig
from lm_core.values import bounds, metavar

HEAD = """# Options

Written by `nox -s docs` from the declarations in the code. Every option is a flag, with hyphens or underscores, and a key of
`--config FILE` (YAML or JSON) and of `--set KEY=VALUE`; keys of a section nest. A flag wins over `--set`, which wins over a later
file, an earlier file, and the default.

BOOL reads `--x`, `--no-x` and `--x true|false|on|off|yes|no|1|0`; COUNT reads 10_000, 100M, 1.5B and 200*10^9; a list (`...`) is
repeated, or takes several words, or, unless it holds text or paths, is cut at commas; `none` or `null` clears what is not text.
"""


def options_page(sections: Sequence[tuple[str, type]]) -> str:
    """The page of options as Markdown, one section per (title, configuration class).

    An option that an earlier section lists in the same words is named, not repeated.
    """
    seen: dict[Leaf, str] = {}
    parts = [HEAD]
    for title, cls in sections:
        own = [leaf for leaf in leaves(cls) if _key(leaf) not in seen]
        parts.append(f"\n## {title}\n")
        parts += _table(own)
        for earlier, _ in sections:
            shared = [leaf.flag for leaf in leaves(cls) if seen.get(_key(leaf)) == earlier]
            if shared:
                parts.append(f"\nAs in *{earlier}*: {', '.join(f'`{flag}`' for flag in shared)}.\n")
        seen = {**{_key(leaf): title for leaf in own}, **seen}
    return "".join(parts)


def commands() -> Iterator[tuple[str, type]]:
    """Every configured command of the installed packages that build on this one, with its configuration class."""
    for entry in sorted(entry_points(group="console_scripts"), key=lambda entry: entry.name):
        requirements = entry.dist.requires or [] if entry.dist else []
        if any(requirement.startswith("lm-core") for requirement in requirements):
            groups = {id(found): found for found in vars(importlib.import_module(entry.module)).values() if isinstance(found, click.Group)}
            inside = {id(command) for group in groups.values() for command in group.commands.values()}
            for number, group in groups.items():
                if number not in inside:
                    yield from _configured(entry.name, group)


def _configured(name: str, command: click.Command) -> Iterator[tuple[str, type]]:
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _configured(f"{name} {inner.name}", inner)
    elif cls := getattr(command.callback, "config_class", None):
        yield f"`{name}`", cls


def _key(leaf: Leaf) -> Leaf:
    return leaf._replace(type=str(leaf.type), default=leaf.shown_default, limits=tuple(leaf.limits.items()))  # type: ignore[arg-type]


def _table(options: Sequence[Leaf]) -> list[str]:
    rows = ["\n| option | value | default | meaning |\n|---|---|---|---|\n"] if options else []
    for leaf in options:
        names = "<br>".join(f"`{flag}`" for flag in (leaf.flag, *leaf.flags))
        value = ", ".join(part for part in (f"`{metavar(leaf.type)}`", bounds(leaf.limits)) if part)
        default = leaf.shown_default.removeprefix("default: ")
        key = f" Key `{leaf.path}`." if "." in leaf.path else ""
        cells = [names, value, f"`{default}`" if default not in ("", "required") else default, leaf.help + key]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return rows


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(options_page([("Every training command", RunConfig), *commands()]), encoding="utf-8")

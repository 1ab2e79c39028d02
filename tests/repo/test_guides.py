"""docs/from-the-guides.md: what it calls accepted is accepted, and what it calls absent is absent."""

from __future__ import annotations

import re

import click
import pytest

from tests.repo.test_commands import SCRIPTS, group
from tests.repo.tree import ROOT

SECTIONS = re.findall(r"^## [^\n]*`([\w -]+)`\n(.*?)(?=^## |\Z)", (ROOT / "docs/from-the-guides.md").read_text(), re.DOTALL | re.MULTILINE)


def flags(words: str) -> set[str]:
    """Every spelling that a command reads."""
    script, *names = words.split()
    command: click.Command = group(SCRIPTS[script])
    for name in names:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return {plain(flag) for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def plain(flag: str) -> str:
    return flag.replace("_", "-") if flag.startswith("--") else flag


@pytest.mark.parametrize(("command", "text"), SECTIONS, ids=[command for command, _ in SECTIONS])
def test_flags_of_the_guides_are_what_the_page_says(command: str, text: str) -> None:
    accepted, _, others = text.partition("| in the guide |")
    known = flags(command)
    assert {plain(flag) for flag in re.findall(r"`(-[\w-]+)`", accepted)} <= known
    assert not {plain(flag) for flag in re.findall(r"^\| `(-[\w-]+)` \|", others, re.MULTILINE)} & known
    assert accepted.count("`") > 10

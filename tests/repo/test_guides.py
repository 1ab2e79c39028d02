"""docs/from-the-guides.md: what it calls accepted is accepted, what it calls absent is absent, and its commands run as printed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from lm_core.flags import Word
from tests.repo.documents import blocks
from tests.repo.test_commands import SCRIPTS, group
from tests.repo.tree import ROOT, methods

PAGE = (ROOT / "docs/from-the-guides.md").read_text()
SECTIONS = re.findall(r"^## [^\n]*`([\w -]+)`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
MODULES = {package.name: script for package in methods() for script in package.project.get("scripts", {})}
# the programs of a block say what they were given, one line each
TOLD = "".join(f'{program}() {{ echo "{program} ${{*@Q}}"; }}\n' for program in ("torchrun", "deepspeed", "python", *SCRIPTS))


def typed(block: str) -> list[list[str]]:
    """The commands of our scripts in a block, without what starts them several times."""
    said = subprocess.run(["bash", "-euo", "pipefail", "-c", TOLD + block], capture_output=True, text=True, check=True).stdout
    return [started(shlex.split(line)) for line in said.splitlines()]


def started(words: list[str]) -> list[str]:
    at = next((at for at, word in enumerate(words) if word in ("-m", "--module")), None) if words[0] not in SCRIPTS else None
    return words if at is None else [MODULES[words[at + 1]], *words[at + 2 :]]


COMMANDS = [words for block in blocks(PAGE) for words in typed(block.text)]


def found(words: str) -> click.Command:
    script, *names = words.split()
    command: click.Command = group(SCRIPTS[script])
    for name in names:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


def flags(words: str) -> set[str]:
    """Every spelling that a command reads."""
    return {plain(flag) for parameter in found(words).params for flag in (*parameter.opts, *parameter.secondary_opts)}


def plain(flag: str) -> str:
    return flag.replace("_", "-") if flag.startswith("--") else flag


@pytest.mark.parametrize(("command", "text"), SECTIONS, ids=[command for command, _ in SECTIONS])
def test_flags_of_the_guides_are_what_the_page_says(command: str, text: str) -> None:
    accepted, *_ = text.partition("As written:")[2].partition("\nRead, with nothing to choose")
    known, words = flags(command), getattr(getattr(found(command).callback, "config_class", None), "words", {})
    assert {plain(flag) for flag in re.findall(r"`(-[\w-]+)`", accepted)} <= known
    read = re.findall(r"^\| `(-[\w-]+)` \| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE)
    assert read == [(flag, allowed(word), word.instead) for flag, word in words.items()]
    refused = {plain(flag) for flag in re.findall(r"^\| `(-[\w-]+)` \| [^|]* \|$", text, re.MULTILINE)}
    assert not (refused | words.keys()) & known
    assert accepted.count("`") > 10


def allowed(word: Word) -> str:
    return "alone" if word.values == ("true",) else ", ".join(f"`{value}`" for value in word.values) or "any"


each_command = pytest.mark.parametrize("words", COMMANDS, ids=lambda words: f"{words[0]} {COMMANDS.index(words)}")


def settle(folder: Path) -> None:
    """Put configuration files where the guides' readers have them."""
    teacher = {
        "RWKV": {"layers": [0, 1], "grad_cp": 1},
        "Llama": {"model_id": "models/Qwen2.5-0.5B-Instruct/"},
        "kl_weight": 1,
        "ce_weight": 0,
    }
    stage0 = {"train_micro_batch_size_per_gpu": 8, "train_batch_size": 256, "gradient_clipping": 1.0, "zero_optimization": {"stage": 0}}
    shares = {"arxiv": 50, "book": 50}
    for name, content in {"configs/qwen_0.5b.yaml": teacher, "ds_configs/best.json": stage0, "data/config/even.json": shares}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "launchers").symlink_to(ROOT / "launchers")


@each_command
def test_commands_of_the_guides_are_read(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path)
    monkeypatch.chdir(tmp_path)
    script, *rest = words
    group(SCRIPTS[script]).main([*rest, "--print-config"], standalone_mode=False)

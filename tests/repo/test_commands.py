"""What a user meets first, for every command of every package: --help, the page of options, the shipped presets."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from tests.repo.tree import ROOT, methods

# What a shipped preset takes from its package's tiny one to run anywhere in seconds.
INPUTS = (
    "model",
    "tokenizer",
    "data",
    "eval_data",
    "min_length",
    "max_length",
    "micro_batch_size",
    "precision",
    "beacon_window",
    "beacon_stride",
)
PRESETS = [path for package in methods() for path in sorted(package.folder.glob("presets/*.yaml"))]
each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: f"{path.parents[1].name}/{path.stem}")
SCRIPTS = {script: entry for package in methods() for script, entry in package.project.get("scripts", {}).items()}


def group(entry: str) -> click.Group:
    """The commands behind an entry point."""
    module = importlib.import_module(entry.partition(":")[0])
    return next(value for value in vars(module).values() if isinstance(value, click.Group))


def commands() -> list[tuple[str, ...]]:
    """Every script alone, and with each of its commands, however deep."""
    return [words for script, entry in SCRIPTS.items() for words in below((script,), group(entry))]


def below(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[str, ...]]:
    yield words
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from below((*words, name), child)


# Asks one script for the help of all of its commands, in one interpreter; "loaded" is what must not be after each.
ASK = """
import contextlib, io, json, sys
from {module} import {function}
for rest in {commands}:
    sys.argv, out, error, code = [{script!r}, *rest, "--help"], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = {function}()
        except SystemExit as end:
            code = end.code
    loaded = sorted({{"torch", "transformers"}} & sys.modules.keys())
    print(json.dumps([*rest, {{"code": code or 0, "usage": "Usage: " in out.getvalue(), "error": error.getvalue(), "loaded": loaded}}]))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_command_loads_no_torch(script: str) -> None:
    module, _, function = SCRIPTS[script].partition(":")
    below_it = [rest for name, *rest in commands() if name == script]
    code = ASK.format(module=module, function=function, script=script, commands=below_it)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, "")
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [rest for *rest, _ in found] == below_it
    assert [answer for answer in found if answer[-1] != {"code": 0, "usage": True, "error": "", "loaded": []}] == []


def test_page_of_options_is_current(tmp_path: Path) -> None:
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    if missing := {package.project["name"] for package in methods()} - installed:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}; nox -s quick installs all packages")
    subprocess.run([sys.executable, "-m", "lm_core.reference", str(tmp_path / "options.md")], check=True, cwd=ROOT)
    assert (ROOT / "docs/options.md").read_text() == (tmp_path / "options.md").read_text(), "docs/options.md is stale; run nox -s docs"


def run(preset: Path, *arguments: str) -> None:
    """Run the command that the first line of a preset shows, with further arguments."""
    script, *words = shlex.split(preset.read_text().splitlines()[0].removeprefix("# "))
    group(SCRIPTS[script]).main([*words, *arguments], standalone_mode=False)


@each_preset
def test_first_line_of_a_preset_is_its_command(preset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(preset.relative_to(ROOT)) in preset.read_text().splitlines()[0]
    monkeypatch.chdir(ROOT)
    run(preset, "--print-config")
    resolved = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(preset.read_text())
    assert given.keys() <= resolved.keys()
    assert given["model"] == resolved["model"]


@each_preset
@pytest.mark.slow
def test_presets_run_two_steps(preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = yaml.safe_load((preset.parent / "tiny.yaml").read_text())
    small = tmp_path / "small.yaml"
    # tiny data have no labels
    unlabelled = {"task": "lm"} if "task" in yaml.safe_load(preset.read_text()) else {}
    small.write_text(yaml.safe_dump({name: tiny[name] for name in INPUTS if name in tiny} | unlabelled))
    monkeypatch.chdir(ROOT)
    run(preset, "--config", str(small), "--budget", "2 steps", "--eval-every", "never", "--output-dir", str(tmp_path / "run"))
    assert json.loads((tmp_path / "run/result.json").read_text())["progress"]["steps"] == 2
    assert (tmp_path / "run/final/model.safetensors").exists()

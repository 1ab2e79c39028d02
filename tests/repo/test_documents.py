"""Commands in documents are sound; `nox -s readme` runs them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.repo.documents import Block, blocks
from tests.repo.tree import ROOT, Package, methods, packages, tracked

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *(package.folder / "README.md" for package in packages())]
ALL = [block for path in DOCUMENTS for block in blocks(path.read_text(), str(path.relative_to(ROOT)))]
BLOCKS = [block for block in ALL if block.language == "bash"]
PYTHON = [block for block in ALL if block.language == "python"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_commands_are_sound_shell(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_imports_shown_in_python_exist(block: Block) -> None:
    for line in ast.parse(block.text).body:
        if isinstance(line, ast.Import | ast.ImportFrom):
            exec(ast.unparse(line), {})


@pytest.mark.parametrize("package", methods(), ids=lambda package: package.name)
def test_readmes_of_methods_have_one_shape(package: Package) -> None:
    """Title, what it is, install and run in seconds, a table of what one wants, the options, the paper."""
    text, folder = (package.folder / "README.md").read_text(), package.folder.relative_to(ROOT)
    (script, *_) = package.project["scripts"]
    install, run, *_ = blocks(text)[0].text.splitlines()
    assert text.startswith(f"# {script}\n\n")
    assert install == f"pip install -c constraints.txt {folder}"
    assert run.startswith(f"{script} ")
    assert f"--config {folder}/presets/tiny.yaml" in run
    for part in ("| what | how |", f"`{' '.join(run.split()[:2])} --help`", "options.md)", "https://arxiv.org/"):
        assert part in text, part


def headings(path: Path) -> set[str]:
    """The names by which links reach the headings of a document."""
    return {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("path", [path for path in tracked() if path.suffix == ".md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    broken = []
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)]*))?\)", path.read_text()):
        found = path.parent / target if target else path
        if not found.exists() or (anchor and anchor not in headings(found)):
            broken.append(target + anchor)
    assert broken == []


def test_page_of_benchmarks_shows_what_was_measured() -> None:
    from tests.repo.benchmarks import page

    parts = json.loads((ROOT / "docs/benchmarks.json").read_text())
    assert (ROOT / "docs/benchmarks.md").read_text() == page(parts), (
        "draw it again: python -m tests.repo.benchmarks docs/benchmarks.json docs/benchmarks.md --draw"
    )


def test_page_of_engines_is_current() -> None:
    from tests.repo.engines import page

    assert (ROOT / "docs/engines.md").read_text() == page(), "docs/engines.md is stale; run nox -s docs"

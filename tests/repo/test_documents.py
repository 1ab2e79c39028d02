"""Commands in documents are sound; `nox -s readme` runs them."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.repo.documents import Block, blocks
from tests.repo.tree import ROOT, methods, packages, tracked

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


def test_every_method_has_a_readme_with_a_command() -> None:
    for package in methods():
        places = [block.place for block in BLOCKS if block.place.startswith(f"{(package.folder / 'README.md').relative_to(ROOT)}:")]
        assert places, package.name


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


def test_page_of_engines_is_current() -> None:
    from tests.repo.engines import page

    assert (ROOT / "docs/engines.md").read_text() == page(), "docs/engines.md is stale; run nox -s docs"

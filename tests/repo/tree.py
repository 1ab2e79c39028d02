"""Where things stand in the repository. Nothing is listed by hand: packages, presets and documents are found."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Package:
    """One folder with a pyproject.toml; `name` is what Python imports."""

    folder: Path

    @cached_property
    def name(self) -> str:
        return next(path.name for path in sorted(self.folder.glob("src/*")) if path.name.isidentifier())

    @cached_property
    def project(self) -> dict[str, Any]:
        return dict(tomllib.loads((self.folder / "pyproject.toml").read_text())["project"])

    @cached_property
    def sources(self) -> list[Path]:
        """Python files that ship, without the tests that stand beside an op."""
        return [path for path in sorted((self.folder / "src").rglob("*.py")) if not path.name.startswith(("test_", "conftest"))]

    def module(self, path: Path) -> str:
        """Dotted name of the module in the file `path`."""
        return ".".join(path.relative_to(self.folder / "src").with_suffix("").parts).removesuffix(".__init__")


def packages() -> list[Package]:
    return [Package(path.parent) for path in sorted([*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("kernels-cuda/pyproject.toml")])]


def methods() -> list[Package]:
    """Packages that are neither core nor kernels."""
    return [package for package in packages() if package.name not in ("lm_core", "kernels_cuda")]


def tracked() -> list[Path]:
    """Files that belong to the repository: what git tracks or would, or everything in an unpacked archive."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return [
            path for path in ROOT.rglob("*") if path.is_file() and not set(path.relative_to(ROOT).parts) & {".nox", ".venv", "__pycache__"}
        ]
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@dataclass(frozen=True)
class Import:
    """An imported dotted name. `lazy` inside a function; imports for type checkers only are left out."""

    name: str
    line: int
    lazy: bool


def imports(source: str, module: str = "") -> Iterator[Import]:
    """The imports of a module's source.

    >>> [(i.name, i.lazy) for i in imports("import a.b\\nfrom c import d\\ndef f():\\n    import e")]
    [('a.b', False), ('c.d', False), ('e', True)]
    """
    yield from _imports(ast.parse(source), module, lazy=False)


def _imports(node: ast.AST, module: str, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                base = ".".join([*module.split(".")[: -child.level], base]).rstrip(".")
            yield from (Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports(other, module, lazy)
        else:
            yield from _imports(child, module, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

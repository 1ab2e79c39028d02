"""Who may import whom, read from the sources (nothing is imported)."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest

from tests.repo.tree import ROOT, Package, imports, methods, packages

TORCH_FREE = ["errors", "config", "cli", "options", "record", "progress", "schedule"]
# Loading one of these takes seconds or prints, so they are imported inside the function that needs them.
LAZY = {"deepspeed", "wandb", "tensorboard", "peft", "bitsandbytes", "matplotlib", "datasets"}

each_package = pytest.mark.parametrize("package", packages(), ids=lambda package: package.name)


def found(package: Package) -> list[tuple[str, str, bool]]:
    """(place, imported name, lazy) of every import in a package."""
    return [
        (f"{path.relative_to(ROOT)}:{entry.line}", entry.name, entry.lazy)
        for path in package.sources
        for entry in imports(path.read_text(), package.module(path) + (".x" if path.name == "__init__.py" else ""))
    ]


@each_package
def test_packages_import_only_what_stands_below_them(package: Package) -> None:
    allowed = {package.name}
    if package in methods():
        allowed |= {"lm_core", "kernels_cuda"}
    ours = {other.name for other in packages()} - allowed
    assert [(place, name) for place, name, _ in found(package) if name.split(".")[0] in ours] == []


@each_package
def test_heavy_libraries_are_imported_where_they_are_used(package: Package) -> None:
    assert [(place, name) for place, name, lazy in found(package) if name.split(".")[0] in LAZY and not lazy] == []


@each_package
def test_third_party_imports_are_declared_dependencies(package: Package) -> None:
    requirements = [*package.project["dependencies"]]
    for extra, more in package.project.get("optional-dependencies", {}).items():
        requirements += more if extra != "test" else []
    declared = {re.split(r"[\s\[@<>=!~;]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    providers = importlib.metadata.packages_distributions()

    def is_declared(name: str) -> bool:
        top = name.split(".")[0]
        known = top in sys.stdlib_module_names or top in {package.name, "lm_core", "kernels_cuda"}
        return known or bool(declared & {other.lower().replace("_", "-") for other in providers.get(top, [top])})

    assert [(place, name) for place, name, _ in found(package) if not is_declared(name)] == []


def test_data_does_not_import_engines() -> None:
    core = next(package for package in packages() if package.name == "lm_core")
    places = [(place, name) for place, name, _ in found(core) if "/lm_core/data/" in place and name.startswith("lm_core.engine")]
    assert places == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_modules_behind_help_do_not_load_torch(module: str) -> None:
    code = f"import sys, lm_core.{module}; sys.exit(' '.join(sorted({{'torch', 'transformers'}} & sys.modules.keys())) or None)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_loop_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "packages/core/src/lm_core/train.py").read_text().splitlines()) < 150

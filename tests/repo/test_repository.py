"""Properties of the whole tree: pins agree, the test command is the README's, nothing private slipped in."""

from __future__ import annotations

import re
import tomllib

import yaml

from tests.repo.tree import ROOT, packages, tracked

# Places that exist on one person's machine only.
PRIVATE = re.compile(r"(?<![\w.>~/])/(?:home|root|Users|work|private)/\w")


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_constraints_are_exact_and_carry_no_build_tag_or_host() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "+" not in text
    assert "://" not in text
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins().values())


def test_hooks_use_the_pinned_versions() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    wanted = [tuple(pin.split("==")) for hook in hooks for pin in hook.get("additional_dependencies", [])]
    assert wanted
    assert [(name, version) for name, version in wanted if pins()[name] != version] == []


def test_every_dependency_is_pinned() -> None:
    names = set()
    for package in packages():
        extras = package.project.get("optional-dependencies", {})
        for requirement in [*package.project["dependencies"], *(one for extra in extras.values() for one in extra)]:
            if "{root" not in requirement:
                names.add(re.split(r"[\[@<>=!~; ]", requirement)[0].lower().replace("_", "-"))
    assert names - pins().keys() == set()


def test_torch_is_a_range_without_build_tag() -> None:
    for package in packages():
        torch = [requirement for requirement in package.project["dependencies"] if re.match(r"torch\b", requirement)]
        assert torch == ["torch>=2.11"], package.name


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = re.findall(r"^python3 -m venv .*nox$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 1
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        if path.is_file() and path.suffix not in {".png", ".gz", ".gguf"}
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert found == []


def test_python_version_is_the_same_everywhere() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["mypy"]["python_version"] == "3.11"
    assert settings["ruff"]["target-version"] == "py311"
    assert {package.project["requires-python"] for package in packages()} == {">=3.11"}


def test_template_is_a_method_in_under_200_lines() -> None:
    files = [path for path in tracked() if path.is_relative_to(ROOT / "docs/template") and not path.is_symlink()]
    assert 0 < sum(len(path.read_text().splitlines()) for path in files) < 200

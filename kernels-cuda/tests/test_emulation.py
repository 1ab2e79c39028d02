"""CUDA kernels on the CPU: right kernels give right numbers in any order of threads, and each kind of mistake is found."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels_cuda import build, testing

THREADS = 96
Run = Callable[..., tuple[str, list[float]]]


# the second way of switching fibers serves processors other than x86-64
@pytest.fixture(scope="module", params=["", "-DKERNELS_CUDA_UCONTEXT"], ids=["assembly", "ucontext"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    source, library = Path(__file__).parent / "emulation_kernels.cu", tmp_path_factory.mktemp("emulation") / "kernels.so"
    # hidden, as in every build: two libraries with different fibers must not share them
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-shared", *request.param.split()]
    subprocess.run([str(build.compiler()), *flags, f"-I{build.INCLUDE}", "-x", "c++", str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]

    def call(kernel: str, order: str = "forward", shared_bytes: int = 0) -> tuple[str, list[float]]:
        out = (ctypes.c_float * THREADS)()
        with testing.thread_order(order):
            report = function(kernel.encode(), out, shared_bytes).decode()
        return report, list(out)

    return call


ORDERS = pytest.mark.parametrize("order", ["forward", "reverse", "1", "2"])


@ORDERS
def test_right_kernel_is_right_in_any_order(run: Run, order: str) -> None:
    report, out = run("block_sum", order)
    assert (report, out[:2]) == ("", [THREADS * (THREADS + 1) / 2] * 2)


@ORDERS
def test_votes_and_atomics(run: Run, order: str) -> None:
    assert run("votes", order) == ("", [7.0] * THREADS)
    assert run("counts", order)[1][0] == 2 * THREADS


def test_missing_barrier_shows_as_nan_in_some_order(run: Run) -> None:
    sums = run("missing_barrier", "forward")[1] + run("missing_barrier", "reverse")[1]
    assert any(math.isnan(value) for value in sums)


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("divergent_barriers", r"thread 0 waits at the __syncthreads\(\) of line \d+, but thread 32 at that of line \d+"),
        ("thread_that_left", r"waits at the __syncthreads\(\) of line \d+, but thread 7 has left the kernel"),
        ("shared_overflow", "a write past the end of a shared array"),
        ("absent_lane", "lane 0 reads lane 20, which takes no part"),
        ("lanes_that_never_come", r"waits for ever at the warp operation of line \d+"),
    ],
)
@ORDERS
def test_mistake_is_reported(run: Run, kernel: str, report: str, order: str) -> None:
    found = run(kernel, order)[0]
    assert found.startswith("block (0, 0, 0): ")
    assert re.search(report, found)


def test_dynamic_shared_memory_has_the_size_of_the_launch(run: Run) -> None:
    assert run("dynamic_overflow", shared_bytes=4 * THREADS)[0] == ""
    assert "past the end" in run("dynamic_overflow", shared_bytes=4 * THREADS - 4)[0]


def test_shared_memory_starts_as_nan(run: Run) -> None:
    assert all(math.isnan(value) for value in run("unwritten_shared")[1])

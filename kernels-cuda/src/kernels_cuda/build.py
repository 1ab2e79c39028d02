"""Compiles an op's sources on first use, with torch.utils.cpp_extension and ninja, and registers them with torch.

Every build has a folder of its own, named by a hash of all that goes into it: sources, flags, torch, compiler and CPU. So
environments and machines that share a home never overwrite each other's builds, and a finished build is never touched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch

# cpu: the C++ twin; cuda: the kernels of op.cu; emulated: the same op.cu compiled by the C++ compiler (include/emulation.h)
Kind = Literal["cpu", "cuda", "emulated"]

PACKAGE = Path(__file__).parent
INCLUDE = PACKAGE / "include"
WAIT_SECONDS = 900


class BuildError(RuntimeError):
    """The kernels of an op cannot be had here; the message says what is missing."""


def ops() -> list[str]:
    """Every op by its place in the tree, such as "head/linear_cross_entropy"."""
    return sorted(str(source.parent.relative_to(PACKAGE)) for source in PACKAGE.glob("*/*/op.cpp"))


@cache
def load(op: str, kind: Kind) -> None:
    """Make one implementation of `op` callable through torch.ops, compiling it first where that has not been done yet.

    Safe to call from many processes at once: one compiles, the others wait for it. Raises BuildError.
    """
    torch.ops.load_library(build(op, kind))


def build(op: str, kind: Kind) -> Path:
    """The shared library of `op`; compiled, and then loaded too, unless an equal build is in the cache."""
    if kind == "cuda" and torch.version.cuda is None:
        raise BuildError(f"{op}: torch {torch.__version__} was built without CUDA; install a CUDA build of torch")
    name = f"{op.replace('/', '-')}-{kind}-{_hash(*_ingredients(op, kind))}"
    cxx, nvcc = compiler(), cuda_compiler()
    if not cxx or (kind == "cuda" and not nvcc):
        # a build made where a compiler exists serves nodes that have none
        if found := sorted(cache_folder().glob(f"{name}-*/op.so")):
            return found[0]
        missing = (
            "a C++ compiler was not found; install g++ or clang++, or set CXX"
            if not cxx
            else "nvcc was not found; install the CUDA toolkit, or set CUDA_HOME"
        )
        raise BuildError(f"{op}: {missing}")
    folder = cache_folder() / f"{name}-{_hash(_version(cxx), _version(nvcc) if kind == 'cuda' and nvcc else '')}"
    library = folder / "op.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not library.exists():
                _compile(op, kind, library)
    except OSError as error:
        raise BuildError(f"KERNELS_CUDA_CACHE: {folder} cannot be used ({error}); set it to a folder that can be written") from error
    return library


def cache_folder() -> Path:
    """$KERNELS_CUDA_CACHE, or ~/.cache/kernels_cuda."""
    return Path(os.environ.get("KERNELS_CUDA_CACHE") or Path.home() / ".cache" / "kernels_cuda")


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX if set, else the first of c++, g++ and clang++ on PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def cuda_compiler() -> str | None:
    """Path of nvcc: below $CUDA_HOME if set, else on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


def cuda_flags(architectures: list[str]) -> list[str]:
    """nvcc's flags for architectures such as "90"; what the tests compile is what users get."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    # torch's build defines these, which takes the operators and conversions of half and bfloat16 away
    kept = [f"-U__CUDA_NO_{part}__" for part in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")]
    return ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", *kept, *targets]


def _cxx_flags(kind: Kind) -> list[str]:
    flags = [
        "-std=c++17",
        "-O3",
        "-march=native",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        f"-DKERNELS_CUDA_BUILD_{kind.upper()}",
    ]
    if kind == "cuda":
        flags.append("-DUSE_CUDA")  # torch's headers declare their CUDA part only then
    return flags + os.environ.get("KERNELS_CUDA_CXXFLAGS", "").split()


def _architectures() -> list[str]:
    """Those of the GPUs in this machine."""
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return sorted(f"{major}{minor}" for major, minor in capabilities)


def _ingredients(op: str, kind: Kind) -> Iterator[str]:
    folder = PACKAGE / op
    for file in sorted([*folder.glob("*.cpp"), *folder.glob("*.cu"), *folder.glob("*.h"), *INCLUDE.glob("*.h")]):
        yield f"{file.name}\n{file.read_text()}"
    yield " ".join([*_cxx_flags(kind), *(cuda_flags(_architectures()) if kind == "cuda" else [])])
    yield torch.__version__
    yield _cpu()


@cache
def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@cache
def _version(path: str) -> str:
    return f"{path}\n{subprocess.run([path, '--version'], capture_output=True, text=True, check=False).stdout}"


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one build.

    The kernel releases the lock when its holder dies, so a killed build blocks nobody. Where locks do not work (some network
    file systems) or the holder is stuck, we go on without: a library appears by rename, so two builds cost time, nothing else.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    with path.open("a") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables of this process, and of those it starts, inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _compile(op: str, kind: Kind, library: Path) -> None:
    """Build and load `library`.

    torch works in a new folder inside the private one, and the library moves out of it when it is complete and has been loaded. In
    a folder that stays, the file `lock` of a killed build would stop torch for ever, compilers that outlive a killed ninja would
    write into the next build, and torch would take a build that failed in this process for a finished one.
    """
    # an installed ninja lies beside Python, which need not be on PATH when Python is called by its own path
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if not shutil.which("ninja", path=path):
        raise BuildError(f"{op}: ninja was not found; install it (python -m pip install ninja)")
    # exactly the compilers whose versions the folder's name holds, and no compiler cache, which takes all `native` for one processor
    variables = {"PATH": path, "CXX": compiler() or "", "PYTORCH_NVCC": cuda_compiler() or "", "TORCH_NO_COMPILER_WRAPPER": "1"}
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary, _environment(**variables):
        # takes 0.4 s, which a cached build does not need
        from torch.utils import cpp_extension

        name = Path(temporary).name
        sources = _sources(op, kind, Path(temporary))
        try:
            cpp_extension.load(
                name,
                [str(source) for source in sources],
                extra_cflags=_cxx_flags(kind),
                extra_cuda_cflags=cuda_flags(_architectures()) if kind == "cuda" else None,
                extra_include_paths=[str(PACKAGE / op)],
                build_directory=temporary,
                with_cuda=kind == "cuda",
                is_python_module=False,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"{op}: compiling failed\n{error}") from error
        os.replace(Path(temporary) / f"{name}.so", library)


def _sources(op: str, kind: Kind, folder: Path) -> list[Path]:
    """What is compiled for one kind; files made for it are written to `folder`."""
    sources, kernels = sorted((PACKAGE / op).glob("*.cpp")), sorted((PACKAGE / op).glob("*.cu"))
    if kind == "cpu":
        return sources
    if kind == "cuda":
        return sources + kernels
    # the C++ compiler goes by the ending of a name
    made = [folder / f"{kernel.name}.cpp" for kernel in kernels]
    for kernel, wrapper in zip(kernels, made, strict=True):
        wrapper.write_text(f'#include "{kernel.name}"\n')
    return sources + made

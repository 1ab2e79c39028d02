"""CUDA sources compile for every architecture we name, with no register spilled to memory, and link; needs nvcc, not a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from kernels_cuda import build

ARCHITECTURES = ["80", "90", "100"]
SOURCES = sorted(str(source.relative_to(build.PACKAGE)) for source in build.PACKAGE.glob("*/*/*.cu"))

pytestmark = pytest.mark.skipif(build.cuda_compiler() is None, reason="nvcc is not installed")


@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(source: str, tmp_path: Path) -> None:
    command = [str(build.cuda_compiler()), *build.cuda_flags(ARCHITECTURES), "--resource-usage", "-c", str(build.PACKAGE / source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "op.o")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stdout + run.stderr)
    assert len(spills) >= len(ARCHITECTURES)
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("op", build.ops())
def test_library_for_gpus_links(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, with empty libraries for those that a CPU build of torch lacks; hence it cannot be loaded."""
    for name in ("c10_cuda", "torch_cuda", "cudart"):
        subprocess.run([str(build.compiler()), "-shared", "-x", "c++", "/dev/null", "-o", str(tmp_path / f"lib{name}.so")], check=True)
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("KERNELS_CUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_architectures", lambda: ["90"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(Path(str(build.cuda_compiler())).parent.parent))
    library = build.build(op, "cuda")
    missing = subprocess.run(["nm", "-DC", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    assert "cuda" in missing
    assert " kernels::" not in missing

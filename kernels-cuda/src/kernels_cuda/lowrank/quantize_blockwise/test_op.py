"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels_cuda import testing
from kernels_cuda.lowrank import quantize_blockwise
from kernels_cuda.lowrank.quantize_blockwise.cases import code_book, numbers

SIGNED, UNSIGNED = code_book(True), code_book(False)
each_implementation = pytest.mark.parametrize("implementation", testing.implementations())
both_books = pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])


def quantize(x: Tensor, code: Tensor, implementation: str, **options: object) -> tuple[Tensor, Tensor]:
    device = "cuda" if implementation == "cuda" else "cpu"
    with testing.using(implementation):
        codes, absmax = quantize_blockwise(x.to(device), code.to(device), **options)  # type: ignore[arg-type]
    return codes.cpu(), absmax.cpu()


def brute_force(quotients: Tensor, code: Tensor) -> Tensor:
    """Nearest value in float64, the lower of two equally near ones."""
    distance = np.abs(quotients.double().numpy()[:, None] - code.double().numpy()[None])
    return torch.tensor(distance.argmin(axis=1), dtype=torch.uint8)


@each_implementation
@both_books
def test_every_middle_and_its_neighbours_get_the_nearest_code(code: Tensor, implementation: str) -> None:
    middles = ((code[:-1].double() + code[1:].double()) / 2).float()
    around = [middles, torch.nextafter(middles, torch.tensor(2.0)), torch.nextafter(middles, torch.tensor(-2.0)), code]
    special = torch.tensor([0.0, -0.0, 1.0, 1e-45, 1e-40, 1.1754944e-38, 1e-30, 2.7e-7, 1 - 2**-24])
    values = torch.cat([*around, special, *([-special] if code is SIGNED else [])])
    # every block has a 1, so quotients are the values
    x = torch.ones(len(values) // 63 + 1, 64)
    places = torch.arange(len(values))
    x[places // 63, 1 + places % 63] = values
    found = quantize(x, code, implementation, block=64)[0]
    assert torch.equal(found.view(-1), brute_force(x.view(-1), code))


@each_implementation
@both_books
def test_every_upper_half_of_a_float_gets_the_nearest_code(code: Tensor, implementation: str) -> None:
    upper = torch.arange(0x3F80) << 16
    values = torch.cat([upper, upper | 0xFFFF]).to(torch.int32).view(torch.float32)
    values = torch.cat([values, -values, torch.ones(1)]) if code is SIGNED else torch.cat([values, torch.ones(1)])
    if implementation == "emulated":
        values = values[len(values) % 7 :: 7].contiguous()
        values[-1] = 1
    found = quantize(values, code, implementation, block=len(values))[0]
    assert torch.equal(found, brute_force(values, code))


@each_implementation
def test_a_positive_second_moment_never_becomes_zero(implementation: str) -> None:
    x = torch.tensor([1.0, 1e-12, 1e-45, 0.0] * 40)
    assert set(quantize(x, UNSIGNED, implementation)[0].tolist()) == {255, 0}
    assert quantize(x, UNSIGNED, implementation, nonzero=True)[0].tolist() == [255, 1, 1, 0] * 40


@each_implementation
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_shows_in_the_maximum_of_its_block_only(implementation: str, bad: float) -> None:
    x = numbers(3, 300)
    x[1, 70] = bad
    codes, absmax = quantize(x, SIGNED, implementation, row_aligned=True)
    assert absmax.isfinite().tolist() == [[True, True], [False, True], [True, True]]
    assert absmax.isnan().any() == (bad != bad)
    assert codes[1, :256].eq(0).all()


def test_codes_agree_with_bitsandbytes_on_normal_numbers() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    theirs, state = functional.quantize_blockwise(x, code=SIGNED, blocksize=256)
    ours, absmax = quantize(x, SIGNED, "cpu")
    assert torch.equal(state.absmax, absmax)
    assert (theirs.view(-1) != ours.view(-1)).float().mean() <= 0.002


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names of x86-64 levels")
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64 -DKERNELS_PLAIN", "-march=x86-64-v3 -DKERNELS_PLAIN"])
def test_every_instruction_set_gives_the_same_codes(flags: str, tmp_path: Path) -> None:
    """The checks compare codes with the reference, one by one."""
    code = """
from kernels_cuda import testing
for op in ("lowrank/quantize_blockwise", "lowrank/adam8bit_step_"):
    testing.verify(testing.find(op), "cpu")
"""
    environment = os.environ | {"KERNELS_CUDA_CXXFLAGS": flags, "KERNELS_CUDA_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)

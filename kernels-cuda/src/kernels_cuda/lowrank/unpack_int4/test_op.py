"""What is particular to this op and to `project_int4`; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import doctest

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.lowrank import pack_int4, project, project_accumulate_, project_int4, unpack_int4
from kernels_cuda.lowrank.quantize_blockwise.cases import numbers

each_implementation = pytest.mark.parametrize("implementation", ["reference", *testing.implementations()])


@each_implementation
def test_a_number_moves_by_half_a_step_at_most(implementation: str) -> None:
    device = "cuda" if implementation == "cuda" else "cpu"
    x = torch.rand(7, 300, generator=torch.Generator().manual_seed(0)).to(device)
    with testing.using(implementation):
        codes, scale, zero = pack_int4(x)
        assert float((unpack_int4(codes, scale, zero, x.shape) - x).abs().max()) <= 0.5 / 15 + 2**-10
        rounded = unpack_int4(codes, scale, zero, x.shape, torch.bfloat16)
        assert torch.equal(rounded, unpack_int4(codes, scale, zero, x.shape).bfloat16())


@pytest.mark.parametrize("implementation", ["reference", "cpu", "emulated"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_is_that_onto_the_unpacked_basis(dtype: torch.dtype, side: str, implementation: str) -> None:
    """To the bit where the tiles of the CPU compute both; else it is the same product."""
    for r, d, k in ((1, 1, 1), (5, 7, 3), (17, 130, 9), (8, 48, 641), (33, 50, 385)):
        G = numbers(*((k, d) if side == "left" else (d, k)), seed=1).to(dtype)
        packed = pack_int4(numbers(r, k, seed=2).clamp(-100, 100))
        for beta in (0.0, 1.0, 0.5):
            found, expected = numbers(r, d, seed=3), numbers(r, d, seed=3)
            with testing.using(implementation):
                project_int4(found, G, *packed, side, beta, dtype=dtype)
                project_accumulate_(expected, G, unpack_int4(*packed, (r, k), dtype), side, beta)
            assert torch.equal(found, expected), (r, d, k, beta)


def test_examples_of_projections_run() -> None:
    result = doctest.testmod(project)
    assert result.attempted > 0
    assert result.failed == 0


def test_projection_refuses_by_name() -> None:
    packed = pack_int4(torch.ones(2, 4))
    for changed, message in (
        ({"L": torch.ones(3, 6)}, r"codes: shape \(4,\) does not hold 12 numbers"),
        ({"L": torch.ones(2, 5)}, "G: shape .* has d = 6 where L has 5"),
        ({"side": "full"}, "side: 'full' is not known"),
        ({"dtype": torch.float16}, "dtype: torch.float16 is not supported"),
    ):
        arguments = {"L": torch.ones(2, 6), "G": torch.ones(4, 6), "side": "left", **changed}
        with pytest.raises(ValueError, match=message):
            project_int4(codes=packed[0], scale=packed[1], zero=packed[2], **arguments)

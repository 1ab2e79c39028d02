"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import bench, testing
from kernels_cuda.lowrank import adam8bit_step_, adam_step_, dequantize_blockwise
from kernels_cuda.lowrank.adam8bit_step_.bench import FUSED
from kernels_cuda.lowrank.adam8bit_step_.cases import make

each_implementation = pytest.mark.parametrize("implementation", ["cpu", "emulated"])
MOMENTS = ("mq", "m_absmax", "vq", "v_absmax")


@each_implementation
def test_the_step_is_that_of_float32_moments(implementation: str) -> None:
    """It uses the new moments before they are quantised."""
    arguments = make(torch.float32, 4, 300, row_aligned=True)
    m, v = (
        dequantize_blockwise(arguments[f"{moment}q"], arguments[f"{moment}_absmax"], arguments[code], row_aligned=True)
        for moment, code in (("m", "code_s"), ("v", "code_u"))
    )
    expected = torch.empty_like(m)
    with testing.using(implementation):
        adam_step_(arguments["L"], m, v, expected, 0.9, 0.999, 1e-8, 3)
        adam8bit_step_(**arguments)
    assert torch.equal(arguments["out"], expected)


@each_implementation
def test_elements_that_start_from_zero_move_on_the_first_step(implementation: str) -> None:
    """By one, whatever the scale of the others in their block; and none of their second moments is lost."""
    arguments = make(torch.float32, 256, step=1)
    arguments["L"] = torch.cat([torch.full((128,), 1e-6), torch.ones(128)])
    for name in MOMENTS:
        arguments[name] = torch.zeros_like(arguments[name])
    with testing.using(implementation):
        adam8bit_step_(**arguments)
    torch.testing.assert_close(arguments["out"], torch.tensor([1 / 1.01, 1.0]).repeat_interleave(128))
    assert arguments["vq"].min() == 1


@each_implementation
def test_a_gradient_that_is_not_finite_shows_in_the_maxima(implementation: str) -> None:
    arguments = make(torch.float32, 2, 300, row_aligned=True)
    arguments["L"][1, 3] = torch.nan
    with testing.using(implementation):
        adam8bit_step_(**arguments)
    for name in ("m_absmax", "v_absmax"):
        assert arguments[name].isnan().tolist() == [[False, False], [True, False]]


@pytest.mark.bench
def test_targets_of_time() -> None:
    for shape in bench.shapes("lowrank/adam8bit_step_"):
        ours, theirs = bench.paired(shape, repeats=20)
        limit = 3.0 if shape.baseline_name == FUSED else 0.15
        assert ours.cpu_seconds <= limit * theirs.cpu_seconds, shape.baseline_name

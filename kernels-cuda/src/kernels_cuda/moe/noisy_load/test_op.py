"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import math

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.moe import noisy_load
from kernels_cuda.moe.noisy_load.cases import make

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@each_implementation
def test_equals_a_loop_over_tokens_and_experts(implementation: str) -> None:
    arguments = make(torch.float32, 9, 6, 2, masked=True)
    logits, noisy, sigma = (arguments[name].tolist() for name in ("logits_TN", "noisy_TN", "sigma_TN"))
    expected = [0.0] * 6
    for token in range(9):
        for expert in range(6):
            # what it takes to be among the two largest
            others = sorted(noisy[token][:expert] + noisy[token][expert + 1 :])[-2]
            u = (logits[token][expert] - others) / sigma[token][expert]
            expected[expert] += bool(arguments["mask_T"][token]) * 0.5 * (1 + math.erf(u / math.sqrt(2)))
    moved = testing.moved(arguments, device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        torch.testing.assert_close(noisy_load(**moved).detach().cpu(), torch.tensor(expected), rtol=2e-6, atol=2e-6)


@each_implementation
def test_chances_are_right_from_one_end_to_the_other(implementation: str) -> None:
    place = "cuda" if implementation == "cuda" else "cpu"
    for distance in (-40.0, -12.0, -9.0, -5.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 5.0, 9.0, 40.0):
        logits = torch.tensor([[0.0, distance, -1e4]], device=place)
        with testing.using(implementation):
            found = noisy_load(logits, torch.tensor([[0.0, -1.0, -1e4]], device=place), torch.ones(1, 3, device=place), 1)
        assert found[1].item() == pytest.approx(0.5 * math.erfc(-distance / math.sqrt(2)), rel=1e-5, abs=1e-37)


def test_backward_refuses_a_second_derivative() -> None:
    arguments = make(torch.float32, 5, 8, 2)
    with testing.using("cpu"), pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(noisy_load(**arguments).sum(), arguments["logits_TN"], create_graph=True)

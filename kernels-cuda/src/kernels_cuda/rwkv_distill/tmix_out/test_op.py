"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels_cuda import testing
from kernels_cuda.rwkv_distill import tmix_out
from kernels_cuda.rwkv_distill.tmix_out.cases import make

each_implementation = pytest.mark.parametrize("implementation", ["reference", *testing.implementations()])


@each_implementation
def test_agrees_with_torchs_group_norm(implementation: str) -> None:
    """Value and every gradient, against another writing of the same maths in float64."""
    arguments = make(torch.float32, 2, 7, 3, 32)
    leaves = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    y, r, k, v, r_k, gn_w, gn_b, gate = (value.double() for value in leaves.values())
    normalised = F.group_norm(y.reshape(14, 96), 3, gn_w.flatten(), gn_b.flatten(), arguments["eps"]).view(y.shape)
    expected = (normalised + torch.einsum("bthn,bthn,hn->bth", r, k, r_k)[..., None] * v) * gate
    factors = torch.rand(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    theirs = torch.autograd.grad(expected, list(leaves.values()), factors)
    with testing.using(implementation):
        found = tmix_out(**arguments)
        ours = torch.autograd.grad(found, list(leaves.values()), factors.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for name, mine, other in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@each_implementation
def test_scale_of_the_outputs_does_not_matter_after_normalising(implementation: str) -> None:
    arguments = make(torch.float32, 1, 4, 2, 64, bonus=False, gate=False)
    arguments["eps"] = 0.0
    with testing.using(implementation):
        first, second = tmix_out(**arguments), tmix_out(**{**arguments, "y": 7 * arguments["y"] + 3})
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_refuses_a_second_derivative() -> None:
    arguments = make(torch.float32, 1, 3, 1, 32)
    with testing.using("cpu"), pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(tmix_out(**arguments).sum(), arguments["y"], create_graph=True)

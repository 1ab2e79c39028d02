"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.lowrank import adam_step_


@pytest.mark.parametrize("implementation", ["reference", "cpu", "emulated"])
def test_many_steps_on_a_weight_are_those_of_torchs_adamw(implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, generator=generator)
    theirs, ours, m, v = torch.nn.Parameter(start.clone()), start.clone(), torch.zeros(300), torch.zeros(300)
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    with testing.using(implementation):
        for step in range(1, 51):
            gradient = torch.randn(300, generator=generator)
            theirs.grad = gradient
            optimizer.step()
            adam_step_(gradient, m, v, ours, 0.9, 0.999, 1e-8, step, decay=1 - 1e-3, alpha=1e-2)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)

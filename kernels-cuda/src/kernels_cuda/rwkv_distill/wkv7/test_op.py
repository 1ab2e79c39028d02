"""What is particular to this op; what every op must do is in tests/test_ops.py, and every recurrence in tests/test_recurrences.py."""

from __future__ import annotations

import torch

from kernels_cuda import testing
from kernels_cuda.rwkv_distill import wkv7
from kernels_cuda.rwkv_distill.wkv7.cases import make

INPUTS = "rwkvab"


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def test_backward_is_the_analytic_one() -> None:
    """The gradients in closed form, state by state, in float64."""
    arguments = testing.moved(make(torch.float32, 40, logit=8.0, state=True), dtype=torch.float64)
    r, w, k, v, a, b = (arguments[name].detach()[0, :, 0] for name in INPUTS)
    scale = torch.exp(torch.tensor(-0.5, dtype=torch.float64))
    decay = torch.exp(-scale * torch.sigmoid(w))
    states = [arguments["initial_state"].detach()[0, 0]]
    for t in range(40):
        states.append(states[-1] * decay[t] + torch.outer(states[-1] @ a[t], b[t]) + torch.outer(v[t], k[t]))
    dy = torch.linspace(-1, 1, 40 * 32, dtype=torch.float64).view(40, 32)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in INPUTS}
    dstate = torch.zeros(32, 32, dtype=torch.float64)
    for t in reversed(range(40)):
        before, after = states[t], states[t + 1]
        dstate = dstate + torch.outer(dy[t], r[t])
        dremoved = dstate @ b[t]
        slope = -scale * decay[t] * torch.sigmoid(w[t]) * torch.sigmoid(-w[t])
        for name, value in {
            "r": after.T @ dy[t],
            "w": slope * (dstate * before).sum(0),
            "k": dstate.T @ v[t],
            "v": dstate @ k[t],
            "a": before.T @ dremoved,
            "b": dstate.T @ (before @ a[t]),
        }.items():
            found[name].insert(0, value)
        dstate = dstate * decay[t] + torch.outer(dremoved, a[t])
    single = testing.moved(arguments, dtype=torch.float32)
    with testing.using("cpu"):
        y, _ = wkv7(**single)
    leaves = [single[name] for name in (*INPUTS, "initial_state")]
    gradients = torch.autograd.grad(y, leaves, dy.float().view(1, 40, 1, 32))
    for name, gradient in zip(INPUTS, gradients, strict=False):
        assert relative_error(gradient[0, :, 0], torch.stack(found[name])) < 1e-6, name
    assert relative_error(gradients[-1][0, 0], dstate) < 1e-6

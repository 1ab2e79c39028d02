"""What is particular to this op; what every op must do is in tests/test_ops.py, and every recurrence in tests/test_recurrences.py."""

from __future__ import annotations

import torch

from kernels_cuda import testing
from kernels_cuda.rwkv_distill import wkv6
from kernels_cuda.rwkv_distill.wkv6.cases import make

TOKENS = "rkvw"


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def test_backward_is_the_analytic_one() -> None:
    """The gradients in closed form, state by state, in float64."""
    arguments = testing.moved(make(torch.float32, 40, state=True), dtype=torch.float64)
    r, k, v, w = (arguments[name].detach()[0, :, 0] for name in TOKENS)
    u = arguments["u"].detach()[0]
    decay = torch.exp(-torch.exp(w))
    states = [arguments["initial_state"].detach()[0, 0]]
    for t in range(40):
        states.append(states[-1] * decay[t] + torch.outer(v[t], k[t]))
    dy = torch.linspace(-1, 1, 40 * 32, dtype=torch.float64).view(40, 32)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in TOKENS}
    dstate, du = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    for t in reversed(range(40)):
        bonus = v[t] @ dy[t]
        for name, value in {
            "r": states[t].T @ dy[t] + u * k[t] * bonus,
            "k": dstate.T @ v[t] + u * r[t] * bonus,
            "v": dstate @ k[t] + dy[t] * (u * k[t] * r[t]).sum(),
            "w": -torch.exp(w[t]) * decay[t] * (dstate * states[t]).sum(0),
        }.items():
            found[name].insert(0, value)
        du += k[t] * r[t] * bonus
        dstate = dstate * decay[t] + torch.outer(dy[t], r[t])
    single = testing.moved(arguments, dtype=torch.float32)
    with testing.using("cpu"):
        y, _ = wkv6(**single)
    leaves = [single[name] for name in (*TOKENS, "u", "initial_state")]
    gradients = torch.autograd.grad(y, leaves, dy.float().view(1, 40, 1, 32))
    for name, gradient in zip(TOKENS, gradients, strict=False):
        assert relative_error(gradient[0, :, 0], torch.stack(found[name])) < 1e-6, name
    assert relative_error(gradients[-2][0], du) < 1e-6
    assert relative_error(gradients[-1][0, 0], dstate) < 1e-6

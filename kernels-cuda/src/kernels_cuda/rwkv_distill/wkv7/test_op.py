"""What is particular to this op; what every op must do is in tests/test_ops.py. B batch, T time, H heads, N head size."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from kernels_cuda import bench, testing
from kernels_cuda.rwkv_distill import wkv7, wkv7_step
from kernels_cuda.rwkv_distill.wkv7 import reference
from kernels_cuda.rwkv_distill.wkv7.cases import make

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())
INPUTS = "rwkvab"


@pytest.fixture(autouse=True)
def cpu_twin() -> Iterator[None]:
    with testing.using("cpu"):
        yield


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@each_implementation
@pytest.mark.parametrize("logit", [None, 8.0, -8.0])
@pytest.mark.parametrize(("dtype", "bound_y", "bound_gradient"), [(torch.float32, 5e-6, 5e-6), (torch.bfloat16, 6e-3, 1.5e-2)])
def test_error_is_within_the_bounds_that_methods_rely_on(
    logit: float | None, dtype: torch.dtype, bound_y: float, bound_gradient: float, implementation: str
) -> None:
    """Relative root mean square against float64, on the rounded inputs."""
    length = 40 if implementation == "emulated" else 300
    arguments = testing.made(testing.Case("", lambda dtype: _long(dtype, length, logit)), dtype, implementation)
    with testing.using(implementation):
        ours = testing.results(wkv7, arguments)
    for name, truth in testing.results(reference.wkv7, testing.moved(arguments, dtype=torch.float64)).items():
        bound = 5e-6 if name == "output 1" else bound_gradient if name.startswith("gradient") else bound_y
        assert relative_error(ours[name], truth) <= bound, name


def _long(dtype: torch.dtype, length: int, logit: float | None) -> testing.Arguments:
    return make(dtype, length, size=64, logit=logit, state=True, final=True)


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
    y, _ = wkv7(**single)
    leaves = [single[name] for name in (*INPUTS, "initial_state")]
    gradients = torch.autograd.grad(y, leaves, dy.float().view(1, 40, 1, 32))
    for name, gradient in zip(INPUTS, gradients, strict=False):
        assert relative_error(gradient[0, :, 0], torch.stack(found[name])) < 1e-6, name
    assert relative_error(gradients[-1][0, 0], dstate) < 1e-6


@each_implementation
def test_two_halves_joined_by_the_state_are_the_whole(implementation: str) -> None:
    arguments = testing.made(
        testing.Case("", lambda dtype: make(dtype, 50, batch=2, state=True, final=True)), torch.float32, implementation
    )

    def halves(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        parts, state = [], arguments["initial_state"]
        for tokens in (slice(0, 13), slice(13, None)):
            inputs = {name: arguments[name][:, tokens] for name in INPUTS}
            y, state = wkv7(**inputs, initial_state=state, output_final_state=True)
            parts.append(y)
        assert state is not None
        return torch.cat(parts, 1), state

    with testing.using(implementation):
        whole, joined = testing.results(wkv7, arguments), testing.results(halves, arguments)
    for name in whole:
        torch.testing.assert_close(joined[name], whole[name], rtol=1e-5, atol=1e-5)


@each_implementation
def test_packed_sequences_do_not_see_each_other(implementation: str) -> None:
    starts = (0, 3, 40, 56)
    arguments = testing.made(
        testing.Case("", lambda dtype: make(dtype, 56, starts=starts, state=True, final=True)), torch.float32, implementation
    )

    def separate(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [
            wkv7(
                **{name: arguments[name][:, start:end] for name in INPUTS},
                initial_state=arguments["initial_state"][index : index + 1],
                output_final_state=True,
            )
            for index, (start, end) in enumerate(pairwise(starts))
        ]
        return torch.cat([y for y, _ in outputs], 1), torch.cat([state for _, state in outputs if state is not None])

    with testing.using(implementation):
        packed, apart = testing.results(wkv7, arguments), testing.results(separate, arguments)
    for name in packed:
        assert torch.equal(packed[name], apart[name]), name


@each_implementation
def test_padding_may_hold_anything_and_changes_nothing(implementation: str) -> None:
    """Real tokens among NaN give what they give alone; padding gets zeros."""
    arguments = testing.made(testing.Case("", lambda dtype: make(dtype, 20, state=True, final=True)), torch.float32, implementation)
    real = torch.arange(20, device=arguments["r"].device) % 3 != 0
    padded = {**arguments, "mask": real[None].int()}
    for name in INPUTS:
        padded[name] = arguments[name].detach().masked_fill(~real[None, :, None, None], float("nan")).requires_grad_()
    alone = {**arguments, **{name: arguments[name].detach()[:, real].requires_grad_() for name in INPUTS}}
    with testing.using(implementation):
        y, state = wkv7(**padded)
        y_alone, state_alone = wkv7(**alone)
        assert state is not None
        assert state_alone is not None
        gradients = torch.autograd.grad(y[:, real].sum() + state.sum(), [padded[name] for name in INPUTS])
        gradients_alone = torch.autograd.grad(y_alone.sum() + state_alone.sum(), [alone[name] for name in INPUTS])
    torch.testing.assert_close(state, state_alone)
    torch.testing.assert_close(y[:, real], y_alone)
    assert not y[:, ~real].any()
    for gradient, gradient_alone in zip(gradients, gradients_alone, strict=True):
        torch.testing.assert_close(gradient[:, real], gradient_alone)
        assert not gradient[:, ~real].any()


@each_implementation
def test_gradients_of_the_final_state_alone(implementation: str) -> None:
    arguments = testing.made(testing.Case("", lambda dtype: make(dtype, 5, final=True)), torch.float32, implementation)

    def state_only(**arguments: Any) -> torch.Tensor:
        state = wkv7(**arguments)[1]
        assert state is not None
        return state

    with testing.using(implementation):
        found = torch.autograd.grad(state_only(**arguments).sum(), arguments["k"])[0]
    with testing.using("reference"):
        torch.testing.assert_close(found, torch.autograd.grad(state_only(**arguments).sum(), arguments["k"])[0])


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_steps_are_the_sequence(size: int, dtype: torch.dtype, implementation: str) -> None:
    arguments = testing.made(
        testing.Case("", lambda dtype: make(dtype, 3, batch=2, heads=2, size=size, state=True, final=True)), dtype, implementation
    )
    with testing.using(implementation), torch.no_grad():
        y, final = wkv7(**arguments)
        state = arguments["initial_state"].detach().clone()
        place = state.data_ptr()
        outputs = [wkv7_step(*(arguments[name][:, t] for name in INPUTS), state) for t in range(3)]
    assert state.data_ptr() == place
    torch.testing.assert_close(torch.stack(outputs, 1), y)
    torch.testing.assert_close(state, final)


def test_step_takes_strided_states_and_refuses_gradients() -> None:
    inputs = [torch.randn(2, 1, 32) for _ in range(6)]
    state = torch.randn(1, 2, 32, 32).transpose(0, 1)
    expected = state.clone()
    y = reference.wkv7_step(*inputs, expected)
    torch.testing.assert_close(wkv7_step(*inputs, state), y)
    torch.testing.assert_close(state, expected)
    with pytest.raises(ValueError, match="k: requires_grad=True is wrong because a step changes the state in place; use wkv7"):
        wkv7_step(*inputs[:2], inputs[2].clone().requires_grad_(), *inputs[3:], state)
    with pytest.raises(ValueError, match=r"state: shape \(1, 1, 32, 32\) does not fit"):
        wkv7_step(*inputs, torch.zeros(1, 1, 32, 32))


def test_nan_is_not_hidden() -> None:
    arguments = make(torch.float32, 4)
    with torch.no_grad():
        arguments["w"][0, 2, 0, 5] = float("nan")
    y, _ = wkv7(**arguments)
    assert y[0].isnan().any(-1)[:, 0].tolist() == [False, False, True, True]


def test_second_derivative_is_refused() -> None:
    arguments = make(torch.float32, 2)
    y, _ = wkv7(**arguments)
    with pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(y.sum(), arguments["r"], create_graph=True)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 levels")
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64 -DKERNELS_ONE_LEVEL", "-march=x86-64-v3 -DKERNELS_ONE_LEVEL"])
def test_twin_is_right_with_any_instructions(flags: str) -> None:
    """Those picked at run time, SSE alone and AVX2 alone."""
    code = "from kernels_cuda import testing; testing.verify(testing.find('rwkv_distill/wkv7'), 'cpu')"
    environment = {**os.environ, "KERNELS_CUDA_CXXFLAGS": flags}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def seconds(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


@pytest.mark.bench
def test_targets_of_time() -> None:
    """One thread, paired, best of five: forward 20, forward and backward 15, one step 3 times as fast as the reference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = bench.shapes("rwkv_distill/wkv7")[0]
    arguments = shape.make()
    leaves = [arguments[name] for name in INPUTS]
    token = [torch.randn(8, 14, 64) for _ in INPUTS]
    state = torch.zeros(8, 14, 64, 64)
    pairs = [
        (lambda f: f(**arguments), shape.function, shape.baseline, 20),
        (lambda f: torch.autograd.grad(f(**arguments).sum(), leaves), shape.function, shape.baseline, 15),
        (lambda f: f(*token, state), wkv7_step, reference.wkv7_step, 3),
    ]
    try:
        for run, ours, theirs, factor in pairs:
            runs = [(seconds(lambda: run(ours)), seconds(lambda: run(theirs))) for _ in range(5)]  # noqa: B023
            best, baseline = (min(times) for times in zip(*runs, strict=True))
            assert baseline >= factor * best, f"{baseline / best:.1f} times as fast, not {factor}"
    finally:
        torch.set_num_threads(threads)

"""What every recurrence does. B batch, T time, H heads, N head size."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels_cuda import bench, testing
from kernels_cuda.rwkv_distill import wkv6, wkv6_step, wkv7, wkv7_step
from kernels_cuda.rwkv_distill.wkv6 import cases as cases6
from kernels_cuda.rwkv_distill.wkv6 import reference as reference6
from kernels_cuda.rwkv_distill.wkv7 import cases as cases7
from kernels_cuda.rwkv_distill.wkv7 import reference as reference7


@dataclass(frozen=True)
class Recurrence:
    """One op and what its tests need to know."""

    name: str
    function: Callable[..., Any]
    step: Callable[..., Any]
    reference: ModuleType
    make: Callable[..., testing.Arguments]
    tokens: str  # inputs of every token
    heads: str  # inputs of every head
    logits: tuple[float | None, ...]  # of decays, at which accuracy is bounded
    nan_reaches: int  # the first token whose output a NaN in the decay of token 2 reaches
    times: tuple[int, int]  # as fast as the reference: forward; forward and backward

    @property
    def plain(self) -> Callable[..., Any]:
        """The reference."""
        found: Callable[..., Any] = getattr(self.reference, self.name)
        return found

    def tokens_of(self, arguments: testing.Arguments, *place: Any) -> list[torch.Tensor]:
        """Inputs in the order of the step, at a place of [B, T] for those of tokens."""
        return [arguments[name][place] if name in self.tokens else arguments[name] for name in (*self.tokens, *self.heads)]


RECURRENCES = [
    Recurrence("wkv6", wkv6, wkv6_step, reference6, cases6.make, "rkvw", "u", (None, 1.6, 8.0, -8.0), 3, (15, 12)),
    Recurrence("wkv7", wkv7, wkv7_step, reference7, cases7.make, "rwkvab", "", (None, 8.0, -8.0), 2, (20, 15)),
]
each = pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in RECURRENCES])
each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@pytest.fixture(autouse=True)
def cpu_twin() -> Iterator[None]:
    with testing.using("cpu"):
        yield


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-30))


@each_implementation
@pytest.mark.parametrize(("op", "logit"), [pytest.param(op, logit, id=f"{op.name}-{logit}") for op in RECURRENCES for logit in op.logits])
@pytest.mark.parametrize(("dtype", "bound_y", "bound_gradient"), [(torch.float32, 5e-6, 5e-6), (torch.bfloat16, 6e-3, 1.5e-2)])
def test_error_is_within_the_bounds_that_methods_rely_on(
    op: Recurrence, logit: float | None, dtype: torch.dtype, bound_y: float, bound_gradient: float, implementation: str
) -> None:
    """Relative root mean square against float64, on the rounded inputs."""
    length = 40 if implementation == "emulated" else 300
    arguments = testing.made(
        testing.Case("", lambda dtype: op.make(dtype, length, size=64, logit=logit, state=True, final=True)), dtype, implementation
    )
    with testing.using(implementation):
        ours = testing.results(op.function, arguments)
    for name, truth in testing.results(op.plain, testing.moved(arguments, dtype=torch.float64)).items():
        bound = 5e-6 if name == "output 1" else bound_gradient if name.startswith("gradient") else bound_y
        assert relative_error(ours[name], truth) <= bound, name


@each
@each_implementation
def test_two_halves_joined_by_the_state_are_the_whole(op: Recurrence, implementation: str) -> None:
    arguments = testing.made(
        testing.Case("", lambda dtype: op.make(dtype, 50, batch=2, state=True, final=True)), torch.float32, implementation
    )

    def halves(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        parts, state = [], arguments["initial_state"]
        for tokens in (slice(0, 13), slice(13, None)):
            inputs = {**{name: arguments[name][:, tokens] for name in op.tokens}, **{name: arguments[name] for name in op.heads}}
            y, state = op.function(**inputs, initial_state=state, output_final_state=True)
            parts.append(y)
        assert state is not None
        return torch.cat(parts, 1), state

    with testing.using(implementation):
        whole, joined = testing.results(op.function, arguments), testing.results(halves, arguments)
    for name in whole:
        torch.testing.assert_close(joined[name], whole[name], rtol=1e-5, atol=1e-5)


@each
@each_implementation
def test_packed_sequences_do_not_see_each_other(op: Recurrence, implementation: str) -> None:
    starts = (0, 3, 40, 56)
    arguments = testing.made(
        testing.Case("", lambda dtype: op.make(dtype, 56, starts=starts, state=True, final=True)), torch.float32, implementation
    )

    def separate(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [
            op.function(
                **{name: arguments[name][:, start:end] for name in op.tokens},
                **{name: arguments[name] for name in op.heads},
                initial_state=arguments["initial_state"][index : index + 1],
                output_final_state=True,
            )
            for index, (start, end) in enumerate(pairwise(starts))
        ]
        return torch.cat([y for y, _ in outputs], 1), torch.cat([state for _, state in outputs if state is not None])

    with testing.using(implementation):
        packed, apart = testing.results(op.function, arguments), testing.results(separate, arguments)
    for name in packed:
        # the gradient of what all sequences share is a sum over them
        if name.removeprefix("gradient of ") in op.heads:
            torch.testing.assert_close(packed[name], apart[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(packed[name], apart[name]), name


@each
@each_implementation
def test_padding_may_hold_anything_and_changes_nothing(op: Recurrence, implementation: str) -> None:
    """Real tokens among NaN give what they give alone; padding gets zeros."""
    arguments = testing.made(testing.Case("", lambda dtype: op.make(dtype, 20, state=True, final=True)), torch.float32, implementation)
    real = torch.arange(20, device=arguments["r"].device) % 3 != 0
    padded = {**arguments, "mask": real[None].int()}
    for name in op.tokens:
        padded[name] = arguments[name].detach().masked_fill(~real[None, :, None, None], float("nan")).requires_grad_()
    alone = {**arguments, **{name: arguments[name].detach()[:, real].requires_grad_() for name in op.tokens}}
    with testing.using(implementation):
        y, state = op.function(**padded)
        y_alone, state_alone = op.function(**alone)
        assert state is not None
        assert state_alone is not None
        gradients = torch.autograd.grad(y[:, real].sum() + state.sum(), [padded[name] for name in op.tokens])
        gradients_alone = torch.autograd.grad(y_alone.sum() + state_alone.sum(), [alone[name] for name in op.tokens])
    torch.testing.assert_close(state, state_alone)
    torch.testing.assert_close(y[:, real], y_alone)
    assert not y[:, ~real].any()
    for gradient, gradient_alone in zip(gradients, gradients_alone, strict=True):
        torch.testing.assert_close(gradient[:, real], gradient_alone)
        assert not gradient[:, ~real].any()


@each
@each_implementation
def test_gradients_of_the_final_state_alone(op: Recurrence, implementation: str) -> None:
    arguments = testing.made(testing.Case("", lambda dtype: op.make(dtype, 5, final=True)), torch.float32, implementation)

    def state_only(**arguments: Any) -> torch.Tensor:
        state = op.function(**arguments)[1]
        assert state is not None
        return state

    with testing.using(implementation):
        found = torch.autograd.grad(state_only(**arguments).sum(), arguments["k"])[0]
    with testing.using("reference"):
        torch.testing.assert_close(found, torch.autograd.grad(state_only(**arguments).sum(), arguments["k"])[0])


@each
@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_steps_are_the_sequence(op: Recurrence, size: int, dtype: torch.dtype, implementation: str) -> None:
    arguments = testing.made(
        testing.Case("", lambda dtype: op.make(dtype, 3, batch=2, heads=2, size=size, state=True, final=True)), dtype, implementation
    )
    with testing.using(implementation), torch.no_grad():
        y, final = op.function(**arguments)
        state = arguments["initial_state"].detach().clone()
        place = state.data_ptr()
        outputs = [op.step(*op.tokens_of(arguments, slice(None), t), state) for t in range(3)]
    assert state.data_ptr() == place
    torch.testing.assert_close(torch.stack(outputs, 1), y)
    torch.testing.assert_close(state, final)


@each
def test_step_takes_strided_states_and_refuses_gradients(op: Recurrence) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [
        *(torch.randn(2, 1, 32, generator=generator) for _ in op.tokens),
        *(torch.randn(1, 32, generator=generator) for _ in op.heads),
    ]
    state = torch.randn(1, 2, 32, 32, generator=generator).transpose(0, 1)
    expected = state.double()
    y = getattr(op.reference, f"{op.name}_step")(*(value.double() for value in inputs), expected)
    assert relative_error(op.step(*inputs, state), y) <= 5e-6
    assert relative_error(state, expected) <= 5e-6
    message = f"{op.tokens[2]}: requires_grad=True is wrong because a step changes the state in place; use {op.name}"
    with pytest.raises(ValueError, match=message):
        op.step(*inputs[:2], inputs[2].clone().requires_grad_(), *inputs[3:], state)
    with pytest.raises(ValueError, match=r"state: shape \(1, 1, 32, 32\) does not fit"):
        op.step(*inputs, torch.zeros(1, 1, 32, 32))


@each
def test_nan_is_not_hidden(op: Recurrence) -> None:
    arguments = op.make(torch.float32, 4)
    with torch.no_grad():
        arguments["w"][0, 2, 0, 5] = float("nan")
    y, _ = op.function(**arguments)
    assert y[0].isnan().any(-1)[:, 0].tolist() == [token >= op.nan_reaches for token in range(4)]


@each
def test_second_derivative_is_refused(op: Recurrence) -> None:
    arguments = op.make(torch.float32, 2)
    y, _ = op.function(**arguments)
    with pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(y.sum(), arguments["r"], create_graph=True)


@each
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 levels")
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64 -DKERNELS_ONE_LEVEL", "-march=x86-64-v3 -DKERNELS_ONE_LEVEL"])
def test_twin_is_right_with_any_instructions(op: Recurrence, flags: str) -> None:
    """Those picked at run time, SSE alone and AVX2 alone."""
    code = f"from kernels_cuda import testing; testing.verify(testing.find('rwkv_distill/{op.name}'), 'cpu')"
    environment = {**os.environ, "KERNELS_CUDA_CXXFLAGS": flags}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def seconds(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


@each
@pytest.mark.bench
def test_targets_of_time(op: Recurrence) -> None:
    """One thread, paired, best of five, against the reference; a step is 3 times as fast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = bench.shapes(f"rwkv_distill/{op.name}")[0]
    arguments = shape.make()
    # what the graph begins with: a view of it would not be in the graph
    leaves = [arguments[name] for name in (*op.tokens, *op.heads)]
    token = [*(torch.randn(8, 14, 64) for _ in op.tokens), *(torch.randn(14, 64) for _ in op.heads)]
    state = torch.zeros(8, 14, 64, 64)
    pairs = [
        (lambda f: f(**arguments), shape.function, shape.baseline, op.times[0]),
        (lambda f: torch.autograd.grad(f(**arguments).sum(), leaves), shape.function, shape.baseline, op.times[1]),
        (lambda f: f(*token, state), op.step, getattr(op.reference, f"{op.name}_step"), 3),
    ]
    try:
        for run, ours, theirs, factor in pairs:
            runs = [(seconds(lambda: run(ours)), seconds(lambda: run(theirs))) for _ in range(5)]  # noqa: B023
            best, baseline = (min(times) for times in zip(*runs, strict=True))
            print(f"{op.name}: {baseline / best:.1f} times as fast, target {factor}")
            assert baseline >= factor * best, f"{baseline / best:.1f} times as fast, not {factor}"
    finally:
        torch.set_num_threads(threads)

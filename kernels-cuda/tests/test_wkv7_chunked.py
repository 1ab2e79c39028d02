"""wkv7 by chunks of 16 tokens: the algebra in float64 against the recurrence, then the kernels. T time, N head size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_cuda import choice, testing
from kernels_cuda.rwkv_distill import wkv7
from kernels_cuda.rwkv_distill.wkv7 import binding, reference
from kernels_cuda.rwkv_distill.wkv7.cases import CASES, make

CHUNK = 16
INPUTS = "rwkvab"
IMPLEMENTATIONS = ["emulated-chunked", *(["cuda-chunked"] if torch.cuda.is_available() else [])]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
Round = Callable[[Tensor], Tensor]


def arguments_of(implementation: str, time: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> testing.Arguments:
    return testing.made(testing.Case("", partial(make, time=time, **options)), dtype, implementation)


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-30))


# The algebra, with the names of NOTES.md; `near` rounds what the kernels hand to tensor cores.
def scaled(r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor, near: Round) -> dict[str, Tensor]:
    log = -math.exp(-0.5) * torch.sigmoid(w)
    until = log.cumsum(0)
    middle = until[CHUNK // 2 - 1]
    up, before = torch.exp(until - middle), torch.exp(until - log - middle)
    found = {"up": up, "before": before, "slope": log * torch.sigmoid(-w), "enter": middle.exp(), "leave": torch.exp(until[-1] - middle)}
    found |= {"r": near(r * up), "k": near(k / up), "b": near(b / up), "a": near(a * before)}
    ak, rk, rb = (found[left] @ found[right].T for left, right in ("ak", "rk", "rb"))
    inverse = torch.linalg.inv(torch.eye(CHUNK, dtype=w.dtype) - (found["a"] @ found["b"].T).tril(-1))
    return found | {"ak": near(ak.tril(-1)), "rk": near(rk.tril()), "rb": near(rb.tril()), "inverse": near(inverse)}


def chunk_forward(state: Tensor, c: dict[str, Tensor], v: Tensor, near: Round) -> tuple[Tensor, Tensor]:
    start = state * c["enter"]
    removed = near(c["inverse"] @ near(c["ak"] @ v + c["a"] @ near(start).T))
    y = c["r"] @ near(start).T + c["rk"] @ v + c["rb"] @ removed
    return y, (start + v.T @ c["k"] + removed.T @ c["b"]) * c["leave"]


def chunk_backward(
    dend: Tensor, state: Tensor, c: dict[str, Tensor], v: Tensor, dy: Tensor, near: Round
) -> tuple[Tensor, dict[str, Tensor]]:
    start, after = near(state * c["enter"]), dend * c["leave"]
    end = near(after)
    removed = near(c["inverse"] @ near(c["ak"] @ v + c["a"] @ start.T))
    dremoved = near(c["b"] @ end.T + c["rb"].T @ dy)
    dmoved = near(c["inverse"].T @ dremoved)
    dv = c["k"] @ end.T + c["rk"].T @ dy + c["ak"].T @ dmoved
    drk, drb = near((dy @ v.T).tril()), near((dy @ removed.T).tril())
    dak, dab = near((dmoved @ v.T).tril(-1)), near((dmoved @ removed.T).tril(-1))
    dr, da = dy @ start + drk @ c["k"] + drb @ c["b"], dmoved @ start + dak @ c["k"] + dab @ c["b"]
    k_end, b_end = v @ end, removed @ end
    dk, db = k_end + drk.T @ c["r"] + dak.T @ c["a"], b_end + drb.T @ c["r"] + dab.T @ c["a"]
    terms = c["r"] * dr - c["k"] * dk - c["b"] * db
    terms[:-1] += (c["a"] * da)[1:]
    base = (start * end).sum(0) + (c["k"] * k_end + c["b"] * b_end).sum(0)
    dlog = base + terms.flip(0).cumsum(0).flip(0)
    gradients = {"r": dr * c["up"], "w": dlog * c["slope"], "k": dk / c["up"], "v": dv, "a": da * c["before"], "b": db / c["up"]}
    return (after + dy.T @ c["r"] + dmoved.T @ c["a"]) * c["enter"], gradients


def oracle(given: dict[str, Tensor], state: Tensor, dy: Tensor, dfinal: Tensor, near: Round) -> dict[str, Tensor]:
    """Outputs and gradients of one head whose inputs are [T, N], named as by `testing.results`."""
    chunks = [slice(start, start + CHUNK) for start in range(0, len(dy), CHUNK)]
    scales = [scaled(*(given[name][at] for name in "rwkab"), near) for at in chunks]
    states, outputs = [state], []
    for c, at in zip(scales, chunks, strict=True):
        y, state = chunk_forward(states[-1], c, given["v"][at], near)
        states.append(state)
        outputs.append(y)
    dstate, gradients = dfinal, []
    for number, at in reversed(list(enumerate(chunks))):
        dstate, of_chunk = chunk_backward(dstate, states[number], scales[number], given["v"][at], dy[at], near)
        gradients.insert(0, of_chunk)
    found = {f"gradient of {name}": torch.cat([each[name] for each in gradients]) for name in INPUTS}
    return {"output 0": torch.cat(outputs), "output 1": states[-1], **found, "gradient of initial_state": dstate}


def oracle_of(arguments: testing.Arguments, near: Round) -> dict[str, Tensor]:
    """The oracle on what `testing.results` differentiates: factors of the outputs are those of its generator."""
    generator = torch.Generator().manual_seed(1)
    wide = testing.moved(arguments, dtype=torch.float64)
    dy, dfinal = (
        (torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) + 0.5).double()
        for shape, dtype in ((wide["r"].shape, arguments["r"].dtype), (wide["initial_state"].shape, torch.float64))
    )
    given = {name: wide[name].detach()[0, :, 0] for name in INPUTS}
    return oracle(given, wide["initial_state"].detach()[0, 0], dy[0, :, 0], dfinal[0, 0], near)


def of_one_head(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[0, 0] if "state" in name or name == "output 1" else value[0, :, 0] for name, value in results.items()}


@pytest.mark.parametrize("logit", [None, 8.0, -8.0])
def test_algebra_of_chunks_is_the_recurrence(logit: float | None) -> None:
    arguments = make(torch.float64, 64, logit=logit, state=True, final=True)
    found = oracle_of(arguments, lambda value: value)
    for name, truth in of_one_head(testing.results(reference.wkv7, arguments)).items():
        # with the fastest decay the gradient of w is small beside terms that cancel
        assert relative_error(found[name], truth) < (1e-11 if name == "gradient of w" else 1e-13), name


@each_implementation
def test_kernels_round_where_the_algebra_says(implementation: str) -> None:
    """Nearer to the oracle that rounds factors to bfloat16 than a rounding; without rounding it is several times as far."""
    arguments = arguments_of(implementation, 80, size=64, state=True, final=True)
    with testing.using(implementation):
        found = of_one_head(testing.moved(testing.results(wkv7, arguments), device="cpu"))
    rounding = oracle_of(testing.moved(arguments, device="cpu"), lambda value: value.bfloat16().double())
    for name in ("output 1", "gradient of initial_state"):  # results that are not rounded themselves
        assert relative_error(found[name], rounding[name]) < 3e-4, name


@each_implementation
@pytest.mark.parametrize("logit", [None, 8.0, -8.0])
@pytest.mark.parametrize(("size", "time"), [(32, 1), (32, 15), (32, 16), (32, 17), (32, 300), (64, 63), (64, 64), (64, 65), (128, 97)])
def test_error_is_within_the_bounds_that_methods_rely_on(size: int, time: int, logit: float | None, implementation: str) -> None:
    """Relative root mean square against float64, on the rounded inputs. The final state is held to the bound of y."""
    arguments = arguments_of(implementation, time, size=size, logit=logit, state=True, final=True)
    with testing.using(implementation):
        ours = testing.results(wkv7, arguments)
    for name, truth in testing.results(reference.wkv7, testing.moved(arguments, dtype=torch.float64)).items():
        assert relative_error(ours[name], truth) <= (1.5e-2 if name.startswith("gradient") else 6e-3), name


@each_implementation
@each_case
def test_passes_what_every_op_does(case: testing.Case, implementation: str) -> None:
    op = testing.find(binding.OP)
    testing.check_accuracy(op, case, torch.bfloat16, implementation)
    testing.check_same_bits(op, case, torch.bfloat16, implementation)


@pytest.mark.parametrize("order", ["reverse", "1"])
@each_case
def test_does_not_depend_on_the_order_of_threads(case: testing.Case, order: str) -> None:
    with testing.using("emulated-chunked"):
        expected = testing.results(wkv7, case.make(torch.bfloat16))
        with testing.thread_order(order):
            found = testing.results(wkv7, case.make(torch.bfloat16))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@each_implementation
def test_two_parts_joined_by_the_state_are_the_whole(implementation: str) -> None:
    """The same bits where a part ends with a chunk."""
    arguments = arguments_of(implementation, 150, batch=2, state=True, final=True)

    def parts(**arguments: Any) -> tuple[Tensor, Tensor]:
        outputs, state = [], arguments["initial_state"]
        for tokens in (slice(0, 96), slice(96, None)):
            inputs = {name: arguments[name][:, tokens] for name in INPUTS}
            y, state = wkv7(**inputs, initial_state=state, output_final_state=True)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    with testing.using(implementation):
        whole, joined = testing.results(wkv7, arguments), testing.results(parts, arguments)
    for name in whole:
        assert torch.equal(joined[name], whole[name]), name


@each_implementation
def test_packed_sequences_do_not_see_each_other(implementation: str) -> None:
    starts = (0, 3, 3, 70, 140, 141)
    arguments = arguments_of(implementation, 141, starts=starts, state=True, final=True)

    def separate(**arguments: Any) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for index, (start, end) in enumerate(pairwise(starts)):
            initial = arguments["initial_state"][index : index + 1]
            if start == end:
                states.append(initial)
                continue
            inputs = {name: arguments[name][:, start:end] for name in INPUTS}
            y, state = wkv7(**inputs, initial_state=initial, output_final_state=True)
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    with testing.using(implementation):
        packed, apart = testing.results(wkv7, arguments), testing.results(separate, arguments)
    for name in packed:
        assert torch.equal(packed[name], apart[name]), name


@each_implementation
def test_padding_may_hold_anything_and_changes_nothing(implementation: str) -> None:
    arguments = arguments_of(implementation, 40, state=True, final=True)
    real = torch.arange(40, device=arguments["r"].device) % 3 != 0
    found = []
    for filler in (0.0, float("nan")):
        padded = {**arguments, "mask": real[None]}
        for name in INPUTS:
            padded[name] = arguments[name].detach().masked_fill(~real[None, :, None, None], filler).requires_grad_()
        with testing.using(implementation):
            found.append(testing.results(wkv7, padded))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
        if value.shape[1] == 40:
            assert not value[:, ~real].any(), name


@each_implementation
def test_inputs_may_lie_anywhere(implementation: str) -> None:
    """Vectors are read 16 bytes at a time; views of larger tensors start where they like."""
    arguments = arguments_of(implementation, 20, final=True)
    shifted = dict(arguments)
    for name in INPUTS:
        value = arguments[name].detach()
        place = value.new_empty(value.numel() + 1)[1:].view(value.shape).copy_(value)
        assert place.is_contiguous()
        shifted[name] = place.requires_grad_()
    with testing.using(implementation):
        expected, found = testing.results(wkv7, arguments), testing.results(wkv7, shifted)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_chunks_are_taken_only_where_asked_for_and_possible() -> None:
    """Float32 keeps the recurrence, which is held to tighter bounds; so does every other choice of kernels."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make(dtype, 33, final=True)
        found = []
        for name in ("emulated", "emulated-chunked"):
            with testing.using(name):
                found.append(wkv7(**arguments)[1])
        assert torch.equal(*found) == (dtype == torch.float32)
    with testing.using("cpu"):
        assert not choice.chunked(torch.device("cpu"), 0)


def test_traces_as_one_graph() -> None:
    arguments = make(torch.bfloat16, 20, state=True, final=True)
    with testing.using("emulated-chunked"):
        expected = testing.results(wkv7, arguments)
        found = testing.results(torch.compile(wkv7, fullgraph=True, backend="aot_eager"), arguments)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.gpu
def test_a_gpu_without_the_shared_memory_keeps_the_recurrence() -> None:
    with testing.using("cuda-chunked"):
        assert choice.chunked(torch.device("cuda", 0), 0) == (torch.cuda.get_device_capability()[0] >= 8)
        assert not choice.chunked(torch.device("cuda", 0), 1 << 30)

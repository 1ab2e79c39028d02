"""Recurrences by chunks of 16 tokens: the algebra in float64 against the recurrence, then the kernels.

T time, H heads, N head size, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_cuda import choice, testing
from kernels_cuda.rwkv_distill import wkv6, wkv7
from kernels_cuda.rwkv_distill.wkv6 import cases as cases6
from kernels_cuda.rwkv_distill.wkv6 import reference as reference6
from kernels_cuda.rwkv_distill.wkv7 import cases as cases7
from kernels_cuda.rwkv_distill.wkv7 import reference as reference7

CHUNK = 16
Values = dict[str, Tensor]
Round = Callable[[Tensor], Tensor]


# The algebra of wkv7, with the names of its NOTES.md; `near` rounds what the kernels hand to tensor cores.
def scaled7(given: Values, near: Round) -> Values:
    r, w, k, a, b = (given[name] for name in "rwkab")
    log = -math.exp(-0.5) * torch.sigmoid(w)
    until = log.cumsum(0)
    middle = until[CHUNK // 2 - 1]
    up, before = torch.exp(until - middle), torch.exp(until - log - middle)
    found = {"up": up, "before": before, "slope": log * torch.sigmoid(-w), "enter": middle.exp(), "leave": torch.exp(until[-1] - middle)}
    found |= {"r": near(r * up), "k": near(k / up), "b": near(b / up), "a": near(a * before)}
    ak, rk, rb = (found[left] @ found[right].T for left, right in ("ak", "rk", "rb"))
    inverse = torch.linalg.inv(torch.eye(CHUNK, dtype=w.dtype) - (found["a"] @ found["b"].T).tril(-1))
    return found | {"v": given["v"], "ak": near(ak.tril(-1)), "rk": near(rk.tril()), "rb": near(rb.tril()), "inverse": near(inverse)}


def forward7(state: Tensor, c: Values, near: Round) -> tuple[Tensor, Tensor]:
    start, v = state * c["enter"], c["v"]
    removed = near(c["inverse"] @ near(c["ak"] @ v + c["a"] @ near(start).T))
    y = c["r"] @ near(start).T + c["rk"] @ v + c["rb"] @ removed
    return y, (start + v.T @ c["k"] + removed.T @ c["b"]) * c["leave"]


def backward7(dend: Tensor, state: Tensor, c: Values, dy: Tensor, near: Round) -> tuple[Tensor, Values]:
    start, after, v = near(state * c["enter"]), dend * c["leave"], c["v"]
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


# The algebra of wkv6, likewise.
def scaled6(given: Values, near: Round) -> Values:
    r, k, v, w, u = (given[name] for name in "rkvwu")
    log = -torch.exp(w)
    until = log.cumsum(0)
    before = until - log
    earlier = torch.ones(CHUNK, CHUNK).tril(-1).bool()[:, :, None]
    # of a reader i and a writer j before it: the decays of the tokens between
    between_CCN = torch.exp(torch.where(earlier, before[:, None] - until[None, :], -math.inf))
    reach_CCN = between_CCN + torch.eye(CHUNK)[:, :, None] * u
    found = {"plain_r": r, "plain_k": k, "v": v, "u": u, "log": log, "between": between_CCN, "leave": until[-1].exp()}
    found |= {
        "before": before.exp(),
        "behind": torch.exp(until[-1] - until),
        "scores": near(torch.einsum("in,jn,ijn->ij", r, k, reach_CCN)),
    }
    return found | {"r": near(r * found["before"]), "k": near(k * found["behind"])}


def forward6(state: Tensor, c: Values, near: Round) -> tuple[Tensor, Tensor]:
    return c["r"] @ near(state).T + c["scores"] @ c["v"], state * c["leave"] + c["v"].T @ c["k"]


def backward6(dend: Tensor, state: Tensor, c: Values, dy: Tensor, near: Round) -> tuple[Tensor, Values]:
    start, end, dscores = near(state), near(dend), dy @ c["v"].T
    bonus = dscores.diagonal()[:, None]
    pairs_CCN = torch.einsum("ij,in,jn,ijn->ijn", dscores, c["plain_r"], c["plain_k"], c["between"])
    dr, dk = c["before"] * (dy @ start), c["behind"] * (c["v"] @ end)
    # the decay of token t is part of every product of a writer before it, or of the state, and a reader behind it, or the next state
    of_dr, of_dk, of_states = c["plain_r"] * dr, c["plain_k"] * dk, c["leave"] * (start * end).sum(0)
    dlog = [of_states + of_dr[t + 1 :].sum(0) + of_dk[:t].sum(0) + pairs_CCN[t + 1 :, :t].sum((0, 1)) for t in range(CHUNK)]
    gradients = {
        "r": dr + torch.einsum("ij,jn,ijn->in", dscores, c["plain_k"], c["between"]) + c["u"] * c["plain_k"] * bonus,
        "k": dk + torch.einsum("ij,in,ijn->jn", dscores, c["plain_r"], c["between"]) + c["u"] * c["plain_r"] * bonus,
        "v": c["k"] @ end.T + c["scores"].T @ dy,
        "w": torch.stack(dlog) * c["log"],
        "u": c["plain_r"] * c["plain_k"] * bonus,
    }
    return dend * c["leave"] + dy.T @ c["r"], gradients


@dataclass(frozen=True)
class Chunked:
    """One op and what its tests need to know."""

    function: Callable[..., Any]
    reference: ModuleType
    make: Callable[..., testing.Arguments]
    cases: Sequence[testing.Case]
    tokens: str  # inputs of every token
    heads: str  # inputs of every head
    logits: tuple[float | None, ...]  # of decays, at which accuracy is bounded
    scaled: Callable[[Values, Round], Values]
    forward: Callable[[Tensor, Values, Round], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Values, Tensor, Round], tuple[Tensor, Values]]

    @property
    def name(self) -> str:
        """That of the function."""
        return self.function.__name__

    @property
    def plain(self) -> Callable[..., Any]:
        """The reference."""
        found: Callable[..., Any] = getattr(self.reference, self.name)
        return found

    def arguments(self, implementation: str, time: int, **options: Any) -> testing.Arguments:
        """In bfloat16, where the implementation wants them."""
        return testing.made(testing.Case("", partial(self.make, time=time, **options)), torch.bfloat16, implementation)

    def inputs(self, arguments: testing.Arguments, tokens: slice) -> testing.Arguments:
        """Those of some tokens."""
        return {name: arguments[name][:, tokens] if name in self.tokens else arguments[name] for name in self.tokens + self.heads}

    def check_equal(self, one: Values, other: Values) -> None:
        """The same bits, but for the gradient of what all parts of a sequence share: a sum over them, which may be rounded in between."""
        for name in one:
            if name.removeprefix("gradient of ") in self.heads:
                assert relative_error(other[name], one[name].double()) < 1e-2, name
            else:
                assert torch.equal(other[name], one[name]), name


OPS = [
    Chunked(wkv6, reference6, cases6.make, cases6.CASES, "rkvw", "u", (None, 1.6, 3.0, 8.0, -8.0), scaled6, forward6, backward6),
    Chunked(wkv7, reference7, cases7.make, cases7.CASES, "rwkvab", "", (None, 8.0, -8.0), scaled7, forward7, backward7),
]
IMPLEMENTATIONS = ["emulated-chunked", *(["cuda-chunked"] if torch.cuda.is_available() else [])]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_op = pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
each_logit = pytest.mark.parametrize(
    ("op", "logit"), [pytest.param(op, logit, id=f"{op.name}-{logit}") for op in OPS for logit in op.logits]
)
each_case = pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases]
)


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def oracle(op: Chunked, given: Values, state: Tensor, dy: Tensor, dfinal: Tensor, near: Round) -> Values:
    """Outputs and gradients of one head whose inputs are [T, N] or [N], named as by `testing.results`."""
    chunks = [slice(start, start + CHUNK) for start in range(0, len(dy), CHUNK)]
    scales = [op.scaled({name: value[at] if name in op.tokens else value for name, value in given.items()}, near) for at in chunks]
    states, outputs = [state], []
    for c in scales:
        y, state = op.forward(states[-1], c, near)
        states.append(state)
        outputs.append(y)
    dstate, gradients = dfinal, []
    for number, at in reversed(list(enumerate(chunks))):
        dstate, of_chunk = op.backward(dstate, states[number], scales[number], dy[at], near)
        gradients.insert(0, of_chunk)
    joined = {name: torch.cat([each[name] for each in gradients]) for name in op.tokens + op.heads}
    found = {f"gradient of {name}": value if name in op.tokens else value.sum(0) for name, value in joined.items()}
    return {"output 0": torch.cat(outputs), "output 1": states[-1], **found, "gradient of initial_state": dstate}


def oracle_of(op: Chunked, arguments: testing.Arguments, near: Round) -> Values:
    """The oracle on what `testing.results` differentiates: factors of the outputs are those of its generator."""
    generator = torch.Generator().manual_seed(1)
    wide = testing.moved(arguments, dtype=torch.float64)
    dy, dfinal = (
        (torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) + 0.5).double()
        for shape, dtype in ((wide["r"].shape, arguments["r"].dtype), (wide["initial_state"].shape, torch.float64))
    )
    given = of_one_head({name: wide[name].detach() for name in op.tokens + op.heads})
    return oracle(op, given, wide["initial_state"].detach()[0, 0], dy[0, :, 0], dfinal[0, 0], near)


def of_one_head(values: Values) -> Values:
    """[T, N] of [1, T, 1, N], [N, N] of states [1, 1, N, N], [N] of [1, N]."""
    return {
        name: value[0] if value.ndim == 2 else value[0, 0] if "state" in name or name == "output 1" else value[0, :, 0]
        for name, value in values.items()
    }


@each_logit
def test_algebra_of_chunks_is_the_recurrence(op: Chunked, logit: float | None) -> None:
    arguments = op.make(torch.float64, 64, logit=logit, state=True, final=True)
    found = oracle_of(op, arguments, lambda value: value)
    for name, truth in of_one_head(testing.results(op.plain, arguments)).items():
        # with the fastest decay the gradient of wkv7's w is small beside terms that cancel, and wkv6's log decays sum up to 5e4
        assert relative_error(found[name], truth) < (1e-11 if name == "gradient of w" else 1e-12), name


@each_op
@each_implementation
def test_kernels_round_where_the_algebra_says(op: Chunked, implementation: str) -> None:
    """Nearer to the oracle that rounds factors to bfloat16 than a rounding; without rounding it is several times as far."""
    arguments = op.arguments(implementation, 80, size=64, state=True, final=True)
    with testing.using(implementation):
        found = of_one_head(testing.moved(testing.results(op.function, arguments), device="cpu"))
    rounding = oracle_of(op, testing.moved(arguments, device="cpu"), lambda value: value.bfloat16().double())
    for name in ("output 1", "gradient of initial_state"):  # results that are not rounded themselves
        assert relative_error(found[name], rounding[name]) < 3e-4, name


@each_implementation
@each_logit
@pytest.mark.parametrize(("size", "time"), [(32, 1), (32, 15), (32, 16), (32, 17), (32, 300), (64, 63), (64, 64), (64, 65), (128, 97)])
def test_error_is_within_the_bounds_that_methods_rely_on(
    size: int, time: int, op: Chunked, logit: float | None, implementation: str
) -> None:
    """Relative root mean square against float64, on the rounded inputs. The final state is held to the bound of y."""
    arguments = op.arguments(implementation, time, size=size, logit=logit, state=True, final=True)
    with testing.using(implementation):
        ours = testing.results(op.function, arguments)
    for name, truth in testing.results(op.plain, testing.moved(arguments, dtype=torch.float64)).items():
        assert relative_error(ours[name], truth) <= (1.5e-2 if name.startswith("gradient") else 6e-3), name


@each_implementation
@each_case
def test_passes_what_every_op_does(op: Chunked, case: testing.Case, implementation: str) -> None:
    found = testing.find(f"rwkv_distill/{op.name}")
    testing.check_accuracy(found, case, torch.bfloat16, implementation)
    testing.check_same_bits(found, case, torch.bfloat16, implementation)


@pytest.mark.parametrize("order", ["reverse", "1"])
@each_case
def test_does_not_depend_on_the_order_of_threads(op: Chunked, case: testing.Case, order: str) -> None:
    with testing.using("emulated-chunked"):
        expected = testing.results(op.function, case.make(torch.bfloat16))
        with testing.thread_order(order):
            found = testing.results(op.function, case.make(torch.bfloat16))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@each_op
@each_implementation
def test_two_parts_joined_by_the_state_are_the_whole(op: Chunked, implementation: str) -> None:
    """The same bits where a part ends with a chunk."""
    arguments = op.arguments(implementation, 150, batch=2, state=True, final=True)

    def parts(**arguments: Any) -> tuple[Tensor, Tensor]:
        outputs, state = [], arguments["initial_state"]
        for tokens in (slice(0, 96), slice(96, None)):
            y, state = op.function(**op.inputs(arguments, tokens), initial_state=state, output_final_state=True)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    with testing.using(implementation):
        op.check_equal(testing.results(op.function, arguments), testing.results(parts, arguments))


@each_op
@each_implementation
def test_packed_sequences_do_not_see_each_other(op: Chunked, implementation: str) -> None:
    starts = (0, 3, 3, 70, 140, 141)
    arguments = op.arguments(implementation, 141, starts=starts, state=True, final=True)

    def separate(**arguments: Any) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for index, (start, end) in enumerate(pairwise(starts)):
            initial = arguments["initial_state"][index : index + 1]
            if start == end:
                states.append(initial)
                continue
            y, state = op.function(**op.inputs(arguments, slice(start, end)), initial_state=initial, output_final_state=True)
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    with testing.using(implementation):
        op.check_equal(testing.results(op.function, arguments), testing.results(separate, arguments))


@each_op
@each_implementation
def test_padding_may_hold_anything_and_changes_nothing(op: Chunked, implementation: str) -> None:
    arguments = op.arguments(implementation, 40, state=True, final=True)
    real = torch.arange(40, device=arguments["r"].device) % 3 != 0
    found = []
    for filler in (0.0, float("nan")):
        padded = {**arguments, "mask": real[None]}
        for name in op.tokens:
            padded[name] = arguments[name].detach().masked_fill(~real[None, :, None, None], filler).requires_grad_()
        with testing.using(implementation):
            found.append(testing.results(op.function, padded))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
        if value.ndim == 4 and value.shape[1] == 40:
            assert not value[:, ~real].any(), name


@each_op
@each_implementation
def test_inputs_may_lie_anywhere(op: Chunked, implementation: str) -> None:
    """Vectors are read 16 bytes at a time; views of larger tensors start where they like."""
    arguments = op.arguments(implementation, 20, final=True)
    shifted = dict(arguments)
    for name in op.tokens + op.heads:
        value = arguments[name].detach()
        place = value.new_empty(value.numel() + 1)[1:].view(value.shape).copy_(value)
        assert place.is_contiguous()
        shifted[name] = place.requires_grad_()
    with testing.using(implementation):
        expected, found = testing.results(op.function, arguments), testing.results(op.function, shifted)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@each_op
def test_chunks_are_taken_only_where_asked_for_and_possible(op: Chunked) -> None:
    """Float32 keeps the recurrence, which is held to tighter bounds; so does every other choice of kernels."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = op.make(dtype, 33, final=True)
        found = []
        for name in ("emulated", "emulated-chunked"):
            with testing.using(name):
                found.append(op.function(**arguments)[1])
        assert torch.equal(*found) == (dtype == torch.float32)
    with testing.using("cpu"):
        assert not choice.chunked(torch.device("cpu"), 0)


@each_op
def test_traces_as_one_graph(op: Chunked) -> None:
    arguments = op.make(torch.bfloat16, 20, state=True, final=True)
    with testing.using("emulated-chunked"):
        expected = testing.results(op.function, arguments)
        found = testing.results(torch.compile(op.function, fullgraph=True, backend="aot_eager"), arguments)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.gpu
def test_a_gpu_without_the_shared_memory_keeps_the_recurrence() -> None:
    with testing.using("cuda-chunked"):
        assert choice.chunked(torch.device("cuda", 0), 0) == (torch.cuda.get_device_capability()[0] >= 8)
        assert not choice.chunked(torch.device("cuda", 0), 1 << 30)

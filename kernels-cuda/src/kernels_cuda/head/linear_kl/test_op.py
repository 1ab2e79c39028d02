"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels_cuda import bench, testing
from kernels_cuda.head import linear_kl
from kernels_cuda.head.linear_kl import reference
from kernels_cuda.head.linear_kl.bench import loss as fused_loss
from kernels_cuda.head.linear_kl.bench import make as make_large
from kernels_cuda.head.linear_kl.bench import plain
from kernels_cuda.head.linear_kl.cases import cache, make

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())
each_direction = pytest.mark.parametrize("direction", ["forward", "reverse", "adaptive"])


@pytest.fixture(autouse=True)
def cpu_twin() -> Iterator[None]:
    with testing.using("cpu"):
        yield


def logits_of(arguments: testing.Arguments) -> torch.Tensor:
    """All of the student's, in float64, for autograd."""
    return arguments["h_s"].double() @ arguments["W_s"].double().t()


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_agrees_with_torch_on_all_logits(tau: float) -> None:
    arguments = make(torch.float32, 30, 12, 50, masked=0.3, ignored=0.3, kl_w=0.7, ce_w=0.4, tau=tau)
    z_s, mask = logits_of(arguments), arguments["mask"]
    kl = F.kl_div(F.log_softmax(z_s / tau, -1), F.log_softmax(arguments["teacher"].double() / tau, -1), log_target=True, reduction="none")
    kl = tau**2 * kl.sum(-1)[mask].mean()
    ce = F.cross_entropy(z_s, arguments["labels"])
    theirs = torch.autograd.grad(0.7 * kl + 0.4 * ce, [arguments["h_s"], arguments["W_s"]])
    loss, *found = linear_kl(**arguments)
    torch.testing.assert_close([loss.double(), *(value.double() for value in found)], [0.7 * kl + 0.4 * ce, kl, ce], rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(loss, [arguments["h_s"], arguments["W_s"]])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def adaptive_oracle(p: list[float], q: list[float]) -> float:
    """The weight of the forward divergence, one value after the other."""
    mass, head, tail = 0.0, 0.0, 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass < 0.5 - 1e-7:
            head += abs(p[i] - q[i])
        else:
            tail += abs(p[i] - q[i])
        mass += p[i]
    return head / (head + tail) if head + tail > 0 else 0.5


@each_implementation
def test_adaptive_is_a_sum_of_both_with_fixed_weights(implementation: str) -> None:
    arguments = testing.moved(make(torch.float32, 9, scale=2.0), device="cuda" if implementation == "cuda" else "cpu")
    p, q = arguments["teacher"].double().softmax(-1), logits_of(arguments).softmax(-1)
    weights = [adaptive_oracle(*pair) for pair in zip(p.tolist(), q.tolist(), strict=True)]
    weight = torch.tensor(weights, device=p.device, dtype=torch.float64)
    assert weight.max() - weight.min() > 0.1
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    expected = (weight * forward + (1 - weight) * reverse).mean()
    leaves = [arguments["h_s"], arguments["W_s"]]
    theirs = torch.autograd.grad(expected, leaves)
    with testing.using(implementation):
        loss = linear_kl(**arguments, direction="adaptive")[0]
        ours = torch.autograd.grad(loss, leaves)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("equal", [2, 3, 40])
def test_of_equal_probabilities_the_first_are_in_the_head_set(implementation: str, equal: int) -> None:
    """`equal` values of 1 / equal each: the head set is the first half, rounded up."""
    device = "cuda" if implementation == "cuda" else "cpu"
    teacher = torch.full((1, 700), -torch.inf, device=device)
    teacher[0, 30 : 30 + equal] = 0.25
    z_s = torch.randn(1, 700, generator=torch.Generator().manual_seed(equal)).to(device)
    p, q = teacher.softmax(-1), z_s.softmax(-1)
    gap = (p - q).abs()[0]
    weight = gap[30 : 30 + (equal + 1) // 2].sum() / gap.sum()
    forward = linear_kl(z_s, torch.eye(700, device=device), teacher)[1]
    with testing.using(implementation):
        found = linear_kl(z_s, torch.eye(700, device=device), teacher.clamp_min(-50), direction="adaptive")[1]
    reverse = linear_kl(z_s, torch.eye(700, device=device), teacher.clamp_min(-50), direction="reverse")[1]
    assert found.item() == pytest.approx((weight * forward + (1 - weight) * reverse).item(), rel=1e-4)


@each_implementation
@each_direction
def test_a_student_like_its_teacher_loses_nothing(implementation: str, direction: Any) -> None:
    arguments = testing.moved(make(torch.float32, 5), device="cuda" if implementation == "cuda" else "cpu")
    head = arguments["h_s"].detach(), arguments["W_s"].detach()
    with testing.using(implementation):
        loss = linear_kl(*(value.requires_grad_() for value in head), tuple(value.clone() for value in head), direction=direction)[0]
        gradients = torch.autograd.grad(loss, head)
    assert abs(loss.item()) < 1e-6
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6


@each_implementation
@each_direction
def test_cache_of_all_columns_equals_a_live_teacher(implementation: str, direction: Any) -> None:
    arguments = make(torch.float32, 12, vocabulary=30, masked=0.2, ignored=0.2, ce_w=0.3, direction=direction)
    arguments = testing.moved(arguments, device="cuda" if implementation == "cuda" else "cpu")
    cached = {**arguments, "teacher": cache(arguments["teacher"].cpu(), 30, torch.float32)}
    cached = testing.moved(cached, device=str(arguments["h_s"].device))
    with testing.using(implementation):
        live, stored = testing.results(linear_kl, arguments), testing.results(linear_kl, cached)
    for name in live:
        torch.testing.assert_close(stored[name], live[name], rtol=1e-5, atol=1e-6)


@each_direction
def test_cache_is_a_divergence_between_bucket_masses(direction: Any) -> None:
    """With a matrix that adds columns up to buckets, in float64."""
    arguments = make(torch.float64, 10, vocabulary=30, teacher="cache", ids=4)
    ids, logp, rest = arguments["teacher"]
    q = logits_of(arguments).softmax(-1)
    member = torch.zeros(10, 30, 5, dtype=torch.float64)
    member[:, :, 4] = 1
    for row in range(10):
        for bucket, column in enumerate(ids[row].tolist()):
            member[row, column] = F.one_hot(torch.tensor(bucket), 5).double()
    q_B, p_B = torch.einsum("nv,nvb->nb", q, member), torch.cat([logp, rest[:, None]], 1).exp()
    forward, reverse = (p_B * (p_B / q_B).log()).sum(-1), (q_B * (q_B / p_B).log()).sum(-1)
    weight = torch.tensor([adaptive_oracle(*pair) for pair in zip(p_B.tolist(), q_B.tolist(), strict=True)], dtype=torch.float64)
    expected = {"forward": forward, "reverse": reverse, "adaptive": weight * forward + (1 - weight) * reverse}[direction].mean()
    loss = linear_kl(**arguments, direction=direction)[0]
    torch.testing.assert_close(loss, expected)
    leaves = [arguments["h_s"], arguments["W_s"]]
    for mine, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other)


def test_columns_that_only_one_side_has_are_left_out() -> None:
    arguments = make(torch.float32, 9, vocabulary=40, ignored=0.2, ce_w=0.5, teacher_vocabulary=33)
    short = {**arguments, "W_s": arguments["W_s"].detach()[:33].clone().requires_grad_()}
    ours, theirs = testing.results(linear_kl, arguments), testing.results(linear_kl, short)
    torch.testing.assert_close(ours["output 0"], theirs["output 0"])
    torch.testing.assert_close(ours["gradient of W_s"][:33], theirs["gradient of W_s"])
    assert not ours["gradient of W_s"][33:].any()


@each_implementation
def test_weights_that_are_counts_give_sums(implementation: str) -> None:
    """As a method asks that divides by the targets of a whole batch."""
    arguments = testing.moved(make(torch.float32, 9, masked=0.4, ignored=0.4), device="cuda" if implementation == "cuda" else "cpu")
    num_kl, num_ce = int(arguments["mask"].sum()), int((arguments["labels"] != -100).sum())
    with testing.using(implementation):
        loss, kl, ce = linear_kl(**arguments, kl_w=2.0 * num_kl, ce_w=0.5 * num_ce)
        each = [
            linear_kl(**{**arguments, "mask": torch.arange(9, device=kl.device) == row, "labels": None})[1] if arguments["mask"][row] else 0
            for row in range(9)
        ]
    assert loss.item() == pytest.approx((2.0 * num_kl * kl + 0.5 * num_ce * ce).item(), rel=1e-6)
    assert float(num_kl * kl) == pytest.approx(float(sum(each)), rel=1e-5)


@pytest.mark.parametrize("kind", ["logits", "head", "cache"])
def test_the_size_of_a_chunk_changes_only_roundings(kind: Any) -> None:
    arguments = make(torch.float32, 23, teacher=kind, masked=0.2, ignored=0.2, ce_w=0.3)
    whole = testing.results(linear_kl, {**arguments, "chunk": 1000})
    for chunk in (1, 7):
        parts = testing.results(linear_kl, {**arguments, "chunk": chunk})
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name])


@each_implementation
@pytest.mark.parametrize("kind", ["logits", "cache"])
def test_nan_is_not_hidden(implementation: str, kind: Any) -> None:
    arguments = make(torch.float32, 6, teacher=kind, ignored=0.0, ce_w=1.0)
    with torch.no_grad():
        arguments["h_s"][2, 3] = torch.nan
    arguments = testing.moved(arguments, device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        loss, kl, ce = linear_kl(**arguments)
        gradient = torch.autograd.grad(loss, arguments["h_s"])[0]
    assert all(value.isnan() for value in (loss, kl, ce))
    assert gradient.isnan().any(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("kind", ["logits", "head", "cache"])
def test_rows_without_mask_and_label_are_not_even_read(kind: Any) -> None:
    arguments = make(torch.float32, 6, teacher=kind)
    arguments["mask"] = torch.tensor([True, True, False, True, True, True])
    first = arguments["teacher"] if kind == "logits" else arguments["teacher"][1 if kind == "cache" else 0]
    with torch.no_grad():
        first[2] = torch.nan
        arguments["h_s"][2] = torch.nan
    found = testing.results(linear_kl, arguments)
    assert all(value.isfinite().all() for value in found.values())
    assert not found["gradient of h_s"][2].any()


@each_implementation
def test_a_masked_row_with_a_label_ignores_the_teacher(implementation: str) -> None:
    arguments = make(torch.float32, 5, ignored=0.0, ce_w=1.0)
    arguments["teacher"][:] = torch.nan
    arguments["mask"] = torch.zeros(5, dtype=torch.bool)
    arguments = testing.moved(arguments, device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        loss = linear_kl(**arguments)[0]
        ours = torch.autograd.grad(loss, arguments["h_s"])[0]
    theirs = torch.autograd.grad(F.cross_entropy(F.linear(arguments["h_s"], arguments["W_s"]), arguments["labels"]), arguments["h_s"])[0]
    torch.testing.assert_close(ours, theirs)


def test_what_the_teacher_finds_impossible_makes_only_the_reverse_infinite() -> None:
    arguments = make(torch.float32, 4)
    arguments["teacher"][:, 3] = -torch.inf
    assert linear_kl(**arguments)[0].isfinite()
    assert linear_kl(**arguments, direction="reverse")[0].item() == torch.inf


def test_emulated_cuda_gives_nan_for_a_label_outside() -> None:
    """On a GPU nobody can look at the labels in time to raise."""
    kernels = torch.ops.head_emulated
    with testing.using("emulated"):
        linear_kl(torch.ones(1, 1), torch.ones(2, 1), torch.ones(1, 2))  # loads the library
    logits, (kl, ce) = torch.ones(4, 7), torch.zeros(2, 4)
    labels = torch.tensor([0, 7, -1, -100])
    kernels.kl_gradient_(logits, torch.zeros(4, 7), None, labels, torch.ones(2), kl, ce, 1.0, 0, True)
    assert ce.isnan().tolist() == [False, True, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, True, False]


def test_no_gradient_flows_to_the_teacher_or_to_what_is_frozen() -> None:
    arguments = make(torch.float32, 5, teacher="head")
    head = tuple(value.requires_grad_() for value in arguments["teacher"])
    arguments["W_s"] = arguments["W_s"].detach()
    loss = linear_kl(**{**arguments, "teacher": head})[0]
    found = torch.autograd.grad(loss, [arguments["h_s"], *head], allow_unused=True)
    assert [gradient is None for gradient in found] == [False, True, True]


@pytest.mark.parametrize(("needs", "products"), [((), 1), (("h_s",), 2), (("W_s",), 2), (("h_s", "W_s"), 3)])
@pytest.mark.parametrize("kind", ["logits", "head", "cache"])
def test_flops_are_known_to_torchs_counter(needs: tuple[str, ...], products: int, kind: Any) -> None:
    arguments = make(torch.float32, 8, 4, 9, teacher=kind)
    for name in ("h_s", "W_s"):
        arguments[name] = arguments[name].detach().requires_grad_(name in needs)
    with FlopCounterMode(display=False) as counter:
        linear_kl(**arguments)
    assert counter.get_total_flops() == products * 2 * 8 * 4 * 9 + (2 * 8 * 6 * 9 if kind == "head" else 0)


def test_under_autocast_products_are_bfloat16_and_gradients_return_to_the_weights_dtype() -> None:
    arguments = make(torch.float32, 12, 16, 30, teacher="head", ignored=0.2, ce_w=0.5)
    low = {name: value.detach().bfloat16() if name in ("h_s", "W_s") else value for name, value in arguments.items()}
    low["teacher"] = tuple(value.bfloat16() for value in low["teacher"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_kl(**arguments)[0]
    assert torch.equal(loss, linear_kl(**low)[0])
    assert torch.autograd.grad(loss, arguments["W_s"])[0].dtype == torch.float32


def test_backward_runs_twice_and_refuses_a_second_derivative() -> None:
    arguments = make(torch.float32, 5, 4, 9)
    loss, hidden = linear_kl(**arguments)[0], arguments["h_s"]
    first, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_what_was_rounded_for_storing_sums_to_one_again() -> None:
    _, logp, rest = cache(torch.randn(50, 300, generator=torch.Generator().manual_seed(0)), 20, torch.float16)
    assert (logp.float().exp().sum(-1) + rest.float().exp() - 1).abs().max() > 1e-4
    total = reference.with_rest(logp.float(), rest.float(), 300).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(50))


def peak_of(function: Any, rows: int) -> int:
    arguments = make_large(torch.float32, rows, 64, 16384)
    leaves = [arguments["h_s"], arguments["W_s"]]
    return bench.measure(lambda: torch.autograd.grad(function(**arguments), leaves)).peak_bytes


def test_peak_memory_is_a_small_part_of_that_of_all_logits() -> None:
    peak_of(fused_loss, 256)  # starts threads and fills caches
    assert peak_of(fused_loss, 1024) <= 0.15 * peak_of(plain, 1024)


@pytest.mark.bench
@pytest.mark.parametrize(("rows", "memory"), [(1024, 0.30), (4096, 0.15)])
def test_target_of_time_and_memory(rows: int, memory: float) -> None:
    shape = next(shape for shape in bench.shapes("head/linear_kl") if f"M={rows} D=128" in shape.name)
    ours, theirs = bench.paired(shape, repeats=3)
    assert ours.cpu_seconds <= 0.6 * theirs.cpu_seconds
    assert ours.peak_bytes <= memory * theirs.peak_bytes

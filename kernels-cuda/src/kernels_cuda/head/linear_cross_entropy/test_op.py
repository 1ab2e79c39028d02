"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels_cuda import bench, testing
from kernels_cuda.head import chunks, linear_cross_entropy
from kernels_cuda.head.linear_cross_entropy.cases import make

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@pytest.fixture(autouse=True)
def cpu_twin() -> Iterator[None]:
    with testing.using("cpu"):
        yield


def test_agrees_with_torch() -> None:
    arguments = make(torch.float32, 50, 12, 40)
    hidden, weight, labels = (arguments[name] for name in ("hidden_ND", "weight_VD", "labels_N"))
    theirs = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), theirs)


def test_loss_of_equal_logits_is_the_logarithm_of_the_vocabulary() -> None:
    loss = linear_cross_entropy(torch.zeros(3, 4), torch.ones(1000, 4), torch.tensor([0, 999, -100]))
    assert loss.item() == pytest.approx(2 * torch.tensor(1000.0).log().item())


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_not_hidden(implementation: str, dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf")):
        arguments = testing.moved(make(dtype, 6, 8, 20, ignored=0), device="cuda" if implementation == "cuda" else "cpu")
        with torch.no_grad():
            arguments["hidden_ND"][2, 3] = bad
        with testing.using(implementation):
            losses = linear_cross_entropy(**{**arguments, "reduction": "none"})
            gradient = torch.autograd.grad(linear_cross_entropy(**arguments), arguments["hidden_ND"])[0]
        assert losses.isnan().tolist() == [False, False, True, False, False, False]
        assert gradient.isnan().any(1).tolist() == [False, False, True, False, False, False]


@each_implementation
def test_logits_of_minus_infinity_have_probability_zero(implementation: str) -> None:
    hidden = torch.ones(1, 1, requires_grad=True, device="cuda" if implementation == "cuda" else "cpu")
    weight = torch.full((600, 1), -torch.inf, device=hidden.device)
    weight[100:103] = 2.0
    with testing.using(implementation):
        loss = linear_cross_entropy(hidden, weight, torch.tensor([101], device=hidden.device))
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())


def test_emulated_cuda_gives_nan_for_a_label_outside() -> None:
    """On a GPU nobody can look at the labels in time to raise."""
    kernels = torch.ops.head_emulated
    with testing.using("emulated"):
        linear_cross_entropy(torch.ones(1, 1), torch.ones(2, 1), torch.tensor([0]))  # loads the library
    losses, logits = torch.zeros(4), torch.ones(4, 7)
    kernels.softmax_gradient_(logits, torch.tensor([0, 7, -1, -100]), None, losses, -100, True)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, True, False]


def test_under_autocast_products_are_bfloat16_and_gradients_return_to_the_weights_dtype() -> None:
    arguments = make(torch.float32, 20, 16, 30)
    low = {name: value.detach().bfloat16() if name in ("hidden_ND", "weight_VD") else value for name, value in arguments.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(**arguments)
        per_row = linear_cross_entropy(**{**arguments, "reduction": "none"})
    assert loss.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(**low))
    for total in (loss, per_row.sum()):
        assert torch.autograd.grad(total, arguments["weight_VD"])[0].dtype == torch.float32


def test_float16_is_computed_in_float32() -> None:
    arguments = make(torch.float32, 20, 16, 30)
    expected = linear_cross_entropy(**arguments)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(linear_cross_entropy(**arguments), expected)
    low = {name: value.detach().half() if name in ("hidden_ND", "weight_VD") else value for name, value in arguments.items()}
    loss = linear_cross_entropy(**low)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_bfloat16_gradient_is_scaled_in_float32() -> None:
    """A loss is divided by its targets; that factor must not be rounded to eight bits."""
    arguments = make(torch.bfloat16, 20, 16, 30)
    loss, weight = linear_cross_entropy(**arguments), arguments["weight_VD"]
    whole, scaled = (torch.autograd.grad(loss * factor, weight, retain_graph=True)[0].float() for factor in (1.0, 1 / 1003))
    assert (scaled.norm() / whole.norm() * 1003).item() == pytest.approx(1, abs=3e-4)


def test_weight_gradient_of_bfloat16_keeps_float32_sums() -> None:
    """2000 equal contributions of 1/4: a bfloat16 sum would stop growing at 64."""
    gradient = torch.autograd.grad(
        linear_cross_entropy(
            torch.full((2000, 2), 0.5, dtype=torch.bfloat16),
            weight := torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True),
            torch.zeros(2000, dtype=torch.int64),
        ),
        weight,
    )[0]
    assert gradient.tolist() == [[-500, -500], [500, 500]]


@each_implementation
def test_slices_of_the_vocabulary_change_nothing(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = testing.moved(make(torch.bfloat16, 300, 24, 1000), device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        whole = testing.results(linear_cross_entropy, arguments)["gradient of weight_VD"]
        monkeypatch.setattr(chunks, "SLICE_BYTES", {"cpu": 2 * 24 * 300, "cuda": 2 * 24 * 300})
        sliced = testing.results(linear_cross_entropy, arguments)["gradient of weight_VD"]
    torch.testing.assert_close(sliced, whole, rtol=0, atol=2**-8 * whole.abs().max().item())


def test_backward_runs_twice_and_refuses_a_second_derivative() -> None:
    arguments = make(torch.float32, 5, 4, 9)
    loss, hidden = linear_cross_entropy(**arguments), arguments["hidden_ND"]
    first, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_ignored_rows_cost_nothing() -> None:
    """Their hidden states are not even read."""
    arguments = make(torch.float32, 8, 4, 9, ignored=0)
    arguments["labels_N"][3] = -100
    with torch.no_grad():
        arguments["hidden_ND"][3] = float("nan")
    assert linear_cross_entropy(**arguments).isfinite()


@pytest.mark.parametrize(("needs", "products"), [((), 1), (("hidden_ND",), 2), (("hidden_ND", "weight_VD"), 3)])
def test_flops_are_known_to_torchs_counter(needs: tuple[str, ...], products: int) -> None:
    arguments = make(torch.float32, 8, 4, 9)
    for name in ("hidden_ND", "weight_VD"):
        arguments[name] = arguments[name].detach().requires_grad_(name in needs)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(**arguments)
    assert counter.get_total_flops() == products * 2 * 8 * 4 * 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_compiles_with_inductor() -> None:
    arguments = make(torch.float32, 20, 16, 30)

    def function(hidden_ND: torch.Tensor, **rest: object) -> torch.Tensor:
        return linear_cross_entropy(torch.tanh(hidden_ND), **rest) * 0.5  # type: ignore[arg-type]

    expected, found = (testing.results(each, arguments) for each in (function, torch.compile(function, fullgraph=True)))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_peak_memory_is_a_small_part_of_that_of_all_logits() -> None:
    def extra(function: object) -> int:
        arguments = make(torch.float32, 2048, 192, 16384, ignored=0)
        return bench.measure(lambda: testing.results(function, arguments)).peak_bytes  # type: ignore[arg-type]

    def plain(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, **_: object) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden_ND, weight_VD), labels_N, reduction="sum")

    extra(linear_cross_entropy)  # starts threads and fills caches
    assert extra(linear_cross_entropy) <= 0.15 * extra(plain)


@pytest.mark.bench
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_of_time_and_memory(dtype: torch.dtype) -> None:
    shape = next(shape for shape in bench.shapes("head/linear_cross_entropy") if shape.dtype == dtype)
    ours, theirs = bench.paired(shape, repeats=3)
    assert ours.cpu_seconds <= theirs.cpu_seconds
    assert ours.peak_bytes <= 0.15 * theirs.peak_bytes

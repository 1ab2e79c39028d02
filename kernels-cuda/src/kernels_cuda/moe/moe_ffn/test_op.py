"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels_cuda import bench, build, testing
from kernels_cuda.moe import moe_ffn
from kernels_cuda.moe.moe_ffn.cases import make

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@pytest.fixture(autouse=True)
def cpu_twin() -> Iterator[None]:
    with testing.using("cpu"):
        yield


@each_implementation
def test_agrees_with_a_loop_over_tokens_in_numpy(implementation: str) -> None:
    arguments = make(torch.float32, 11, 3, 8, 5, 8)
    x, gate_up, down, score, experts = (value.detach().double().numpy() for value in arguments.values())
    expected = np.zeros_like(x)
    for token in range(11):
        for slot in range(3):
            expert = int(experts[token, slot])
            gate, up = np.split(gate_up[expert] @ x[token], 2)
            expected[token] += score[token, slot] * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    moved = testing.moved(arguments, device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        np.testing.assert_allclose(moe_ffn(**moved).detach().cpu().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", ["moe", "moe_emulated"])
@pytest.mark.parametrize(("rows", "num_experts"), [(0, 3), (1, 1), (255, 4), (256, 4), (257, 300), (1000, 16)])
def test_sort_is_stable(library: str, rows: int, num_experts: int) -> None:
    build.load("moe/moe_ffn", "emulated" if library.endswith("emulated") else "cpu")
    experts = torch.randint(0, num_experts, (rows,), generator=torch.Generator().manual_seed(rows))
    order, inverse = torch.full((2, rows), -1, dtype=torch.int32).unbind()
    ends, counts = torch.full((num_experts,), -1, dtype=torch.int32), torch.zeros(-(-rows // 256), num_experts, dtype=torch.int32)
    getattr(torch.ops, library).sort_tokens_(experts.int(), counts, order, inverse, ends)
    expected = torch.argsort(experts, stable=True)
    assert order.tolist() == expected.tolist()
    assert inverse.tolist() == torch.argsort(expected).tolist()
    assert ends.tolist() == torch.bincount(experts, minlength=num_experts).cumsum(0).tolist()


@each_implementation
def test_nan_of_a_token_stays_with_the_token(implementation: str) -> None:
    arguments = testing.moved(make(torch.float32, 6, 2, 8, 4, 8), device="cuda" if implementation == "cuda" else "cpu")
    with torch.no_grad():
        arguments["x_TD"][2, 3] = float("nan")
    with testing.using(implementation):
        assert moe_ffn(**arguments).isnan().all(1).tolist() == [False, False, True, False, False, False]


def test_backward_keeps_x_the_first_products_and_a_few_numbers_per_row() -> None:
    arguments = make(torch.float32, 64, 4, 48, 8, 16)
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes() // value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        moe_ffn(**arguments)
    weights = arguments["gate_up_NFD"].numel() + arguments["down_NDE"].numel()
    assert sum(kept.values()) - weights - 8 == 64 * (48 + 4 * 2 * 16 + 3 * 4)


def test_under_autocast_the_arguments_decide() -> None:
    arguments = make(torch.float32, 20, 2, 16, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moe_ffn(**arguments), moe_ffn(**arguments))
    assert moe_ffn(**arguments).dtype == torch.float32


def test_backward_runs_twice_and_refuses_a_second_derivative() -> None:
    arguments = make(torch.float32, 5, 2, 8, 3, 8)
    total, x = moe_ffn(**arguments).sum(), arguments["x_TD"]
    first, again = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(total, x, create_graph=True)


def test_flops_are_known_to_torchs_counter() -> None:
    arguments = make(torch.float32, 8, 2, 16, 4, 8)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(moe_ffn(**arguments).sum(), [arguments["x_TD"], arguments["gate_up_NFD"], arguments["down_NDE"]])
    assert counter.get_total_flops() == 3 * 2 * 3 * 8 * 2 * 16 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_layer_without_experts_where_there_is_one(dtype: torch.dtype) -> None:
    arguments = make(dtype, 9, 1, 16, 1, 8)
    gate, up = F.linear(arguments["x_TD"], arguments["gate_up_NFD"][0]).chunk(2, -1)
    dense = F.linear(F.silu(gate) * up, arguments["down_NDE"][0])
    tolerance: Any = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(moe_ffn(**{**arguments, "score_TK": torch.ones(9, 1)}), dense, **tolerance)


@pytest.mark.bench
def test_target_of_time() -> None:
    """0.75 of a loop over experts (specification), and 15 parts in a hundred more."""
    shape = next(shape for shape in bench.shapes("moe/moe_ffn") if shape.dtype == torch.float32)
    ours, theirs = bench.paired(shape, repeats=5)
    assert ours.cpu_seconds <= 1.15 * 0.75 * theirs.cpu_seconds

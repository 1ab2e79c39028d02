"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.moe import route
from kernels_cuda.moe.gates import rows

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


def device(implementation: str) -> str:
    return "cuda" if implementation == "cuda" else "cpu"


@each_implementation
def test_golden_case_of_the_specification(implementation: str) -> None:
    logits = torch.tensor([[0.0, 1, 2, 3], [3, 2, 1, 0]], device=device(implementation))
    with testing.using(implementation):
        idx, score, count, importance = route(logits, 2)
    assert idx.tolist() == [[3, 2], [0, 1]]
    assert count.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(score.cpu(), torch.tensor([[0.7311, 0.2689]] * 2), rtol=0, atol=5e-5)
    torch.testing.assert_close(importance.cpu(), torch.tensor([0.7311, 0.2689, 0.2689, 0.7311]), rtol=0, atol=5e-5)


@each_implementation
def test_order_is_that_of_value_and_then_number_for_all_rows_of_three_values(implementation: str) -> None:
    logits = torch.tensor(list(itertools.product([0.0, 1.0, 2.0], repeat=5)), device=device(implementation))
    expected = [sorted(range(5), key=lambda j: (-row[j], j))[:3] for row in logits.tolist()]
    with testing.using(implementation):
        assert route(logits, 3).idx_TK.tolist() == expected


@each_implementation
def test_nan_is_selected_and_stays_with_its_token(implementation: str) -> None:
    logits = rows(torch.float32, 5, 40).to(device(implementation))
    logits[2, 7] = float("nan")
    logits[3] = float("nan")
    with testing.using(implementation):
        idx, score, _, importance = route(logits, 3)
    assert idx[2, 0] == 7
    assert idx[3].tolist() == [0, 1, 2]
    assert score.isnan().any(1).tolist() == [False, False, True, True, False]
    assert importance[7].isnan()


def test_backward_refuses_a_second_derivative() -> None:
    logits = rows(torch.float32, 5, 8).requires_grad_()
    with testing.using("cpu"), pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(route(logits, 2).score_TK.square().sum(), logits, create_graph=True)

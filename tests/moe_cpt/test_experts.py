from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels_cuda import use
from moe_cpt.experts import Backend, chosen_backend, moe_ffn


def inputs(
    tokens: int = 12, hidden: int = 16, experts: int = 5, size: int = 8, k: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    idx = (
        torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
        if tokens
        else torch.empty(0, k, dtype=torch.long)
    )
    return [draw(tokens, hidden), draw(experts, 2 * size, hidden) / 4, draw(experts, hidden, size) / 3, idx, draw(tokens, k).abs()]


def by_hand(x: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor, score: Tensor) -> Tensor:
    """The same in NumPy, token by token."""
    xs, gu, dn = (part.double().numpy() for part in (x, gate_up, down))
    out = np.zeros_like(xs)
    half = gu.shape[1] // 2
    for token in range(len(xs)):
        for slot, expert in enumerate(idx[token].tolist()):
            gate, up = gu[expert, :half] @ xs[token], gu[expert, half:] @ xs[token]
            out[token] += float(score[token, slot]) * (dn[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return torch.from_numpy(out)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_a_loop_over_tokens(k: int) -> None:
    case = inputs(k=k)
    assert_close(moe_ffn(*case), by_hand(*case), rtol=1e-12, atol=1e-12)


def test_one_expert_may_take_everything_and_others_nothing() -> None:
    case = inputs(k=1)
    case[3] = torch.full_like(case[3], 3)
    assert_close(moe_ffn(*case), by_hand(*case), rtol=1e-12, atol=1e-12)


def test_no_tokens_give_no_rows() -> None:
    assert moe_ffn(*inputs(tokens=0)).shape == (0, 16)


@pytest.mark.parametrize("idle", [False, True], ids=["all busy", "an idle expert"])
def test_gradients_equal_finite_differences(idle: bool) -> None:
    x, gate_up, down, idx, score = inputs(tokens=4, hidden=3, experts=3, size=2)
    if idle:
        idx = idx.new_tensor([[0, 2], [2, 0], [0, 2], [0, 2]])
    leaves = [part.requires_grad_() for part in (x, gate_up, down, score)]
    assert torch.autograd.gradcheck(lambda x, gate_up, down, score: moe_ffn(x, gate_up, down, idx, score), leaves)
    moe_ffn(x, gate_up, down, idx, score).sum().backward()
    assert gate_up.grad is not None
    if idle:
        assert not gate_up.grad[1].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_backends_agree_in_value_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    results = []
    backends: list[Backend] = ["loop", "grouped_mm", "fused"]
    for backend in backends:
        case = inputs(dtype=dtype)
        for part in (0, 1, 2, 4):
            case[part].requires_grad_()
        y = moe_ffn(*case, backend=backend)
        y.float().square().sum().backward()
        results.append([y.detach(), *(case[part].grad for part in (0, 1, 2, 4))])
    for loop, *others in zip(*results):
        assert loop is not None
        scale = float(loop.float().abs().max())
        for other in others:
            assert other is not None
            assert float((loop - other).float().abs().max()) <= tolerance * scale


def test_backends_are_chosen_only_where_they_work() -> None:
    x, _, down, *_ = inputs(dtype=torch.float32)
    assert chosen_backend("auto", x, down) == "fused"
    assert chosen_backend("auto", x, down[:, :, :6]) == "fused"
    assert chosen_backend("auto", x.half(), down.half()) == "fused"
    assert chosen_backend("auto", x.double(), down.double()) == "loop"
    assert chosen_backend("loop", x, down) == "loop"
    before = use("reference")
    try:
        assert chosen_backend("auto", x, down) == "grouped_mm"
        assert chosen_backend("auto", x, down[:, :, :6]) == "loop"
    finally:
        use(before)


def test_runs_twice_to_the_same_bits() -> None:
    case = inputs(dtype=torch.float32)
    assert torch.equal(moe_ffn(*case), moe_ffn(*case))


def test_products_run_in_autocasts_type() -> None:
    case = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_ffn(*case)
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), by_hand(*case), rtol=0.05, atol=0.05)

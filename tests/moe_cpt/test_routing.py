from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from moe_cpt.model import MoEBlock
from moe_cpt.routing import balance_loss, cv_squared, gate, noise
from tests.moe_cpt.small import config

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_golden_case() -> None:
    said = gate(torch.tensor([[0.0, 1, 2, 3], [3, 2, 1, 0]]), 2)
    assert said.experts_RK.tolist() == [[3, 2], [0, 1]]
    expected = torch.tensor([0.7311, 0.2689])
    assert_close(said.score_RK, expected.expand(2, 2), atol=5e-5, rtol=0)
    assert_close(said.importance_N, torch.tensor([0.7311, 0.2689, 0.2689, 0.7311]), atol=5e-5, rtol=0)
    assert cv_squared(said.importance_N).item() == pytest.approx(0.28474, abs=5e-6)
    assert said.load_N.tolist() == [1, 1, 1, 1]


def test_ties_go_to_the_lower_expert() -> None:
    assert gate(torch.zeros(3, 9), 4).experts_RK.tolist() == [[0, 1, 2, 3]] * 3
    assert gate(torch.tensor([[1.0, 2, 2, 1, 2]]), 4).experts_RK.tolist() == [[1, 2, 4, 0]]


def test_without_softmax_the_scores_are_logits_and_without_multiplication_they_are_one() -> None:
    logits = torch.tensor([[0.5, 3.0, -1.0]])
    assert gate(logits, 2, softmax=False).score_RK.tolist() == [[3.0, 0.5]]
    plain = gate(logits, 2, multiply=False)
    assert plain.score_RK.tolist() == [[1.0, 1.0]]
    assert_close(plain.importance_N.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_estimated_load_equals_the_selections_it_estimates(scale: float) -> None:
    rows, experts, k, draws = 4000, 8, 3, 50
    logits = scale * draw(1, experts, seed=5).expand(rows, -1)
    sigma = torch.full_like(logits, 0.7)
    load, count = torch.zeros(experts, dtype=F64), torch.zeros(experts, dtype=F64)
    for seed in range(draws):
        said = gate(logits, k, sigma_RN=sigma, noise_RN=draw(rows, experts, seed=seed))
        load += said.load_N / draws
        count += said.count_N / draws
    assert load.sum().item() == pytest.approx(rows * k, rel=0.01)
    # 1% of the tokens: a rarely chosen expert has few selections to compare with
    assert_close(load, count, atol=0.01 * rows, rtol=0)


def test_estimated_load_is_the_probability_to_be_selected_by_a_fresh_draw() -> None:
    logits, sigma, noise_RN = draw(1, 5), 0.5 + draw(1, 5, seed=2).abs(), draw(1, 5, seed=3)
    load = gate(logits, 2, sigma_RN=sigma, noise_RN=noise_RN).load_N
    for expert in range(5):
        fresh = draw(200_000, 1, seed=expert + 10)
        noisy = (logits + noise_RN * sigma).expand(len(fresh), -1).clone()
        noisy[:, expert] = logits[0, expert] + fresh[:, 0] * sigma[0, expert]
        chosen = (noisy.topk(2).indices == expert).any(1).double().mean()
        assert load[expert].item() == pytest.approx(chosen.item(), abs=5e-3)


def test_gradient_of_the_balance_loss_equals_finite_differences() -> None:
    logits, sigma, drawn = draw(12, 6), 0.5 + draw(12, 6, seed=2).abs(), draw(12, 6, seed=3)

    def loss(logits: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        said = gate(logits, 2, sigma_RN=sigma, noise_RN=drawn)
        return balance_loss(said.importance_N[None], said.load_N[None], 0.01)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), sigma.requires_grad_()))


def test_padding_tokens_change_nothing() -> None:
    logits, sigma, drawn = draw(6, 5), torch.ones(6, 5, dtype=F64), draw(6, 5, seed=3)
    mask = torch.tensor([1, 1, 1, 1, 0, 0])
    padded = gate(logits, 2, sigma_RN=sigma, noise_RN=drawn, mask_R=mask)
    alone = gate(logits[:4], 2, sigma_RN=sigma[:4], noise_RN=drawn[:4])
    for name in ("importance_N", "load_N", "count_N"):
        assert_close(getattr(padded, name), getattr(alone, name))


def test_noise_of_a_token_depends_on_sample_and_position_alone() -> None:
    whole = noise(7, 1, torch.tensor([4, 9]), 6, 5).view(2, 6, 5)
    assert torch.equal(noise(7, 1, torch.tensor([9]), 3, 5).view(3, 5), whole[1, :3])
    assert not torch.equal(noise(7, 2, torch.tensor([9]), 3, 5), noise(7, 1, torch.tensor([9]), 3, 5))
    assert abs(float(noise(0, 0, torch.arange(50), 20, 10).std()) - 1) < 0.02


@pytest.mark.parametrize("network", ["linear", "mlp"])
def test_router_runs_in_float32_under_autocast_and_noise_starts_at_its_known_spread(network: str) -> None:
    torch.manual_seed(0)
    block = MoEBlock(config(gate_network=network), 0)
    torch.nn.init.zeros_(block.router.noise.weight)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, sigma = block.router(x, noisy=True)
    plain = block.router.proj(x) if network == "linear" else block.router.fc2(torch.tanh(block.router.fc1(x)))
    assert torch.equal(logits, plain)
    assert_close(sigma, torch.full_like(logits, 0.7031), atol=1e-4, rtol=0)

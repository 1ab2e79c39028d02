"""The four forms of the bound agree for any fixed predictor, and estimates are unbiased for it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.mdm_scaling.small import Table
from torch import Tensor

from mdm_scaling import losses
from mdm_scaling.noise import Noise

V, S = 3, 4
TABLE = Table(V, S, seed=1)
IDS = torch.tensor(list(itertools.product(range(V), repeat=S)))[::7]


def scores(ids_S: Tensor, hidden: tuple[int, ...]) -> Tensor:
    """CE at every position given the sequence without the hidden ones."""
    noisy = ids_S.clone()
    noisy[list(hidden)] = V
    return -TABLE.logits(noisy[None])[0].log_softmax(-1).gather(1, ids_S[:, None])[:, 0]


def subsets(k: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(S), k))


def by_counts(ids_S: Tensor) -> float:
    """S x mean over k of the mean over subsets of size k of the mean CE."""
    return S * sum(float(sum(scores(ids_S, m)[list(m)].mean() for m in subsets(k))) / len(subsets(k)) for k in range(1, S + 1)) / S


def by_orders(ids_S: Tensor) -> float:
    """Mean over all orders of the chain-rule NLL."""
    total = 0.0
    for order in itertools.permutations(range(S)):
        total += sum(float(scores(ids_S, order[at:])[order[at]]) for at in range(S))
    return total / math.factorial(S)


def by_quadrature(ids_S: Tensor, low: float = 0.0) -> float:
    """Integral over p in (low, 1) of (1/p) E[sum of masked CE], Gauss-Legendre; the integrand is a polynomial."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(8)
    total = 0.0
    for node, weight in zip(nodes, weights):
        p = low + (1 - low) * (node + 1) / 2
        inner = sum(
            p ** (k - 1) * (1 - p) ** (S - k) * float(sum(scores(ids_S, m)[list(m)].sum() for m in subsets(k))) for k in range(1, S + 1)
        )
        total += weight * (1 - low) / 2 * inner
    return total


def test_all_forms_of_the_bound_agree() -> None:
    exact = losses.bounds(TABLE, IDS, "exact", num_mc=1, seed=0, noise=Noise(), mask_id=V)
    for row, ids in enumerate(IDS):
        for form in (by_counts, by_orders, by_quadrature):
            assert form(ids) == pytest.approx(float(exact[row]), rel=1e-10)


def test_chain_is_the_left_to_right_order() -> None:
    chain = losses.bounds(TABLE, IDS, "chain", num_mc=1, seed=0, noise=Noise(), mask_id=V)
    for row, ids in enumerate(IDS):
        expected = sum(float(scores(ids, tuple(range(at, S)))[at]) for at in range(S))
        assert float(chain[row]) == pytest.approx(expected, rel=1e-10)


def test_chain_sums_to_a_distribution() -> None:
    everything = torch.tensor(list(itertools.product(range(V), repeat=S)))
    chain = losses.bounds(TABLE, everything, "chain", num_mc=1, seed=0, noise=Noise(), mask_id=V, micro_batch=64)
    assert float(torch.exp(-chain).sum()) == pytest.approx(1.0, rel=1e-12)


def test_the_bound_is_not_below_the_chain_on_average_over_orders() -> None:
    """Jensen: -log of the mean probability over orders is at most the bound."""
    exact = losses.bounds(TABLE, IDS, "exact", num_mc=1, seed=0, noise=Noise(), mask_id=V)
    for row, ids in enumerate(IDS):
        mixed = 0.0
        for order in itertools.permutations(range(S)):
            mixed += math.exp(-sum(float(scores(ids, order[at:])[order[at]]) for at in range(S)))
        assert -math.log(mixed / math.factorial(S)) <= float(exact[row]) + 1e-12


@pytest.mark.parametrize("estimator", ["stratified", "shift", "iid", "fixed-count"])
def test_estimates_are_unbiased(estimator: losses.Estimator) -> None:
    eps = 1e-3
    noise = Noise(mode="fixed-count" if estimator == "fixed-count" else "bernoulli", eps=eps)
    draws = torch.stack(
        [losses.bounds(TABLE, IDS[:4], estimator, num_mc=64, seed=seed, noise=noise, mask_id=V, micro_batch=256) for seed in range(40)]
    )
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    low = 0.0 if estimator == "fixed-count" else eps
    for row, ids in enumerate(IDS[:4]):
        expected = by_quadrature(ids, low) / (1 - low)
        assert abs(float(mean[row]) - expected) < 4 * float(error[row])


def test_strata_lower_the_spread() -> None:
    """A predictor that gets worse with every token it does not see: the level decides most of an estimate."""

    def predict(noisy: Tensor, targets: Tensor, rows: Tensor, weights: Tensor | None = None, reduction: str = "sum") -> Tensor:
        return (noisy == 9).double().mean(1)[rows // noisy.shape[1]]

    ids = torch.zeros(1, 64, dtype=torch.long)
    spread = {}
    for estimator in ("stratified", "iid"):
        draws = [
            losses.bounds(predict, ids, estimator, num_mc=32, seed=seed, noise=Noise(), mask_id=9, micro_batch=32) for seed in range(40)
        ]  # type: ignore[arg-type]
        spread[estimator] = float(torch.stack(draws).std())
    assert spread["stratified"] < 0.5 * spread["iid"]


def test_the_micro_batch_does_not_change_an_estimate() -> None:
    one, many = (losses.bounds(TABLE, IDS, "stratified", num_mc=3, seed=5, noise=Noise(), mask_id=V, micro_batch=size) for size in (1, 50))
    torch.testing.assert_close(one, many, rtol=1e-12, atol=0)


def test_training_loss_is_the_weighted_sum_and_zero_without_masks() -> None:
    masked = torch.zeros(2, S, dtype=torch.bool)
    masked[0, 1] = masked[0, 3] = True
    weight = torch.tensor([2.0, 7.0], dtype=torch.float64)
    total = losses.masked_total(TABLE, IDS[:2], masked, weight, V)
    expected = 2 * scores(IDS[0], (1, 3))[[1, 3]].sum()
    torch.testing.assert_close(total, expected)
    assert float(losses.masked_total(TABLE, IDS[:2], torch.zeros_like(masked), weight, V)) == 0

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_cpt.split.kmeans import as_many_columns_as_rows, balanced_assignment, balanced_kmeans, costs


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@given(st.integers(0, 10_000))
def test_assignment_is_the_best_of_all(seed: int) -> None:
    cost = draw(6, 3, seed=seed)
    labels = balanced_assignment(cost)
    best = min(sum(cost[np.arange(6), list(chosen)]) for chosen in set(itertools.permutations([0, 0, 1, 1, 2, 2])))
    assert cost[np.arange(6), labels].sum() == pytest.approx(best, abs=1e-9)
    assert np.bincount(labels, minlength=3).tolist() == [2, 2, 2]


@given(st.integers(0, 10_000))
def test_assignment_does_not_depend_on_where_it_starts(seed: int) -> None:
    cost = draw(24, 4, seed=seed)
    from_bad = balanced_assignment(cost, np.repeat(np.arange(4), 6))
    rows = np.arange(24)
    assert cost[rows, from_bad].sum() == pytest.approx(cost[rows, balanced_assignment(cost)].sum(), abs=1e-9)


@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_separate_groups_are_found(metric: str) -> None:
    centres = 10 * np.eye(4, 8)
    points = np.repeat(centres, 5, axis=0) + 0.1 * draw(20, 8)
    order = np.random.default_rng(1).permutation(20)
    labels, _ = balanced_kmeans(points[order], 4, seed=3, metric=metric, n_init=4)  # type: ignore[arg-type]
    assert len({tuple(sorted(order[labels == cluster] // 5)) for cluster in range(4)}) == 4
    assert all(len(set(order[labels == cluster] // 5)) == 1 for cluster in range(4))


def test_the_result_is_a_fixed_point_and_depends_on_the_seed_alone() -> None:
    points = draw(48, 6)
    labels, cost = balanced_kmeans(points, 4, seed=5)
    again, same = balanced_kmeans(points, 4, seed=5)
    assert (labels == again).all()
    assert cost == same
    centres = np.stack([points[labels == cluster].mean(0) for cluster in range(4)])
    assert costs(points, centres, "l2")[np.arange(48), balanced_assignment(costs(points, centres, "l2"))].sum() == pytest.approx(cost)


def test_more_starts_are_never_worse() -> None:
    points = draw(60, 5)
    assert balanced_kmeans(points, 5, seed=1, n_init=5)[1] <= balanced_kmeans(points, 5, seed=1)[1]


@pytest.mark.parametrize("points", [np.zeros((24, 3)), np.ones((24, 3)), np.repeat(draw(2, 3), 12, axis=0)], ids=["zero", "equal", "two"])
@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_degenerate_rows_still_give_equal_clusters(points: np.ndarray, metric: str) -> None:
    labels, cost = balanced_kmeans(points, 6, seed=0, metric=metric)  # type: ignore[arg-type]
    assert np.bincount(labels, minlength=6).tolist() == [4] * 6
    assert np.isfinite(cost)
    assert (labels == balanced_kmeans(points, 6, seed=0, metric=metric)[0]).all()  # type: ignore[arg-type]


def test_fewer_columns_keep_products() -> None:
    points = draw(10, 40)
    square = as_many_columns_as_rows(points)
    assert square.shape == (10, 10)
    np.testing.assert_allclose(square @ square.T, points @ points.T, atol=1e-10)

"""K-means whose clusters all have the same size."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lm_core import counter

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Metric = Literal["l2", "cos"]
# an exchange must gain more than rounding could
_GAIN = 1e-12


def balanced_kmeans(
    rows: NDArray[Any], clusters: int, *, seed: int, metric: Metric = "l2", max_iter: int = 500, n_init: int = 1
) -> tuple[Labels, float]:
    """Labels of `rows` in `clusters` clusters of exactly equal size, and their cost: the best of `n_init` starts.

    Centres start as in k-means++; assignments are optimal for their centres; it ends when labels repeat. The cost is the sum of
    squared distances to the centres, or with `cos` of 1 - cosine to their direction. Deterministic in `seed`.
    """
    points = np.asarray(rows, dtype=np.float64)
    if points.shape[1] > len(points):
        points = as_many_columns_as_rows(points)
    best: tuple[float, Labels] | None = None
    for start in range(n_init):
        labels, cost = _once(points, clusters, counter.derive(seed, "split", start), metric, max_iter)
        if best is None or cost < best[0]:
            best = cost, labels
    assert best is not None
    return best[1], best[0]


def as_many_columns_as_rows(points: Floats) -> Floats:
    """Points at the same distances and angles with a square matrix of coordinates, from the eigenvectors of their products."""
    values, vectors = np.linalg.eigh(points @ points.T)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _once(points: Floats, clusters: int, seed: int, metric: Metric, max_iter: int) -> tuple[Labels, float]:
    centres = plus_plus(points, clusters, seed)
    labels: Labels | None = None
    for _ in range(max_iter):
        again = balanced_assignment(costs(points, centres, metric), labels)
        if labels is not None and (again == labels).all():
            break
        labels = again
        centres = np.stack([points[labels == cluster].mean(0) for cluster in range(clusters)])
    assert labels is not None
    return labels, float(costs(points, centres, metric)[np.arange(len(points)), labels].sum())


def plus_plus(points: Floats, clusters: int, seed: int) -> Floats:
    """Centres among the points: the first at random, each next with probability by squared distance to the nearest so far."""
    draws = counter.uniform(seed, "split", 0, clusters).double().numpy()
    chosen = [int(draws[0] * len(points))]
    nearest = costs(points, points[chosen[:1]], "l2")[:, 0]
    for draw in draws[1:]:
        total = nearest.sum()
        # all points may already be centres
        at = int(np.searchsorted(np.cumsum(nearest), draw * total, side="right")) if total > 0 else int(draw * len(points))
        chosen.append(min(at, len(points) - 1))
        nearest = np.minimum(nearest, costs(points, points[chosen[-1:]], "l2")[:, 0])
    return points[chosen]


def costs(points: Floats, centres: Floats, metric: Metric) -> Floats:
    """Of every point in every cluster."""
    if metric == "cos":
        lengths = np.linalg.norm(centres, axis=1, keepdims=True)
        directions = centres / np.maximum(lengths, 1e-12)
        norms = np.maximum(np.sqrt(_squares(points)), 1e-12)
        return np.asarray(1 - points @ directions.T / norms[:, None])
    squares = _squares(points)[:, None] + _squares(centres)[None]
    return np.asarray(np.maximum(squares - 2 * points @ centres.T, 0.0))


def _squares(rows: Floats) -> Floats:
    return np.asarray(np.einsum("ij,ij->i", rows, rows))


def balanced_assignment(cost: Floats, start: Labels | None = None) -> Labels:
    """Labels that give every cluster the same number of points at the least total cost.

    From `start`, or a greedy assignment, points are exchanged along cycles of clusters that lower the cost, until there is
    none. Then there is no better assignment: this is negative cycle cancelling for a minimum-cost flow, whose residual graph
    has a node per cluster and as edge a -> b the cheapest move of a point from a to b (Klein, 1967).
    """
    points, clusters = cost.shape
    assert points % clusters == 0
    labels = greedy(cost) if start is None else start.copy()
    least = _GAIN * max(float(np.abs(cost).max()), 1e-300) * clusters
    # per cluster: the least change of cost by moving one of its points elsewhere, and that point
    change = np.zeros((clusters, clusters))
    mover = np.zeros((clusters, clusters), dtype=np.int64)

    def refresh(cluster: int) -> None:
        members = np.flatnonzero(labels == cluster)
        moves = cost[members] - cost[members, cluster][:, None]
        first = moves.argmin(0)
        change[cluster], mover[cluster] = moves[first, np.arange(clusters)], members[first]

    for cluster in range(clusters):
        refresh(cluster)
    while cycle := _negative_cycle(change, least):
        moves = [(mover[a, b], b) for a, b in zip(cycle, [*cycle[1:], cycle[0]])]
        for point, target in moves:
            labels[point] = target
        for cluster in cycle:
            refresh(cluster)
    return labels


def greedy(cost: Floats) -> Labels:
    """Points in the order of their regret (second best minus best cost), each into its best cluster that has room."""
    points, clusters = cost.shape
    labels, room = np.empty(points, dtype=np.int64), np.full(clusters, points // clusters)
    order = np.argsort(cost, axis=1, kind="stable")
    ranked = np.take_along_axis(cost, order, 1)
    regret = ranked[:, min(1, clusters - 1)] - ranked[:, 0]
    for point in np.argsort(-regret, kind="stable"):
        target = next(cluster for cluster in order[point] if room[cluster])
        labels[point] = target
        room[target] -= 1
    return labels


def _negative_cycle(change: Floats, least: float) -> list[int]:
    """A cycle of clusters whose moves lower the cost by more than `least`, or nothing (Bellman-Ford)."""
    clusters = len(change)
    distance, before = np.zeros(clusters), np.full(clusters, -1)
    last = -1
    for _ in range(clusters):
        through = distance[:, None] + change
        source = through.argmin(0)
        found = through[source, np.arange(clusters)]
        better = found < distance - least / clusters
        if not better.any():
            return []
        distance = np.where(better, found, distance)
        before = np.where(better, source, before)
        last = int(np.flatnonzero(better)[0])
    # relaxed as often as there are clusters: the way back from there runs into a cycle
    for _ in range(clusters):
        last = int(before[last])
    cycle = [last]
    while (step := int(before[cycle[-1]])) != last:
        cycle.append(step)
    cycle.reverse()
    total = sum(change[a, b] for a, b in zip(cycle, [*cycle[1:], cycle[0]]))
    return cycle if total < -least else []

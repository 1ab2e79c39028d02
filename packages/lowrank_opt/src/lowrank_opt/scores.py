"""What classifiers are scored by, from all predictions of an evaluation at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def accuracy(predicted: Values, true: Values) -> float:
    return float((predicted == true).mean())


def f1(predicted: Values, true: Values) -> float:
    """Harmonic mean of precision and recall of label 1; 0 where both are 0."""
    hits = float(((predicted == 1) & (true == 1)).sum())
    found = float((predicted == 1).sum() + (true == 1).sum())
    return 2 * hits / found if found else 0.0


def matthews(predicted: Values, true: Values) -> float:
    """Correlation of two sets of labels: for two of them (tp tn - fp fn) over the root of the product of the four sums."""
    return pearson(predicted, true)


def pearson(predicted: Values, true: Values) -> float:
    """Correlation; 0 where one side is constant."""
    one, other = predicted - predicted.mean(), true - true.mean()
    size = math.sqrt(float((one * one).sum()) * float((other * other).sum()))
    return float((one * other).sum()) / size if size else 0.0


def spearman(predicted: Values, true: Values) -> float:
    """Correlation of ranks, equal values sharing their mean rank."""
    return pearson(ranks(predicted), ranks(true))


def ranks(values: Values) -> Values:
    """
    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return ((np.cumsum(count) - count) + (count - 1) / 2)[place]


SCORES: Mapping[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def scored(names: Sequence[str], pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The scores called `names` of (predicted, true) pairs."""
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return {name: SCORES[name](table[:, 0], table[:, 1]) for name in names} if len(table) else {}

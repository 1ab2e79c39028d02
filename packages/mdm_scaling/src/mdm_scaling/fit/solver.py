"""Robust least squares from many starts at once: damped Gauss-Newton on sums of Huber losses.

S starts, n points, k parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Slopes(Protocol):
    """Derivatives of predictions (S x n x k), in whatever form a model has them."""

    def __getitem__(self, rows: Any) -> Slopes: ...

    def put(self, rows: Any, other: Any) -> None:
        """Replace those of some starts."""

    def dense(self) -> Floats: ...

    def normal(self, weight: Floats, residual: Floats) -> tuple[Floats, Floats]:
        """Sums over the points of weight x slope x slope (S x k x k) and of weight x slope x residual (S x k)."""


class Dense:
    """Derivatives as they are."""

    def __init__(self, values: Floats) -> None:
        self.values = values

    def __getitem__(self, rows: Any) -> Dense:
        return Dense(self.values[rows])

    def put(self, rows: Any, other: Any) -> None:
        self.values[rows] = other.values

    def dense(self) -> Floats:
        return self.values

    def normal(self, weight: Floats, residual: Floats) -> tuple[Floats, Floats]:
        weighted = (self.values * weight[:, :, None]).transpose(0, 2, 1)
        return np.matmul(weighted, self.values), np.matmul(weighted, residual[:, :, None])[:, :, 0]


# parameters (S x k) -> predictions (S x n) and their derivatives
Model = Callable[[Floats], tuple[Floats, Slopes]]
DELTA = 1e-3


@dataclass(frozen=True)
class Solution:
    """Where each start ended."""

    parameters: Floats
    objective: Floats


def huber(residual: Floats, delta: float = DELTA) -> Floats:
    """Quadratic up to `delta`, linear beyond.

    >>> huber(np.array([0.5e-3, 2e-3])).tolist()
    [1.25e-07, 1.5e-06]
    """
    size = np.abs(residual)
    result: Floats = np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
    return result


def minimise(
    model: Model,
    starts: Floats,
    target: Floats,
    *,
    counts: Floats | None = None,
    box: tuple[Floats, Floats] | None = None,
    delta: float = DELTA,
    steps: int = 400,
    tolerance: float = 1e-13,
) -> Solution:
    """The sum over points of count x Huber(model - target), lowered from every start until it no longer moves.

    `counts` (S x n) weigh the points of each start, which is how resamples are solved together. `box` holds the lowest and the
    highest parameters (k each): one that lies at its end, and would leave, stays there while the others move.
    """
    # a step may land where a formula overflows; it is then refused
    with np.errstate(all="ignore"):
        return _minimise(model, starts, target, counts, box, delta, steps, tolerance)


def _minimise(
    model: Model, starts: Floats, target: Floats, counts: Floats | None, box: tuple[Floats, Floats] | None, delta: float, steps: int,
    tolerance: float,
) -> Solution:  # fmt: skip
    theta = np.array(starts, dtype=np.float64)
    weight = np.ones((len(theta), len(target))) if counts is None else counts
    prediction, jacobian = model(theta)
    objective = (weight * huber(prediction - target, delta)).sum(1)
    damping = np.full(len(theta), 1e-2)
    active = np.arange(len(theta))
    calm = np.zeros(len(theta), dtype=np.int64)
    eye = np.eye(theta.shape[1])
    for _ in range(steps):
        residual = prediction[active] - target
        robust = weight[active] * np.where(np.abs(residual) <= delta, 1.0, delta / np.maximum(np.abs(residual), 1e-300))
        normal, gradient = jacobian[active].normal(robust, residual)
        if box is not None:
            held = ((theta[active] <= box[0]) & (gradient > 0)) | ((theta[active] >= box[1]) & (gradient < 0))
            normal[held], gradient[held] = 0, 0
            normal.transpose(0, 2, 1)[held] = 0
        scale = np.maximum(np.einsum("sii->si", normal), 1e-12)
        curvature = normal + damping[active, None, None] * scale[:, :, None] * eye
        sound = np.isfinite(curvature).all((1, 2)) & np.isfinite(gradient).all(1)
        curvature[~sound], gradient[~sound] = eye, 0
        step = np.linalg.solve(curvature, -gradient[:, :, None])[:, :, 0]
        tried = theta[active] + step
        tried = tried if box is None else tried.clip(*box)
        found, derivatives = model(tried)
        value = (weight[active] * huber(found - target, delta)).sum(1)
        better = np.isfinite(value) & (value <= objective[active])
        moved = active[better]
        gained = objective[moved] - value[better]
        small = gained <= tolerance * np.maximum(objective[moved], 1e-300)
        theta[moved], prediction[moved], objective[moved] = tried[better], found[better], value[better]
        jacobian.put(moved, derivatives[better])
        damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-14), np.minimum(damping[active] * 4, 1e12))
        calm[moved] = np.where(small, calm[moved] + 1, 0)
        # three steps without gain, or no step small enough to gain anything
        active = active[(calm[active] < 3) & (damping[active] < 1e11) & (objective[active] > 1e-30)]
        if not len(active):
            break
    return Solution(theta, objective)


def newton(
    gradient_and_curvature: Callable[[Floats], tuple[Floats, Floats]], start: Floats, *, tolerance: float = 1e-9, steps: int = 100
) -> Floats:
    """Newton's method to a stationary point, from a start that is close to it; the best point seen."""
    best = theta = start
    smallest = np.inf
    for _ in range(steps):
        gradient, curvature = gradient_and_curvature(theta)
        size = float(np.abs(gradient).max())
        if size < smallest:
            best, smallest = theta, size
        if size <= tolerance:
            break
        theta = theta - np.linalg.lstsq(curvature, gradient, rcond=1e-14)[0]
        if not np.isfinite(theta).all():
            break
    return best


def numeric(function: Callable[[Floats], Floats], step: float = 1e-6) -> Model:
    """Predictions with central differences as derivatives."""

    def model(theta: Floats) -> tuple[Floats, Slopes]:
        value = function(theta)
        slopes = np.empty((*value.shape, theta.shape[1]))
        for at in range(theta.shape[1]):
            ahead, behind = theta.copy(), theta.copy()
            ahead[:, at] += step
            behind[:, at] -= step
            slopes[:, :, at] = (function(ahead) - function(behind)) / (2 * step)
        return value, Dense(slopes)

    return model

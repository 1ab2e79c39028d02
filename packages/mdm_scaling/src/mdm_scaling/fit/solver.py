"""Robust least squares from many starts at once: damped Gauss-Newton on sums of Huber losses.

S starts, n points, k parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# parameters (S x k) -> predictions (S x n) and their derivatives (S x n x k)
Model = Callable[[Floats], tuple[Floats, Floats]]
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
    delta: float = DELTA,
    steps: int = 400,
    tolerance: float = 1e-13,
) -> Solution:
    """The sum over points of count x Huber(model - target), lowered from every start until it no longer moves.

    `counts` (S x n) weigh the points of each start, which is how resamples are solved together.
    """
    # a step may land where a formula overflows; it is then refused
    with np.errstate(all="ignore"):
        return _minimise(model, starts, target, counts, delta, steps, tolerance)


def _minimise(model: Model, starts: Floats, target: Floats, counts: Floats | None, delta: float, steps: int, tolerance: float) -> Solution:
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
        slopes = jacobian[active]
        weighted = slopes * robust[:, :, None]
        normal = np.matmul(weighted.transpose(0, 2, 1), slopes)
        gradient = np.matmul(weighted.transpose(0, 2, 1), residual[:, :, None])[:, :, 0]
        scale = np.maximum(np.einsum("sii->si", normal), 1e-12)
        curvature = normal + damping[active, None, None] * scale[:, :, None] * eye
        sound = np.isfinite(curvature).all((1, 2)) & np.isfinite(gradient).all(1)
        curvature[~sound], gradient[~sound] = eye, 0
        step = np.linalg.solve(curvature, -gradient[:, :, None])[:, :, 0]
        tried = theta[active] + step
        found, derivatives = model(tried)
        value = (weight[active] * huber(found - target, delta)).sum(1)
        better = np.isfinite(value) & (value <= objective[active])
        moved = active[better]
        gained = objective[moved] - value[better]
        small = gained <= tolerance * np.maximum(objective[moved], 1e-300)
        theta[moved], prediction[moved], jacobian[moved] = tried[better], found[better], derivatives[better]
        objective[moved] = value[better]
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

    def model(theta: Floats) -> tuple[Floats, Floats]:
        value = function(theta)
        slopes = np.empty((*value.shape, theta.shape[1]))
        for at in range(theta.shape[1]):
            ahead, behind = theta.copy(), theta.copy()
            ahead[:, at] += step
            behind[:, at] -= step
            slopes[:, :, at] = (function(ahead) - function(behind)) / (2 * step)
        return value, slopes

    return model

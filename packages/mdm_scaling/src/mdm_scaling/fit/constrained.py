"""The law of repeated data: K_D and K_N given the single-epoch constants, or all seven together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lm_core.errors import InputError
from mdm_scaling.fit import chinchilla
from mdm_scaling.fit.laws import MOST, Law
from mdm_scaling.fit.points import Point
from mdm_scaling.fit.solver import Floats, minimise, numeric

GRID = np.geomspace(0.5, 2000, 12)
SINGLE_EPOCH = 1.001
# decays beyond these are no decay at all, or no value at all
LIMITS = (math.log(1e-3), math.log(1e6))
# a constant whose values within this share of the best objective span more than WEAK is not identified
BAND, WEAK = 0.01, 10.0


def predictions(theta: Floats, points: Sequence[Point]) -> Floats:
    """log L (S x n) for rows (a, b, e, alpha, beta, log K_D, log K_N)."""
    N, D, U = (np.array([getattr(point, name) for point in points]) for name in ("N", "D", "U"))
    a, b, e, alpha, beta, log_D, log_N = (theta[:, at, None] for at in range(7))
    log_factor = (np.log(np.maximum(alpha, 1e-9) / np.maximum(beta, 1e-9)) + a - b) / (alpha + beta)
    best = np.exp(np.clip((np.log(U) + log_factor) * beta / alpha + log_factor, -MOST, MOST))
    unique_N = np.minimum(N, best)
    decay_D, decay_N = (np.exp(np.clip(log, *LIMITS)) for log in (log_D, log_N))
    worth_D = U - U * decay_D * np.expm1(-(D / U - 1) / decay_D)
    worth_N = unique_N - unique_N * decay_N * np.expm1(-(N / unique_N - 1) / decay_N)
    exponents = np.stack([a - alpha * np.log(worth_N), b - beta * np.log(worth_D), np.broadcast_to(e, worth_N.shape)])
    top = exponents.max(0)
    result: Floats = top + np.log(np.exp(exponents - top).sum(0))
    return result


def fit(
    points: Sequence[Point], *, objective: str, stage: Literal["two-step", "joint"] = "two-step", base: Law | None = None, name: str = "fit",
    tie: bool = False, bootstrap: int = 1000, seed: int = 0,
) -> Law:  # fmt: skip
    """Two-step takes the five constants from the single-epoch runs (or `base`), then fits both decays; joint moves all seven."""
    single = [point for point in points if point.epochs <= SINGLE_EPOCH]
    repeated = [point for point in points if point.epochs > SINGLE_EPOCH]
    if len(repeated) < 3:
        raise InputError(f"runs: {len(repeated)} runs repeat their data; the decay of its value needs at least three")
    if base is None:
        base = chinchilla.parametric(single if stage == "two-step" else points, objective=objective, tie=tie, bootstrap=0)
    five = np.array([base.a, base.b, base.e, base.alpha, base.beta])
    decays = np.log(np.array(list(itertools.product(GRID, GRID))))
    target = np.log([point.loss for point in points])
    if stage == "two-step":
        model = numeric(lambda theta: predictions(np.hstack([np.repeat(five[None], len(theta), 0), theta]), points))
        starts = decays
    else:
        chinchilla.require_enough(points, 7)
        model = numeric(lambda theta: predictions(theta, points))
        starts = np.hstack([np.repeat(five[None], len(decays), 0), decays])
    solved = minimise(model, starts, target)
    best = int(np.argmin(solved.objective))
    theta = solved.parameters[best]
    whole = np.concatenate([five, theta]) if stage == "two-step" else theta
    value = float(solved.objective[best])
    profile = {name: _profile(whole, at, points, target) for name, at in (("K_D", 5), ("K_N", 6))}
    about: dict[str, Any] = {
        "estimator": f"data-constrained, {stage}",
        "n_points": len(points),
        "objective_value": value,
        "share_of_starts_at_best": float((solved.objective <= value * (1 + chinchilla.SAME_MINIMUM) + 1e-15).mean()),
        "minima_within_1_percent": _distinct(solved.parameters[:, -2:], solved.objective, value),
        "profile": profile,
        "weakly_identified": [name for name, curve in profile.items() if _is_weak(curve, value)],
        "r2": chinchilla.r2(model(theta[None])[0][0], target),
        "residuals_by_epochs": residuals(whole, points, target),
        "intervals": {},
    }
    if bootstrap:
        random = np.random.Generator(np.random.Philox(seed))
        counts = random.multinomial(len(target), np.full(len(target), 1 / len(target)), size=bootstrap).astype(np.float64)
        samples = minimise(model, np.repeat(theta[None], bootstrap, 0), target, counts=counts, steps=60).parameters
        about["intervals"] = {
            name: np.exp(np.quantile(np.clip(samples[:, at], *LIMITS), [0.025, 0.975])).tolist() for name, at in (("K_D", -2), ("K_N", -1))
        }
    a, b, e, alpha, beta, log_D, log_N = map(float, whole)
    return replace(
        base,
        name=name,
        a=a,
        b=b,
        e=e,
        alpha=alpha,
        beta=beta,
        K_D=float(np.exp(np.clip(log_D, *LIMITS))),
        K_N=float(np.exp(np.clip(log_N, *LIMITS))),
        objective=objective,
        about=about,
    )


def _profile(whole: Floats, at: int, points: Sequence[Point], target: Floats) -> list[list[float]]:
    """(constant, objective) with one decay held at each value and the other one fitted."""
    other = 6 if at == 5 else 5
    values = np.geomspace(0.5, 2000, 25)
    rows = np.repeat(whole[None], len(values), 0)
    rows[:, at] = np.log(values)

    best = []
    for row in range(len(values)):
        starts = np.array([0.0, np.log(10.0), np.log(100.0), whole[other]])[:, None]

        def several(theta: Floats, row: int = row) -> Floats:
            full = np.repeat(rows[row][None], len(theta), 0)
            full[:, other] = theta[:, 0]
            return predictions(full, points)

        best.append([float(values[row]), float(minimise(numeric(several), starts, target, steps=60).objective.min())])
    return best


def _is_weak(curve: Sequence[Sequence[float]], value: float) -> bool:
    inside = [constant for constant, objective in curve if objective <= value * (1 + BAND)]
    return bool(inside) and max(inside) / min(inside) > WEAK


def _distinct(decays: Floats, objective: Floats, value: float) -> list[dict[str, float]]:
    """Local minima within 1 % of the best, those with equal constants (to 1 %) once."""
    found: list[dict[str, float]] = []
    for at in np.argsort(objective):
        if objective[at] > value * (1 + BAND) + 1e-15:
            break
        K_D, K_N = map(float, np.exp(np.clip(decays[at], *LIMITS)))
        if all(abs(K_D / other["K_D"] - 1) > 0.01 or abs(K_N / other["K_N"] - 1) > 0.01 for other in found):
            found.append({"K_D": K_D, "K_N": K_N, "objective_value": float(objective[at])})
    return found[:10]


def residuals(whole: Floats, points: Sequence[Point], target: Floats) -> dict[str, float]:
    """Mean of measured minus predicted log loss by epochs: where the law, which cannot overfit, fails."""
    difference = target - predictions(whole[None], points)[0]
    groups: dict[str, list[float]] = {}
    for point, value in zip(points, difference):
        groups.setdefault(f"{point.epochs:.3g}", []).append(float(value))
    return {epochs: sum(values) / len(values) for epochs, values in sorted(groups.items(), key=lambda item: float(item[0]))}

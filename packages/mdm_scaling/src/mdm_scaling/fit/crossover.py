"""Compute beyond which masked diffusion beats the autoregressive model, by the amount of unique data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mdm_scaling.fit.laws import Law
from mdm_scaling.fit.points import Point

RANGE = (1e12, 1e27)


@dataclass(frozen=True)
class Crossing:
    """Where the better objective changes at U unique tokens; `flops` is None where it does not, and `winner` says who wins all over."""

    U: float
    flops: float | None
    winner: str
    low: float | None = None
    high: float | None = None
    # the most compute at which both were compared
    compared: float | None = None
    # the size of both models, where it is one
    N: float | None = None


def between(ar: Law, mdm: Law, U: float, low: float = RANGE[0], high: float = RANGE[1]) -> Crossing:
    """The compute at which the lowest losses of two laws are equal."""

    def gap(x: float) -> float:
        C = math.exp(x)
        return ar.allocate(C, U)[2] - mdm.allocate(C, U)[2]

    return _root(gap, U, low, high)


def _root(gap: Callable[[float], float], U: float, low: float, high: float) -> Crossing:
    """The first change from AR winning (gap < 0) to MDM winning in a range; looked for at 61 points, then bisected."""
    grid = np.linspace(math.log(low), math.log(high), 61)
    values = [gap(float(x)) for x in grid]
    for at in range(len(grid) - 1):
        if (values[at] < 0) != (values[at + 1] < 0):
            left, right = float(grid[at]), float(grid[at + 1])
            begins_below = values[at] < 0
            while right - left > 1e-10:
                middle = (left + right) / 2
                if (gap(middle) < 0) == begins_below:
                    left = middle
                else:
                    right = middle
            return Crossing(U, math.exp((left + right) / 2), "mdm" if begins_below else "ar", compared=high)
    return Crossing(U, None, "ar" if values[0] < 0 else "mdm", compared=high)


def empirical(points: Sequence[Point], U: float, bootstrap: int = 1000, seed: int = 0) -> Crossing:
    """The crossing of the running minima of measured losses over compute, with a 95 % interval over resampled runs and their errors."""
    mine = [point for point in points if abs(point.U / U - 1) < 0.02]
    losses = np.array([point.loss for point in mine])
    errors = np.nan_to_num(np.array([point.se for point in mine]))
    plain = _frontiers(mine, losses)
    random = np.random.Generator(np.random.Philox(seed))
    found = []
    for _ in range(bootstrap):
        chosen = random.integers(len(mine), size=len(mine))
        drawn = losses[chosen] + errors[chosen] * random.standard_normal(len(mine))
        crossing = _frontiers([mine[at] for at in chosen], drawn)
        if crossing is not None and crossing[0] is not None:
            found.append(crossing[0])
    if plain is None:
        return Crossing(U, None, "unknown")
    low, high = (float(value) for value in np.quantile(found, [0.025, 0.975])) if len(found) > bootstrap / 20 else (None, None)
    compared = min(max(point.C for point in mine if point.objective == objective) for objective in ("ar", "mdm"))
    return Crossing(U, plain[0], plain[1], low, high, compared)


def _frontiers(points: Sequence[Point], losses: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[float | None, str] | None:
    """(compute of the change, winner behind it) of the two running minima; None without points of both."""
    curves = {}
    for objective in ("ar", "mdm"):
        own = sorted((math.log(point.C), float(loss)) for point, loss in zip(points, losses) if point.objective == objective)
        if not own:
            return None
        x, y = np.array(own).T
        curves[objective] = x, np.minimum.accumulate(y)
    low = max(curve[0][0] for curve in curves.values())
    high = min(curve[0][-1] for curve in curves.values())
    if high <= low:
        return None
    grid = np.linspace(low, high, 401)
    gap = np.interp(grid, *curves["ar"]) - np.interp(grid, *curves["mdm"])
    changes = np.nonzero((gap[:-1] < 0) != (gap[1:] < 0))[0]
    if not len(changes):
        return None, "ar" if gap[0] < 0 else "mdm"
    return float(np.exp(grid[changes[-1]])), "mdm" if gap[changes[-1] + 1] >= 0 else "ar"


def at_the_end(points: Sequence[Point], U: float, bootstrap: int = 1000, seed: int = 0) -> list[Crossing]:
    """The crossing of the losses at the end of training, by model size, where runs of both objectives spend the same compute.

    Nothing is stopped early here: a run that overfits has lost what it had gained. The 95 % interval is over the losses' errors.
    """
    found = []
    mine = [point for point in points if abs(point.U / U - 1) < 0.02]
    for N in sorted({point.N for point in mine}):
        by_compute: dict[float, dict[str, Point]] = {}
        for point in mine:
            if point.N == N:
                by_compute.setdefault(float(f"{point.C:.3g}"), {})[point.objective] = point
        pairs = [pair for _, pair in sorted(by_compute.items()) if set(pair) == {"ar", "mdm"}]
        if len(pairs) < 2:
            continue
        x = np.log([pair["ar"].C for pair in pairs])
        gap = np.array([pair["ar"].loss - pair["mdm"].loss for pair in pairs])
        error = np.array([math.hypot(*np.nan_to_num([pair["ar"].se, pair["mdm"].se])) for pair in pairs])
        random = np.random.Generator(np.random.Philox(seed))
        drawn = [_change(x, gap + error * random.standard_normal(len(gap))) for _ in range(bootstrap)]
        known = [flops for flops in drawn if flops is not None]
        low, high = (float(value) for value in np.quantile(known, [0.025, 0.975])) if len(known) > bootstrap / 20 else (None, None)
        found.append(Crossing(U, _change(x, gap), "mdm" if gap[-1] >= 0 else "ar", low, high, float(np.exp(x[-1])), N))
    return found


def _change(x: np.ndarray[tuple[int, ...], np.dtype[np.float64]], gap: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float | None:
    """The last change of sign of a gap that is linear in log compute between its points."""
    changes = np.nonzero((gap[:-1] < 0) != (gap[1:] < 0))[0]
    if not len(changes):
        return None
    at = changes[-1]
    return float(np.exp(x[at] + (x[at + 1] - x[at]) * gap[at] / (gap[at] - gap[at + 1])))


def power_law(crossings: Sequence[Crossing]) -> tuple[float, float] | None:
    """(c0, c1) of log10 C = c0 + c1 log10 U through the crossings that exist; None with fewer than two."""
    known = np.array([(math.log10(crossing.U), math.log10(crossing.flops)) for crossing in crossings if crossing.flops])
    if len(known) < 2:
        return None
    slope, constant = np.polyfit(known[:, 0], known[:, 1], 1)
    return float(constant), float(slope)

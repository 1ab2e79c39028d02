"""Laws of single-epoch runs: the compute-optimal frontier (approach 1), iso-FLOP parabolas (2), the parametric fit (3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_core.errors import InputError
from lm_core.sinks import read
from mdm_scaling.fit.laws import Law
from mdm_scaling.fit.points import Point
from mdm_scaling.fit.solver import Floats, Model, Slopes, huber, minimise, newton

NAMES = ("a", "b", "e", "alpha", "beta")
STARTS: Floats = np.array(
    list(
        itertools.product((0, 5, 10, 15, 20, 25), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2))
    ),
    dtype=np.float64,
)
SAME_BUDGET = 1.02
SAME_MINIMUM = 1e-4


@dataclass(frozen=True)
class Free:
    """Which combinations of the five parameters vary: all = base + columns @ free."""

    base: Floats
    columns: Floats

    @classmethod
    def of(cls, tie: bool = False, fix: Mapping[str, float] | None = None) -> Free:
        """Five free parameters, less those that are fixed, with alpha = beta if tied."""
        fixed = dict(fix or {})
        if wrong := [name for name in fixed if name not in NAMES]:
            raise InputError(f"fix: {wrong[0]} is no parameter; use one of {', '.join(NAMES)}")
        if tie and {"alpha", "beta"} & fixed.keys():
            raise InputError("tie: alpha or beta is fixed, too; drop one of the two")
        columns = [np.eye(5)[at] for at, name in enumerate(NAMES) if name not in fixed and not (tie and name in ("alpha", "beta"))]
        if tie:
            columns.append(np.array([0.0, 0, 0, 1, 1]))
        base = np.array([fixed.get(name, 0.0) for name in NAMES])
        return cls(base, np.array(columns).T.reshape(5, -1))

    def box(self, bounds: Mapping[str, tuple[float, float]]) -> tuple[Floats, Floats]:
        """The lowest and highest free parameters; tied ones share the narrowest."""
        low, high = np.full(self.columns.shape[1], -np.inf), np.full(self.columns.shape[1], np.inf)
        for name, (least, most) in bounds.items():
            if name not in NAMES:
                raise InputError(f"bounds: {name} is no parameter; use one of {', '.join(NAMES)}")
            at = self.columns[NAMES.index(name)] == 1
            if not at.any():
                raise InputError(f"bounds: {name} is fixed, too; drop one of the two")
            low[at], high[at] = np.maximum(low[at], least), np.minimum(high[at], most)
            if not (low[at] < high[at]).all():
                raise InputError(f"bounds: {name} has no room between {least:g} and {most:g}; give a lower and a higher value")
        return low, high

    def whole(self, free: Floats) -> Floats:
        return self.base + free @ self.columns.T

    def starts(self, whole: Floats) -> Floats:
        """The free parts of full parameter vectors, without repetition."""
        inverse = np.linalg.pinv(self.columns)
        return np.unique((whole - self.base) @ inverse.T, axis=0)


def model(points: Sequence[Point], free: Free) -> Model:
    """log L of the points under parameters, and its derivatives."""
    log_N, log_D = np.log([point.N for point in points]), np.log([point.D for point in points])

    def predict(theta: Floats) -> tuple[Floats, Slopes]:
        a, b, e, alpha, beta = free.whole(theta).T[:, :, None]
        exponents = np.stack([a - alpha * log_N, b - beta * log_D, np.broadcast_to(e, (len(theta), len(points)))])
        top = exponents.max(0)
        exponents -= top
        shares = np.exp(exponents, out=exponents)
        total = shares.sum(0)
        shares /= total
        return top + np.log(total), _Shares(shares, log_N, log_D, free.columns)

    return predict


class _Shares:
    """The derivatives of log L (S x n x k) as the shares of its three terms (3 x S x n), from which their sums follow by products of matrices.

    d log L / d(a, b, e, alpha, beta) = (s1, s2, s3, -s1 ln N, -s2 ln D).
    """

    def __init__(self, shares: Floats, log_N: Floats, log_D: Floats, columns: Floats) -> None:
        self.shares, self.log_N, self.log_D, self.columns = shares, log_N, log_D, columns

    def __getitem__(self, rows: Any) -> _Shares:
        return _Shares(self.shares[:, rows], self.log_N, self.log_D, self.columns)

    def put(self, rows: Any, other: Any) -> None:
        self.shares[:, rows] = other.shares

    def dense(self) -> Floats:
        s1, s2, s3 = self.shares
        found: Floats = np.stack([s1, s2, s3, -s1 * self.log_N, -s2 * self.log_D], axis=-1) @ self.columns
        return found

    def normal(self, weight: Floats, residual: Floats) -> tuple[Floats, Floats]:
        (s1, s2, s3), x, y = self.shares, self.log_N, self.log_D
        one = np.ones_like(x)
        w1, w2, w3 = weight * s1, weight * s2, weight * s3
        curvature, gradient = np.empty((len(weight), 5, 5)), np.empty((len(weight), 5))
        # parameters of one term, with the factor that each has beside the term's share
        both = ((0, one), (3, -x)), ((1, one), (4, -y)), ((2, one),)
        for first, second, product in (
            (0, 0, w1 * s1),
            (0, 1, w1 * s2),
            (0, 2, w1 * s3),
            (1, 1, w2 * s2),
            (1, 2, w2 * s3),
            (2, 2, w3 * s3),
        ):
            pairs = [(i, j, f * g) for i, f in both[first] for j, g in both[second]]
            sums = product @ np.stack([factor for _, _, factor in pairs], axis=1)
            for (i, j, _), value in zip(pairs, sums.T):
                curvature[:, i, j] = curvature[:, j, i] = value
        for term, part in enumerate((w1, w2, w3)):
            sums = (part * residual) @ np.stack([factor for _, factor in both[term]], axis=1)
            gradient[:, [i for i, _ in both[term]]] = sums
        return self.columns.T @ curvature @ self.columns, gradient @ self.columns


def _terms(points: Sequence[Point]) -> Floats:
    """Derivatives (n x 3 x 5) of the three exponents a - alpha ln N, b - beta ln D and e by the parameters."""
    terms = np.zeros((len(points), 3, 5))
    for row, point in enumerate(points):
        terms[row, 0, 0], terms[row, 0, 3] = 1, -math.log(point.N)
        terms[row, 1, 1], terms[row, 1, 4] = 1, -math.log(point.D)
        terms[row, 2, 2] = 1
    return terms


def _softmax(theta: Floats, terms: Floats) -> tuple[Floats, Floats]:
    """Share of each term in the loss (S x n x 3) and the log of the loss (S x n)."""
    exponents = np.einsum("njk,sk->snj", terms, theta)
    top = exponents.max(2, keepdims=True)
    powers = np.exp(exponents - top)
    total = powers.sum(2, keepdims=True)
    return powers / total, (top + np.log(total))[:, :, 0]


def require_enough(points: Sequence[Point], needed: int) -> None:
    """Raise InputError for data that cannot identify a law."""
    if len(points) <= needed:
        raise InputError(f"runs: {len(points)} points are too few for {needed} parameters; add runs, or --fix or --tie some")
    for name in ("N", "D"):
        if len({getattr(point, name) for point in points}) < 2:
            raise InputError(f"runs: all points have the same {name}; a law needs at least two")


def parametric(
    points: Sequence[Point],
    *,
    objective: str,
    name: str = "fit",
    tie: bool = False,
    fix: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Law:
    """Approach 3: the lowest sum of Huber losses of log L over 4500 starts, solved together; the best one polished.

    What lies at one of the `bounds` in the end is named in `at_bounds`, and stays there in the polish.
    """
    free = Free.of(tie, fix)
    require_enough(points, free.columns.shape[1])
    target = np.log([point.loss for point in points])
    predict = model(points, free)
    box = free.box(bounds) if bounds else None
    starts = free.starts(STARTS)
    solved = minimise(predict, starts if box is None else np.unique(starts.clip(*box), axis=0), target, box=box)
    best = int(np.argmin(solved.objective))
    pinned = np.zeros(free.columns.shape[1], dtype=bool) if box is None else (solved.parameters[best] == box).any(0)
    theta = newton(_derivatives(points, free, target, pinned), solved.parameters[best])
    theta = theta if box is None else theta.clip(*box)
    objective_value = float(huber(predict(theta[None])[0] - target).sum())
    # sums of the same numbers may differ in the last digits
    if not objective_value <= solved.objective[best] * (1 + 1e-9) + 1e-25:
        theta, objective_value = solved.parameters[best], float(solved.objective[best])
    whole = free.whole(theta[None])[0]
    limit = objective_value * (1 + SAME_MINIMUM) + 1e-15
    about: dict[str, Any] = {
        "estimator": "approach 3",
        **({"bounds": {name: list(pair) for name, pair in bounds.items()}} if bounds else {}),
        **({"at_bounds": [name for at, name in enumerate(NAMES) if free.columns[at][pinned].any()]} if pinned.any() else {}),
        "n_points": len(points),
        "objective_value": objective_value,
        "starts": len(solved.objective),
        "share_of_starts_at_best": float((solved.objective <= limit).mean()),
        "other_minima": rivals(solved.parameters, solved.objective, free, limit),
        "condition_number": float(np.linalg.cond(predict(theta[None])[1].dense()[0])),
        "r2": r2(predict(theta[None])[0][0], target),
        "intervals": {},
    }
    if bootstrap:
        samples = resampled(predict, theta, target, bootstrap, seed, box)
        about["intervals"] = intervals(free.whole(samples))
        left_out = minimise(predict, np.repeat(theta[None], len(points), 0), target, counts=1 - np.eye(len(points)), box=box)
        moved = np.abs(free.whole(left_out.parameters) - whole)
        about["leave_one_out"] = {parameter: float(moved[:, at].max()) for at, parameter in enumerate(NAMES)}
    a, b, e, alpha, beta = map(float, whole)
    return Law(name, a, b, e, alpha, beta, objective=objective, about=about)


def _derivatives(points: Sequence[Point], free: Free, target: Floats, pinned: NDArray[np.bool_], delta: float = 1e-3) -> Any:
    """Gradient and Hessian of the sum of Huber losses, exact; free parameters that are `pinned` do not move."""
    terms = _terms(points)

    def at(theta: Floats) -> tuple[Floats, Floats]:
        share, log_loss = _softmax(free.whole(theta[None]), terms)
        residual = log_loss[0] - target
        slope = np.einsum("nj,njk->nk", share[0], terms)
        psi = np.clip(residual, -delta, delta)
        second = np.einsum("nj,njk,njl->nkl", share[0], terms, terms) - slope[:, :, None] * slope[:, None, :]
        curvature = np.einsum("n,nk,nl->kl", (np.abs(residual) <= delta).astype(float), slope, slope) + np.einsum("n,nkl->kl", psi, second)
        gradient, hessian = free.columns.T @ (psi @ slope), free.columns.T @ curvature @ free.columns
        gradient[pinned], hessian[pinned], hessian[:, pinned] = 0, 0, 0
        return gradient, hessian

    return at


def rivals(parameters: Floats, objective: Floats, free: Free, limit: float, most: int = 5) -> list[dict[str, float]]:
    """Other minima, lowest first: those whose objective differs by more than 0.01 % from all before."""
    found: list[dict[str, float]] = []
    last = limit
    for at in np.argsort(objective):
        if objective[at] > last and np.isfinite(objective[at]):
            found.append({"objective_value": float(objective[at]), **dict(zip(NAMES, map(float, free.whole(parameters[at][None])[0])))})
            last = objective[at] * (1 + SAME_MINIMUM)
        if len(found) == most:
            break
    return found


def resampled(predict: Model, theta: Floats, target: Floats, count: int, seed: int, box: tuple[Floats, Floats] | None = None) -> Floats:
    """Parameters of fits to `count` resamples of the points, all solved together from the fit to all of them."""
    random = np.random.Generator(np.random.Philox(seed))
    counts = random.multinomial(len(target), np.full(len(target), 1 / len(target)), size=count).astype(np.float64)
    return minimise(predict, np.repeat(theta[None], count, 0), target, counts=counts, steps=100, box=box).parameters


def intervals(samples: Floats, names: Sequence[str] = NAMES) -> dict[str, list[float]]:
    """95 % intervals by name."""
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return {name: [float(low[at]), float(high[at])] for at, name in enumerate(names)}


def r2(prediction: Floats, target: Floats) -> float:
    """Share of the variance of the log loss that a law explains."""
    return 1 - float(((prediction - target) ** 2).sum() / ((target - target.mean()) ** 2).sum())


# --- approaches 1 and 2 ---


@dataclass(frozen=True)
class Parabola:
    """Runs of one budget and the quadratic through their losses; `N` is its vertex, or None with the reason in `status`."""

    C: float
    points: tuple[Point, ...]
    coefficients: tuple[float, float, float] | None
    N: float | None
    status: str


def budgets(points: Sequence[Point]) -> list[list[Point]]:
    """Points by budget; budgets within 2 % of the lowest are one."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.C):
        if groups and point.C <= groups[-1][0].C * SAME_BUDGET:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def parabolas(points: Sequence[Point]) -> list[Parabola]:
    """Approach 2: loss against log10 N at each budget."""
    return [_parabola(group) for group in budgets(points)]


def _parabola(group: Sequence[Point]) -> Parabola:
    C = float(np.exp(np.mean([math.log(point.C) for point in group])))
    x = np.log10([point.N for point in group])
    if len({point.N for point in group}) < 3:
        return Parabola(C, tuple(group), None, None, "fewer than three sizes")
    c2, c1, c0 = map(float, np.polyfit(x, [point.loss for point in group], 2))
    if c2 <= 0:
        return Parabola(C, tuple(group), (c2, c1, c0), None, "unbracketed: no minimum")
    vertex = -c1 / (2 * c2)
    if not x.min() <= vertex <= x.max():
        return Parabola(C, tuple(group), (c2, c1, c0), None, "unbracketed: the minimum lies outside the sizes")
    return Parabola(C, tuple(group), (c2, c1, c0), 10**vertex, "ok")


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(factor, exponent) of y = factor x^exponent by least squares of logarithms."""
    exponent, constant = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(constant)), float(exponent)


def frontier(points: Sequence[Point], count: int = 1500) -> list[tuple[float, float, float, float]]:
    """Approach 1: (C, N, D, loss) of the run that is lowest at each of `count` log-spaced budgets, from the curves of the runs."""
    curves = [curve for point in points if (curve := _curve(point)) is not None]
    if not curves:
        raise InputError("runs: no run has a metrics.jsonl with two evaluations; approach 1 follows the curves of runs")
    low, high = min(curve[0][0] for curve in curves), max(curve[0][-1] for curve in curves)
    found = []
    for C in np.geomspace(low, high, count):
        losses = [(float(np.interp(math.log(C), np.log(x), y)), N) for x, y, N in curves if x[0] <= C <= x[-1]]
        if losses:
            loss, N = min(losses)
            found.append((float(C), N, float(C / 6 / N), loss))
    return found


def _curve(point: Point) -> tuple[NDArray[Any], NDArray[Any], float] | None:
    """(FLOPs, held-out loss, N) over the evaluations of a run."""
    pairs = []
    last = 0
    for record in read(Path(point.folder) / "metrics.jsonl") if point.folder else []:
        losses = [value for name, value in record.items() if name.startswith("eval/") and name.endswith("/loss")]
        if losses and record["tokens"] > last:
            last = int(record["tokens"])
            pairs.append((6 * point.N * last, sum(losses) / len(losses)))
    if len(pairs) < 2:
        return None
    x, y = zip(*pairs)
    return np.array(x), np.array(y), point.N

"""Losses as functions of parameters, tokens and repetition.

N parameters, D tokens, U unique tokens, C = 6 N D FLOPs; E = exp(e), A = exp(a), B = exp(b).

    L = E + A / N'^alpha + B / D'^beta,   D' = U + U K_D (1 - exp(-R_D / K_D)),   N' = U_N + U_N K_N (1 - exp(-R_N / K_N))

with R_D = D / U - 1, R_N = N / U_N - 1 and U_N the parameters that U tokens are the optimum for. A repeated token is worth
exp(-R / K_D) of a new one, so K_D is a 1/e constant (half the value at 0.693 K_D).

Sources: Hoffmann et al. 2022 (chinchilla); Besiroglu et al. 2024 (epoch2024); Muennighoff et al. 2023 (datablations-c4).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm_core.errors import InputError

Floats = NDArray[np.float64]
# largest logarithm that a size or an amount gets: a fit may pass through constants whose powers no float holds
MOST = 600.0


@dataclass(frozen=True)
class Law:
    """A fitted or published law; infinite decay constants mean that repeated data is as good as new data."""

    name: str
    a: float
    b: float
    e: float
    alpha: float
    beta: float
    K_D: float = math.inf
    K_N: float = math.inf
    objective: str = "ar"
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def factor(self) -> float:
        """Gf = (alpha A / (beta B))^(1 / (alpha + beta))."""
        return math.exp(min(max(self.log_factor, -MOST), MOST))

    @property
    def log_factor(self) -> float:
        return (math.log(self.alpha / self.beta) + self.a - self.b) / (self.alpha + self.beta)

    def loss(self, N: ArrayLike, D: ArrayLike, U: ArrayLike | None = None) -> Floats:
        """The loss of N parameters after D tokens of which U are unique (default: all).

        >>> round(float(BUILT_IN["datablations-c4"].loss(6.34e9, 242e9, 25e9)), 10)
        2.225644089
        """
        N, D = np.asarray(N, dtype=np.float64), np.asarray(D, dtype=np.float64)
        if U is not None:
            unique = np.minimum(np.asarray(U, dtype=np.float64), D)
            D = _worth(D, unique, self.K_D)
            log_best = (np.log(unique) + self.log_factor) * self.beta / self.alpha + self.log_factor
            N = _worth(N, np.minimum(N, np.exp(np.clip(log_best, -MOST, MOST))), self.K_N)
        # a loss beyond all floats is infinite
        with np.errstate(over="ignore"):
            result: Floats = math.exp(self.e) + np.exp(self.a - self.alpha * np.log(N)) + np.exp(self.b - self.beta * np.log(D))
        return result

    def optimum(self, C: float) -> tuple[float, float]:
        """(N, D) of the lowest loss at C FLOPs when all data is new."""
        total = self.alpha + self.beta
        return self.factor * (C / 6) ** (self.beta / total), (C / 6) ** (self.alpha / total) / self.factor

    def allocate(self, C: float, U: float | None = None) -> tuple[float, float, float]:
        """(N, D, loss) of the lowest loss at C FLOPs from U unique tokens."""
        start = math.log(self.optimum(C)[0])

        def loss(x: float) -> float:
            N = math.exp(x)
            return float(self.loss(N, C / 6 / N, U))

        x = minimum(loss, start - 12, start + 12)
        N = math.exp(x)
        return N, C / 6 / N, loss(x)

    def to_json(self) -> str:
        """The law as a file holds it; an infinite constant is null."""
        values = asdict(self)
        about = values.pop("about")
        return json.dumps({name: None if value == math.inf else value for name, value in values.items()} | dict(about), indent=1) + "\n"


def power(log: float) -> str:
    """e^log in three digits, also where no float holds it.

    >>> power(1.0), power(-1000.0), power(1000.0)
    ('2.72', '1e-434', '1e+434')
    """
    return f"{math.exp(log):.3g}" if abs(log) < MOST else f"1e{log / math.log(10):+.0f}"


def _worth(amount: Floats, unique: Floats, decay: float) -> Floats:
    """What `amount` is worth when only `unique` of it is new."""
    repeats = amount / unique - 1
    if math.isinf(decay):
        return amount
    result: Floats = unique - unique * decay * np.expm1(-repeats / decay)
    return result


def minimum(function: Callable[[float], float], low: float, high: float, points: int = 97) -> float:
    """Where a function is lowest in an interval: the lowest of some points, then golden section between its neighbours.

    >>> round(minimum(lambda x: (x - 1.5) ** 2, -10, 10), 6)
    1.5
    """
    grid = np.linspace(low, high, points)
    best = int(np.argmin([function(float(x)) for x in grid]))
    left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, points - 1)])
    ratio = (math.sqrt(5) - 1) / 2
    first, second = right - ratio * (right - left), left + ratio * (right - left)
    at_first, at_second = function(first), function(second)
    while right - left > 1e-10:
        if at_first <= at_second:
            right, second, at_second = second, first, at_first
            first = right - ratio * (right - left)
            at_first = function(first)
        else:
            left, first, at_first = first, second, at_second
            second = left + ratio * (right - left)
            at_second = function(second)
    return (left + right) / 2


BUILT_IN: Mapping[str, Law] = MappingProxyType(
    {
        law.name: law
        for law in (
            Law("chinchilla", math.log(406.4), math.log(410.7), math.log(1.69), 0.34, 0.28),
            Law("epoch2024", math.log(482.01), math.log(2085.43), math.log(1.8172), 0.3478, 0.3658),
            Law("datablations-c4", 6.255414, 7.3049974, 0.6254804, 0.3526596, 0.3526596, 15.387756, 5.309743),
        )
    }
)


def read_law(name: str) -> Law:
    """A built-in law by its name, or one from a file that `fit` wrote. Raises InputError for anything else."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        values = json.loads(Path(name).read_text())
        numbers = {key: float(values[key]) for key in ("a", "b", "e", "alpha", "beta")}
        decay = {key: math.inf if values.get(key) is None else float(values[key]) for key in ("K_D", "K_N")}
        known = {*numbers, *decay, "name", "objective"}
        about = {key: value for key, value in values.items() if key not in known}
        return Law(str(values["name"]), **numbers, **decay, objective=str(values["objective"]), about=about)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"law: {name} is neither a file of `mdm-scaling fit` ({error!r}) nor one of {', '.join(BUILT_IN)}") from None


# Critical compute of Prabhudesai et al. 2025: C = 2.12 * 10^1.956 * U^2.174 with U in tokens
PUBLISHED_CROSSOVER = (math.log10(2.12) + 1.956, 2.174)


def published_critical_flops(unique_tokens: float) -> float:
    """Compute beyond which masked diffusion was found to win, for so many unique tokens.

    >>> f"{published_critical_flops(1e8):.2e}"
    '4.72e+19'
    """
    constant, slope = PUBLISHED_CROSSOVER
    return float(10 ** (constant + slope * math.log10(unique_tokens)))

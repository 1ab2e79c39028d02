"""Learning rates as pure functions of the fraction of the budget that is spent: nothing to save, nothing to step twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from lm_core.errors import ConfigError

if TYPE_CHECKING:
    from lm_core.options import OptimOptions
    from lm_core.progress import Budget, Progress, Size

# (at, floor, warmup) -> factor of the peak rate. `at` runs from 0 at the end of warm-up to 1 at the end of the
# run, `floor` is the final rate over the peak, `warmup` the fraction of the run that warm-up takes.
Shape = Callable[[float, float, float], float]


def constant(at: float, floor: float, warmup: float = 0.0) -> float:
    """The peak rate; ends at `floor` only by a cool-down."""
    return 1.0


def linear(at: float, floor: float, warmup: float = 0.0) -> float:
    """
    >>> linear(0.5, floor=0.1)
    0.55
    """
    return floor + (1 - floor) * (1 - at)


def cosine(at: float, floor: float, warmup: float = 0.0) -> float:
    """
    >>> cosine(0.5, floor=0.0)
    0.5
    """
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * at))


def exp(at: float, floor: float, warmup: float = 0.0) -> float:
    """The same ratio from step to step; `floor` must be above 0.

    >>> exp(0.5, floor=0.25)
    0.5
    """
    if floor <= 0:
        raise ConfigError(f"min_lr_ratio: {floor:g} is never reached by an exponential; use a value above 0, or --schedule cosine")
    return float(floor**at)


def inverse_sqrt(at: float, floor: float, warmup: float = 0.0) -> float:
    """sqrt(w / x) for a warm-up that ends at w, at fraction x of the run, but at least `floor`.

    >>> inverse_sqrt(1.0, floor=0.0, warmup=0.25)
    0.5
    """
    if warmup <= 0:
        raise ConfigError("warmup: 0 gives inverse-sqrt no length to decay by; set --warmup, or use --schedule cosine")
    return max(floor, math.sqrt(warmup / (warmup + at * (1 - warmup))))


# A package adds a shape by passing its own function to `factor` or `learning_rate`.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {"constant": constant, "linear": linear, "cosine": cosine, "exp": exp, "inverse-sqrt": inverse_sqrt}
)


def factor(fraction: float, shape: Shape, *, warmup: float = 0.0, cooldown: float = 0.0, floor: float = 0.0) -> float:
    """The learning rate over its peak at `fraction` of the run, the step about to run included.

    Warm-up is linear and reaches the peak at `warmup`; cool-down is linear, over the last `cooldown`
    of the run, from the rate that the shape has there to `floor`.

    >>> [factor(step / 4, linear, warmup=0.5) for step in (1, 2, 3, 4)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if fraction < warmup:
        return fraction / warmup

    def shaped(x: float) -> float:
        return shape((x - warmup) / (1 - warmup) if x < 1 else 1.0, floor, warmup)

    start = 1 - cooldown
    if cooldown == 0 or fraction <= start:
        return shaped(fraction)
    left = (1 - fraction) / cooldown
    return floor + (shaped(start) - floor) * left


def fraction_of_run(length: float, budget: Budget) -> float:
    """A length written like `--warmup`: below 1 a fraction already, else in the unit of the budget."""
    return length if length < 1 else length / budget.limits[budget.unit]


def learning_rate(
    options: OptimOptions, budget: Budget, progress: Progress, size: Size, epoch_samples: int | None = None, shape: Shape | None = None
) -> float:
    """The rate of the step about to run, which has `size`; `shape` replaces the one that `options` name.

    Raises ConfigError when warm-up and cool-down do not fit into the budget, or a shape cannot work with the options.
    """
    warmup = fraction_of_run(options.warmup, budget)
    cooldown = fraction_of_run(options.cooldown, budget)
    if warmup + cooldown > 1:
        raise ConfigError(
            f"warmup: {options.warmup:g} and a cool-down of {options.cooldown:g} do not fit into the budget ({budget}); shorten one of them"
        )
    shape = shape or SHAPES[options.schedule]
    # a shape that cannot work with these options says so at the first step, not at the end of warm-up
    shape(1.0, options.min_lr_ratio, warmup)
    return options.lr * factor(
        budget.fraction(progress, size, epoch_samples),
        shape,
        warmup=warmup,
        cooldown=cooldown,
        floor=options.min_lr_ratio,
    )

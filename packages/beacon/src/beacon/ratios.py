"""Which compression ratio each compaction gets: draws with an address, the same on every rank, row and micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from beacon.config import BeaconConfig
from lm_core import counter
from lm_core.errors import ConfigError

# the address of draws outside training, where there is no step
INFERENCE = 2**64 - 1


@dataclass(frozen=True)
class Rule:
    """The ratio of every compaction of one row: a list whose last entry stays, a list that repeats, or draws from a list.

    >>> rule = Rule("list", (4, 2))
    >>> rule(0), rule(1), rule(7)
    (4, 2, 2)
    """

    kind: Literal["list", "cycle", "draw"]
    ratios: tuple[int, ...]
    seed: int = 0
    step: int = INFERENCE

    def __call__(self, i: int) -> int:
        if self.kind == "cycle":
            return self.ratios[i % len(self.ratios)]
        if self.kind == "draw":
            return self.ratios[int(_uniform(self.seed, self.step, i) * len(self.ratios))]
        return self.ratios[min(i, len(self.ratios) - 1)]


def training_ratios(config: BeaconConfig, seed: int, step: int, length: int, positions: int) -> list[int]:
    """Ratios of all compactions of a row of `length` tokens at one training step.

    The first 0 of the step stands; later ones, and a 0 at the row's last compaction, give way to a second draw among
    the ratios above 0, since such a window would teach nothing.
    """
    count = config.compactions(length, training=True)
    rule = choose(config, config.ratio_mix, seed, length, length, positions, step)
    ratios = [rule(i) for i in range(count)]
    above = [ratio for ratio in config.usable() if ratio > 0]
    if not above:
        raise ConfigError(f"ratio: training needs a ratio above 0 that divides the stride ({config.stride}), not only {config.ratio}")
    zeros = [i for i, ratio in enumerate(ratios) if ratio == 0]
    for i in zeros:
        if i != zeros[0] or i == count - 1:
            ratios[i] = above[int(_uniform(seed, step, i, second=True) * len(above))]
    return ratios


def _uniform(seed: int, step: int, compaction: int, second: bool = False) -> float:
    """Draws of a step: a coin, the choice of the whole step, and two draws per compaction."""
    place = 2 + 2 * compaction + int(second)
    return float(counter.uniform(seed, "ratio", step, place + 1)[place])


def choose(config: BeaconConfig, mix: str, seed: int | None, length: int, expected: int, positions: int, step: int = INFERENCE) -> Rule:
    """The rule of a row of which `length` tokens are known and `expected` will come in all."""
    usable = tuple(config.usable())
    if len(usable) == 1:
        return Rule("list", usable)
    if mix == "sequence":
        return Rule("cycle", usable)
    if mix.startswith("adapt-"):
        return Rule("list", (adapted(config, int(mix.removeprefix("adapt-")), length, expected, positions),))
    if seed is None:
        raise ConfigError(f"inference_ratio_mix: {mix} draws at random; give a seed, or use sequence or adapt-1024")
    coin, whole = (float(u) for u in counter.uniform(seed, "ratio", step, 2))
    if mix == "instance-random" or (mix == "mix-random" and coin < 0.5):
        return Rule("list", (usable[int(whole * len(usable))],))
    return Rule("draw", usable, seed, step)


def fitting(config: BeaconConfig, rule: Rule, expected: int, budget: int) -> Rule:
    """`rule`, or the smallest single ratio with which the memory of `expected` tokens keeps to `budget` entries.

    Raises ConfigError when no ratio does.
    """
    count = config.compactions(expected)
    if config.sink_size + sum(config.entries(rule(i)) for i in range(count)) <= budget:
        return rule
    for ratio in sorted(set(config.usable()) - {0}):
        if config.sink_size + count * config.entries(ratio) <= budget:
            return Rule("list", (ratio,))
    raise ConfigError(
        f"memory_budget: no ratio of {config.ratio} fits {expected} tokens into {budget} entries; use a larger budget or on_budget evict"
    )


def adapted(config: BeaconConfig, extra: int, length: int, expected: int, positions: int) -> int:
    """The smallest ratio whose memory holds `length + extra` tokens and whose capacity reaches `expected`; else the largest.

    >>> cfg = BeaconConfig(window=8, stride=8, ratio=[2, 4, 8])
    >>> [adapted(cfg, 0, n, n, 40) for n in (20, 80, 200, 10_000)]
    [2, 4, 8, 8]
    """
    choices = sorted(set(config.usable()))
    for ratio in choices:
        room = positions if ratio == 0 else (positions - config.window) * ratio + config.window
        if room >= length + extra and config.capacity(ratio, positions) >= expected:
            return ratio
    return choices[-1]

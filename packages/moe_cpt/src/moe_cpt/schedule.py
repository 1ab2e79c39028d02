"""What changes as training goes on: the selected experts, and the learning rate. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm_core.errors import ConfigError


@dataclass(frozen=True)
class Selection:
    """K experts and the factor of their output, from a step on."""

    step: int
    num_selects: int
    scale: float


def parse_k_schedule(text: str) -> list[Selection]:
    """The entries of --k-schedule, by step. Raises ConfigError for anything else.

    >>> parse_k_schedule("0:16,1000:4:3.5")
    [Selection(step=0, num_selects=16, scale=16.0), Selection(step=1000, num_selects=4, scale=3.5)]
    """
    found = []
    for entry in text.split(","):
        parts = entry.strip().split(":")
        try:
            step, selects, scale = int(parts[0]), int(parts[1]), float(parts[2] if len(parts) == 3 else parts[1])
        except (ValueError, IndexError):
            raise ConfigError(f"k_schedule: {entry.strip()!r} is not STEP:K or STEP:K:FACTOR; write for example 0:16,1000:8") from None
        if len(parts) > 3 or selects < 1 or not scale > 0:
            raise ConfigError(f"k_schedule: {entry.strip()!r} needs at least one expert and a factor above 0; write for example 1000:8")
        found.append(Selection(step, selects, scale))
    steps = [entry.step for entry in found]
    if steps[0] != 0 or sorted(set(steps)) != steps:
        raise ConfigError(f"k_schedule: steps {', '.join(map(str, steps))} do not rise from 0; begin with 0:K")
    return found


def clipped_cosine(at: float, floor: float, warmup: float = 0.0) -> float:
    """Half a cosine from 1 to 0, never below `floor`; 0.1 is reached at 0.7952.

    >>> clipped_cosine(0.5, floor=0.1), clipped_cosine(0.8, floor=0.1)
    (0.5, 0.1)
    """
    return max(floor, 0.5 * (1 + math.cos(math.pi * at)))

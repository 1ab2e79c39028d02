"""From a budget to a run, in exact integer arithmetic. Free of torch."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from lm_core.errors import ConfigError


def tokens_for(flops: float, count: int) -> int:
    """D = floor(C / (6 N)), exact whatever the size of C.

    >>> tokens_for(1e19, 217_503_104)
    7662725892
    """
    return int(Fraction(flops) // (6 * count))


def warmup(samples: int) -> int:
    """Warm-up in samples: a hundredth of the run, at least 100, at most half of it.

    >>> warmup(160), warmup(1_000_000)
    (80, 10000)
    """
    return min(max(round(samples / 100), 100), samples // 2)


def shares(split: str) -> tuple[float, float, float]:
    """The three shares of `--split`, which sum to 1.

    >>> shares("900,100,0")
    (0.9, 0.1, 0.0)
    """
    try:
        numbers = [float(part) for part in split.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers, default=-1) < 0 or numbers[0] <= 0:
        raise ConfigError(f"split: {split!r} is not three shares of which the first is above 0; write for example 969,30,1")
    total = sum(numbers)
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def bounds(count: int, split: str) -> tuple[int, int, int]:
    """Ends of the three parts of `count` documents; rounding takes none away.

    >>> bounds(100, "969,30,1")
    (97, 100, 100)
    """
    first, second, _ = shares(split)
    one = round(count * first)
    return one, max(one, round(count * (first + second))), count


@lru_cache
def count_of(model: str) -> int:
    """Parameters of a model that brings its own sizes: nominal, or exact where keys and values have fewer heads."""
    from mdm_scaling.model import checkpoint_folder, shape_of_folder

    folder = Path(checkpoint_folder(model)).expanduser()
    if (folder / "config.json").is_file() and (shape := shape_of_folder(folder)).key_value_heads == shape.heads:
        return shape.nominal
    import torch

    from lm_core.models import load_model

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in load_model(model).parameters())

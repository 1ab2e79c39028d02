"""From a budget to a run, in exact integer arithmetic. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
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


def batches(start: int, increment: int, samples: int, full: int) -> list[int]:
    """Sequences of the updates before the batch is full: it grows by `increment`, each size for an equal share of `samples`.

    >>> batches(2, 2, 12, 8)
    [2, 2, 4, 6]
    """
    growths = (full - start) // increment
    sizes, done = [], 0
    while (size := start + increment * (done * growths // samples)) < full:
        sizes.append(size)
        done += size
    return sizes


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


# Mean tokens of a document with GPT-2's tokenizer
TOKENS_PER_DOC = {"c4": 478.625834583, "slimpajama": 1058.057342, "oscar": 1312.0951072}
# Names under which published corpora are known; the first one is a historical truncation
ALIASES = {7.6627e9: "7B6", 13.486e9: "13B5", 11.994e9: "12B", 22.988e9: "23B", 23.801e9: "23B8", 39.979e9: "40B"}
# (FLOPs, objective) -> the compute-optimal size that was published
OPTIMAL = {
    (1e19, "ar"): "217M", (1e19, "mdm"): "117M", (3e19, "ar"): "425M", (3e19, "mdm"): "217M", (1e20, "ar"): "724M", (1e20, "mdm"): "425M",
}  # fmt: skip


def optimal(flops: float, objective: str) -> str:
    """The published compute-optimal size. Raises ConfigError at a budget that has none."""
    if (flops, objective) not in OPTIMAL:
        known = ", ".join(f"{budget:g}" for budget in sorted({budget for budget, _ in OPTIMAL}))
        raise ConfigError(f"preset: the optimal size is known at {known} FLOPs, not at {flops:g}; name a preset, or ask `plan advise`")
    return OPTIMAL[flops, objective]


def tokens_per_doc(text: str) -> float:
    """The constant of a corpus, or a number."""
    try:
        value = TOKENS_PER_DOC[text] if text in TOKENS_PER_DOC else float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ConfigError(f"tokens_per_doc: {text!r} is neither {', '.join(TOKENS_PER_DOC)} nor a number above 0")
    return value


def documents(tokens: float, per_document: float) -> int:
    """How many documents hold so many tokens.

    >>> documents(100e6, TOKENS_PER_DOC["c4"]), documents(100e6, TOKENS_PER_DOC["slimpajama"])
    (208931, 94513)
    """
    return round(tokens / per_document)


def size_name(tokens: float) -> str:
    """A number of tokens as names of corpora have it: 13B5, 12B, 100m; published corpora by their published names.

    >>> size_name(13_485_740_760), size_name(7_662_725_892), size_name(2.26e9), size_name(100e6)
    ('13B5', '7B6', '2B3', '100m')
    """
    for total, name in ALIASES.items():
        if abs(tokens / total - 1) <= 0.005:
            return name
    if tokens < 1e9:
        return f"{round(tokens / 1e6)}m"
    whole, tenth = divmod(round(tokens / 1e8), 10)
    return f"{whole}B{tenth or ''}"


def corpus_name(corpus: str, tokens: float, epochs: float = 1) -> str:
    """Name of the file with the unique tokens of a run.

    >>> corpus_name("c4", 1.9e9, 4)
    'c4_1B9_4ep'
    """
    return f"{corpus}_{size_name(tokens)}" + (f"_{epochs:g}ep" if epochs > 1 else "")


@dataclass(frozen=True)
class Plan:
    """One run, before it exists."""

    objective: str
    preset: str
    count: int
    flops: float
    tokens: int
    samples: int
    steps: int
    warmup_samples: int
    unique_tokens: int
    epochs: float
    documents: int
    name: str
    advice: tuple[str, ...]


def plan(
    objective: str, preset: str, count: int, *, flops: float | None = None, unique_tokens: int | None = None, epochs: float = 1, length: int = 2048,
    batch: int = 256, corpus: str = "c4",
) -> Plan:  # fmt: skip
    """The run of a model with `count` parameters: from a budget in FLOPs, or from unique tokens and epochs.

    >>> made = plan("ar", "217M", 217_503_104, flops=1e19)
    >>> made.tokens, made.samples, made.steps, made.name
    (7662725892, 3741565, 14615, 'c4_7B6')
    """
    if flops is not None:
        tokens = tokens_for(flops, count)
        samples = round(Fraction(tokens, length))
        unique = unique_tokens if unique_tokens is not None else int(tokens // Fraction(epochs))
        epochs = tokens / unique if unique_tokens is not None else epochs
    elif unique_tokens is not None:
        samples = int(unique_tokens * Fraction(epochs) / length)
        tokens, unique = samples * length, unique_tokens
        flops = 6.0 * count * tokens
    else:
        raise ConfigError("flops: no budget; give --flops, or --unique-tokens and --epochs")
    if samples < batch:
        raise ConfigError(
            f"flops: {flops:g} are {samples} samples of {length} tokens, less than one update of {batch}; raise it, or lower the batch"
        )
    advice = []
    if count > 4e9 and batch < 512:
        advice.append("above 4B parameters use a global batch of at least 512")
    if count > 1e9:
        advice.append("above 1B parameters use --zero-stage 1 or more, with offload")
    return Plan(
        objective, preset, count, float(flops), tokens, samples, samples // batch, warmup(samples), unique, epochs,
        documents(unique, tokens_per_doc(corpus)), corpus_name(corpus if corpus in TOKENS_PER_DOC else "data", unique, epochs), tuple(advice),
    )  # fmt: skip


def hours(flops: float, *, peak: float, mfu: float, devices: int) -> float:
    """Time of so many FLOPs.

    >>> round(hours(1e20, peak=989e12, mfu=0.4, devices=8), 2)
    8.78
    """
    return flops / (peak * mfu * devices) / 3600

"""How much each source counts: given shares, and shares that follow the loss. Imports no torch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lm_core.config import load
from lm_core.errors import ConfigError

logger = logging.getLogger(__name__)

UpdateRule = Literal["sheared_llama", "sheared_llama_paper"]

SHARES: dict[str, dict[str, float]] = {
    "llama": {
        "en_cc": 0.67, "en_c4": 0.15, "github": 0.045, "en_wikipedia": 0.045, "en_book": 0.045, "en_arxiv": 0.025, "en_stack": 0.02,
    },
    "sheared_llama": {
        "en_cc": 0.361, "en_c4": 0.492, "github": 0.008, "en_wikipedia": 0.031, "en_book": 0.091, "en_arxiv": 0.007, "en_stack": 0.01,
    },
}  # fmt: skip
SHARES["uniform"] = dict.fromkeys(SHARES["llama"], 1 / 7)

# LLaMA-2-7B on the validation split of SlimPajama
REFERENCE = {
    "en_book": 1.925248146057129,
    "en_wikipedia": 1.5899001359939575,
    "en_stack": 1.4974864721298218,
    "github": 0.6984495520591736,
    "en_c4": 2.074881076812744,
    "en_cc": 1.6916865110397339,
    "en_arxiv": 1.2408167123794556,
}


def read_shares(text: str) -> dict[str, float]:
    """Shares by source: a name of `SHARES`, inline JSON, or a JSON or YAML file. Raises ConfigError for anything else."""
    if text in SHARES:
        return SHARES[text]
    found: Any
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"prob_map: {text!r} is not valid JSON ({error}); write for example '{{\"github\": 0.3}}'") from None
    elif Path(text).is_file():
        found = load(text)
    else:
        raise ConfigError(f"prob_map: {text!r} is neither a file nor one of {', '.join(SHARES)}; name one of them, or write JSON")
    for name, share in found.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share) or share < 0:
            raise ConfigError(f"prob_map: {name} has share {share!r}; give a number of at least 0")
    return {str(name): float(share) for name, share in found.items()}


def normalised_shares(shares: Mapping[str, float], sources: Iterable[str]) -> dict[str, float]:
    """The shares of `sources`, summing to 1. Shares of absent sources go to the others in proportion, with a warning.

    Raises ConfigError for a source without a share, and where all of them are 0.
    """
    present = list(sources)
    if missing := [name for name in present if name not in shares]:
        raise ConfigError(f"prob_map: no share for source {missing[0]} (shares: {', '.join(shares)}); add one, or remove the source")
    total = math.fsum(shares[name] for name in present)
    if total <= 0:
        raise ConfigError(f"prob_map: all shares of {', '.join(present)} are 0; give one of them a share")
    chosen = {name: shares[name] / total for name in present}
    if len(present) < len(shares):
        logger.warning("prob_map: %s for the sources at hand becomes %s", _shown(shares), _shown(chosen))
    return chosen


def read_reference(path: Path | None, sources: Iterable[str]) -> dict[str, float]:
    """Reference losses of `sources`, from a file of `moe-cpt ref-loss` or the built-in table."""
    known = REFERENCE if path is None else _losses(path)
    if missing := [name for name in sources if name not in known]:
        where = "the built-in table" if path is None else str(path)
        raise ConfigError(f"reference_loss: {where} has no loss for source {missing[0]}; write one with moe-cpt ref-loss")
    return {name: known[name] for name in sources}


def _losses(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ConfigError(f"reference_loss: {path} does not exist; write it with moe-cpt ref-loss")
    found = load(path)
    for name, loss in found.items():
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not math.isfinite(loss):
            raise ConfigError(f"reference_loss: {path} gives {name} the loss {loss!r}; give finite numbers by source")
    return {str(name): float(loss) for name, loss in found.items()}


def update_weights(
    alpha: Mapping[str, float],
    loss: Mapping[str, float],
    ref: Mapping[str, float],
    rule: UpdateRule = "sheared_llama",
    eta: float = 1.0,
    c: float = 1e-4,
    low: float = 0.0,
    high: float = 1.0,
) -> dict[str, float]:
    """New weights of the n sources from their losses l and reference losses r.

    sheared_llama: (1 - c) softmax(log alpha + eta (l - r)) + c / n; sheared_llama_paper: alpha exp(eta max(0, l - r)), normalised
    (Xia et al. 2023, Sheared LLaMA, algorithm 1). Then each is kept within [low, high].

    >>> update_weights({"a": 0.5, "b": 0.5}, {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, c=0.0)["a"] == math.e / (1 + math.e)
    True
    """
    excess = {name: loss[name] - ref[name] for name in alpha}
    if rule == "sheared_llama_paper":
        excess, c = {name: max(0.0, value) for name, value in excess.items()}, 0.0
    # a source of weight 0 stays there but for the smoothing
    top = max(excess.values())
    raised = {name: weight * math.exp(eta * (excess[name] - top)) for name, weight in alpha.items()}
    total = math.fsum(raised.values())
    mixed = {name: (1 - c) * value / total + c / len(raised) for name, value in raised.items()}
    whole = math.fsum(mixed.values())
    return bounded({name: value / whole for name, value in mixed.items()}, low, high)


def bounded(weights: Mapping[str, float], low: float, high: float) -> dict[str, float]:
    """Weights that sum to 1, each within [low, high]: those beyond are pinned, and the others keep their proportions."""
    pinned: dict[str, float] = {}
    while True:
        free = {name: value for name, value in weights.items() if name not in pinned}
        left = 1 - math.fsum(pinned.values())
        total = math.fsum(free.values())
        scaled = {name: left * (value / total if total > 0 else 1 / len(free)) for name, value in free.items()}
        under = {name: low for name, value in scaled.items() if value < low}
        over = {name: high for name, value in scaled.items() if value > high}
        # the side that is further off is pinned first: pinning it may bring the other one back
        excess = math.fsum(value - high for name, value in scaled.items() if name in over)
        lack = math.fsum(low - value for name, value in scaled.items() if name in under)
        if not under and not over:
            return {name: pinned[name] if name in pinned else scaled[name] for name in weights}
        pinned |= over if excess > lack else under


def _shown(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())

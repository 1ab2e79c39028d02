"""Options that the guides of this method and of transformers' Trainer write differently, in core's words. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_core.errors import ConfigError
from lm_core.values import read

STRATEGIES = ("no", "steps", "epoch")


class Meaning(NamedTuple):
    """What a spelling of the guide sets: option and value."""

    option: str
    value: Any


def meanings(values: Mapping[str, Any]) -> dict[str, list[Meaning]]:
    """By guide option among `values` (as they were written): what it sets.

    >>> meanings({"bf16": "true", "save_strategy": "epoch"})
    {'bf16': [Meaning(option='precision', value='bf16')], 'save_strategy': [Meaning(option='save_every', value='epoch')]}
    """
    found: dict[str, list[Meaning]] = {}
    for name in ("bf16", "fp16"):
        if _on(values.get(name)):
            found[name] = [Meaning("precision", name)]
    if _on(values.get("cpu")):
        found["cpu"] = [Meaning("device", "cpu")]
    if (strategy := values.get("save_strategy")) in ("epoch", "no"):
        found["save_strategy"] = [Meaning("save_every", "epoch" if strategy == "epoch" else "never")]
    strategy = values.get("evaluation_strategy")
    if strategy in ("epoch", "no"):
        found["evaluation_strategy"] = [Meaning("eval_every", "epoch" if strategy == "epoch" else "never")]
    elif strategy == "steps" and values.get("eval_every", "never") == "never":
        found["evaluation_strategy"] = [Meaning("eval_every", str(values.get("log_every", 10)))]
    if report := values.get("report_to"):
        named = [word.strip() for word in (report.split(",") if isinstance(report, str) else report)]
        found["report_to"] = [
            Meaning("tensorboard", "tensorboard" in named),
            Meaning("wandb", "online" if "wandb" in named else "off"),
        ]
    beta1, beta2 = (values.get(f"adam_beta{number}") for number in (1, 2))
    if beta1 is not None or beta2 is not None:
        pair = (0.9 if beta1 is None else float(beta1), 0.999 if beta2 is None else float(beta2))
        found["adam_beta1" if beta1 is not None else "adam_beta2"] = [Meaning("betas", pair)]
    return found


def _on(value: Any) -> bool:
    read_value, wrong = read(bool, {}, value, "") if value is not None else (False, [])
    return bool(read_value) and not wrong


def check(config: Any) -> None:
    """Raises ConfigError where an option of the guide and what it stands for say different things."""
    for name, parts in meanings({field: getattr(config, field) for field in config.__dataclass_fields__}).items():
        for option, value in parts:
            if (own := getattr(config, option)) != value and not (option == "wandb" and own == "offline"):
                raise ConfigError(f"{name}: {getattr(config, name)} means {option} {value}, but {option} is {own}; drop one of the two")

"""`lowrank-opt presets`: the model sizes that have a name, and the shipped options of whole runs."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from lm_core.errors import ConfigError
from lm_core.yaml12 import dump
from lowrank_opt.models import HUB_MODELS, PRESETS, RANKS
from lowrank_opt.optimizer_options import LEARNING_RATES


def shipped() -> dict[str, str]:
    """Text of every run preset by its name."""
    folder = files("lowrank_opt").joinpath("presets")
    return {path.name.removesuffix(".yaml"): path.read_text() for path in sorted(folder.iterdir(), key=lambda path: path.name)}


def parameters(name: str) -> int:
    """Number of elements of a model, tied weights once."""
    from lowrank_opt.memory import model_of

    return sum(parameter.numel() for parameter in model_of(name).parameters())


def run(name: str | None) -> dict[str, Any]:
    """List everything, or show the one that is named."""
    runs, models = shipped(), {**PRESETS, **HUB_MODELS}
    if name is None:
        sizes = {model: parameters(model) for model in models}
        for model, count in sizes.items():
            rank = f"  published rank {RANKS[model]}" if model in RANKS else ""
            print(f"{model:14} {count:>13,} parameters{rank}")
        for run_name, text in runs.items():
            print(f"{run_name}: {text.splitlines()[0].removeprefix('# ')}")
        print("learning rates to try from random weights (of trained ones, smaller):")
        for rates in dict.fromkeys(LEARNING_RATES.values()):
            names = [optimizer for optimizer, chosen in LEARNING_RATES.items() if chosen == rates]
            print(f"  {', '.join(f'{rate:g}' for rate in rates)}: {', '.join(names)}")
        return {"models": sizes, "runs": list(runs), "learning_rates": LEARNING_RATES}
    if name in models:
        print(dump(dict(models[name])), end="")
        return dict(models[name])
    if name in runs:
        print(runs[name], end="")
        return {"name": name, "text": runs[name]}
    raise ConfigError(f"name: {name} is neither a model size nor a shipped run; choose one of {', '.join([*models, *runs])}")

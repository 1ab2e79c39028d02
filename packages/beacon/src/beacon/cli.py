"""The `beacon` command."""

from __future__ import annotations

from typing import Any

from beacon.options import LmConfig, TrainConfig
from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli

cli = command_group("Read long contexts through compressed memory: train beacons on a frozen language model, and use them.")


@cli.command()
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Train beacons on a language model.

    Example: beacon train --model smollm2-135m --beacon-window 256 --beacon-ratio 2 4 8 --max-steps 50 --train-data builtin:python-docs
    """
    from beacon.method import Beacon
    from lm_core.run import run

    return run(config, Beacon(config))


@cli.group("eval")
def evaluate() -> None:
    """Measure a beacon model."""


@evaluate.command()
@configured(LmConfig)
def lm(config: LmConfig) -> dict[str, Any]:
    """Perplexity by context length.

    Example: beacon eval lm --model runs/docs --eval-data builtin:python-docs --max-length 2048 --stride 0 --baseline full
    """
    from beacon.eval.lm import run

    return run(config)


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

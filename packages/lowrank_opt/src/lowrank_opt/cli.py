"""The `lowrank-opt` command."""

from __future__ import annotations

from typing import Any

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from lowrank_opt.config import TrainConfig, refuse_unused, resolved

cli = command_group("Train language models in little memory: LoRA, GaLore and full-rank baselines.")


@cli.command()
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Pre-train or fine-tune a model.

    Example: lowrank-opt train --mode finetuning --optimizer galore --model smollm2-135m --data builtin:python-docs --precision bf16
    """
    refuse_unused(config)
    config = resolved(config)
    from lm_core.run import run
    from lowrank_opt.method import LowRank

    return run(config, LowRank(config))


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

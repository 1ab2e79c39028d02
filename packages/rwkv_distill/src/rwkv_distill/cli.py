"""The `rwkv-distill` command."""

from __future__ import annotations

from typing import Any

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from rwkv_distill.config import TrainConfig, settle

cli = command_group("Distil Transformers into RWKV students that generate with constant memory.")


@cli.command()
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Train a student of a teacher.

    Example: rwkv-distill train --model smollm2-135m -r builtin:python-docs -m 256 -s 1 -w 2 -t 10k -o s1
    """
    config = settle(config)
    from lm_core.run import run
    from rwkv_distill.align import Align

    return run(config, Align(config))


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

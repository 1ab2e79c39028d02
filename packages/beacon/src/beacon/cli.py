"""The `beacon` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from beacon.options import BenchConfig, CompressConfig, ExportConfig, GenerateConfig, ImportConfig, LmConfig, TrainConfig
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


@cli.command()
@configured(CompressConfig)
def compress(config: CompressConfig) -> dict[str, Any]:
    """Read a text once, and keep its memory in a file.

    Example: beacon compress --model runs/docs --input builtin:python-docs[8] --output docs.mem
    """
    from beacon.use import compress as run

    return run(config)


@cli.command()
@configured(GenerateConfig)
def generate(config: GenerateConfig) -> dict[str, Any]:
    """Write on from a prompt, after a memory if one is given.

    Example: beacon generate --model runs/docs --memory docs.mem --prompt "The with statement" --stream
    """
    from beacon.use import generate as run

    return run(config)


@cli.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
def inspect(path: Path) -> None:
    """Say what a model folder or a memory file holds."""
    from beacon.use import inspect as run

    run(path)


@cli.command()
@configured(ExportConfig)
def export(config: ExportConfig) -> dict[str, Any]:
    """Write a model folder whole, or its beacon weights alone.

    Example: beacon export --model runs/docs --format adapter --output-dir adapter
    """
    from beacon.use import export as run

    return run(config)


@cli.command("import")
@configured(ImportConfig)
def import_(config: ImportConfig) -> dict[str, Any]:
    """Bring a folder with flat beacon_* settings into our layout.

    Example: beacon import --from downloaded --output-dir model
    """
    from beacon.use import import_folder as run

    return run(config)


@cli.command()
@configured(BenchConfig)
def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure what the method promises, beside its baseline.

    Example: beacon bench --only P1,P2
    """
    from beacon.bench import run

    return run(config)


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

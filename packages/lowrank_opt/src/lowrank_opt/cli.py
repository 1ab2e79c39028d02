"""The `lowrank-opt` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from lm_core.harness import add_harness
from lowrank_opt.checks import refuse_unused
from lowrank_opt.commands import BenchConfig, CompareConfig, EvalConfig, ExportConfig, InspectConfig, PresetsConfig
from lowrank_opt.config import TrainConfig
from lowrank_opt.resolve import resolved, tell_packaged, with_data, without_foreign

cli = command_group("Train language models in little memory: LoRA, GaLore and full-rank baselines.")


@cli.command()
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Pre-train or fine-tune a model.

    Example: lowrank-opt train --mode finetuning --optimizer galore --model smollm2-135m --data builtin:python-docs --precision bf16
    """
    config = without_foreign(config)
    refuse_unused(config)
    config = resolved(config)
    tell_packaged(config)
    if config.dry_run and not config.data:
        from lowrank_opt import estimation

        return estimation.run(config)
    config = with_data(config)
    from lm_core import dist
    from lm_core.run import run
    from lowrank_opt.method import method_for

    result = run(config, method_for(config))
    if not config.dry_run and dist.rank() == 0:
        memory = result["memory"]
        print(
            f"peak of memory  predicted {memory['predicted_peak_bytes'] / 2**30:.2f} GiB  measured {memory['measured_peak_bytes'] / 2**30:.2f} GiB"
        )
    if config.classifies() and not config.dry_run:
        from lowrank_opt.glue import summary

        result["epochs"] = summary(config.run_folder(), config.task)
    return result


@cli.command()
@configured(TrainConfig)
def estimate(config: TrainConfig) -> dict[str, Any]:
    """Print the memory that every optimizer would need, then what --dry-run of train prints.

    Takes the options of train; without --data only the table is made.
    """
    config = without_foreign(config)
    refuse_unused(config)
    from lowrank_opt import estimation

    return estimation.run(resolved(config))


@cli.command("eval")
@configured(EvalConfig)
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Print the held-out loss of a checkpoint."""
    from lowrank_opt import evaluation

    return evaluation.run(config)


@cli.command()
@configured(ExportConfig)
def export(config: ExportConfig) -> dict[str, Any]:
    """Write a checkpoint as a folder that transformers or peft loads."""
    from lowrank_opt import exporting

    return exporting.run(config)


@cli.command()
@configured(InspectConfig)
def inspect(config: InspectConfig) -> dict[str, Any]:
    """List the optimizer state in a checkpoint: names, shapes, types, bytes and ages of bases."""
    from lowrank_opt import inspection

    return inspection.run(config)


@cli.command()
@configured(PresetsConfig)
@click.argument("name", required=False)
def presets(config: PresetsConfig, name: str | None) -> dict[str, Any]:
    """List model sizes and shipped runs, or show the one called NAME."""
    from lowrank_opt import listing

    return listing.run(name)


@cli.command()
@configured(CompareConfig)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
def compare(config: CompareConfig, runs: tuple[Path, ...]) -> dict[str, Any]:
    """Print loss, memory and speed of several RUNS (their folders) side by side.

    Example: lowrank-opt compare models/a models/b --out table.csv --picture runs.png
    """
    from lowrank_opt import comparison

    return comparison.run(runs, config)


@cli.command()
@configured(BenchConfig)
def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure speed, memory and exactness of the optimizers, each figure beside its target.

    Example: lowrank-opt bench --suite cpu --only C7 C8
    """
    from lowrank_opt import bench as measurements

    return measurements.run(config)


add_harness(cli)


def main() -> None:
    """Entry point of the package."""
    # The eigenproblems of a refresh have a few hundred rows: several threads of scipy's BLAS take longer there than one, and many
    # times longer where other programs hold the cores. Read when the library is loaded, which is later.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run_cli(cli)

"""The `rwkv-distill` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from lm_core.harness import add_harness
from lm_core.yaml12 import dump
from rwkv_distill.command_config import (
    BenchConfig,
    ConsolidateConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PrepareConfig,
)
from rwkv_distill.config import CacheConfig, TrainConfig, settle

cli = command_group("Distil Transformers into RWKV students that generate with constant memory.")


@cli.command()
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Train a student of a teacher.

    Example: rwkv-distill train --model smollm2-135m -r builtin:python-docs -m 256 -s 1 -w 2 -t 10k -o s1
    """
    config = settle(config)
    from lm_core.run import run

    if config.stage == 1:
        from rwkv_distill.align import Align

        return run(config, Align(config))
    if config.stage == 2:
        from rwkv_distill.distill import Distill

        return run(config, Distill(config))
    from rwkv_distill.finetune import Finetune

    return run(config, Finetune(config))


@cli.command()
@configured(TrainConfig)
def init(config: TrainConfig) -> dict[str, Any]:
    """Write the untrained student, with its projections copied, and calibrated where there is data.

    Example: rwkv-distill init -c packages/rwkv_distill/presets/smollm2_135m_distill.yaml -o s0
    """
    from rwkv_distill.untrained import write_untrained

    return write_untrained(settle(config))


@cli.command()
@configured(PrepareConfig)
def prepare_data(config: PrepareConfig) -> dict[str, Any]:
    """Tokenise rows once, for --preprocessed-data of train.

    Example: rwkv-distill prepare-data -r builtin:python-docs --tokenizer smollm2-135m -m 256 -o docs-ids
    """
    from rwkv_distill.prepare import prepare

    result = prepare(config)
    click.echo(f"{result['output_dir']}: {result['rows']:,} rows, {result['tokens']:,} tokens")
    return result


@cli.command()
@click.argument("ckpt", type=click.Path(path_type=Path))
@configured(ConsolidateConfig)
def consolidate(config: ConsolidateConfig, ckpt: Path) -> dict[str, Any]:
    """Write a checkpoint of any engine as one file.

    Example: rwkv-distill consolidate s2/checkpoints/checkpoint-10 -o student.safetensors
    """
    from rwkv_distill import weights

    result = weights.consolidate(ckpt, config.output)
    click.echo(f"{result['output']}: {result['tensors']} tensors, {result['bytes']:,} bytes")
    return result


@cli.command()
@configured(CacheConfig)
def cache_teacher(config: CacheConfig) -> dict[str, Any]:
    """Write the teacher's likeliest tokens for every position of a run's data.

    Example: rwkv-distill cache-teacher -c packages/rwkv_distill/presets/smollm2_135m_distill.yaml -r builtin:python-docs -m 256 -t 10k -o cache
    """
    from rwkv_distill.cache_teacher import write

    result = write(settle(config))
    click.echo(f"{result['output_dir']}: {result['rows']:,} rows, {result['tokens']:,} tokens, {result['bytes']:,} bytes")
    return result


@cli.command("eval")
@configured(EvalConfig)
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Compare a student with its teacher.

    Example: rwkv-distill eval --model s2/final --teacher smollm2-135m --data builtin:python-docs -m 256
    """
    from rwkv_distill import evaluate as evaluation

    report = evaluation.evaluate(config)
    click.echo(dump(report), nl=False)
    return report


@cli.command()
@configured(GenerateConfig)
def generate(config: GenerateConfig) -> dict[str, Any]:
    """Continue a prompt.

    Example: rwkv-distill generate --model s2/final --prompt "A list is"
    """
    from rwkv_distill.continue_text import continue_text

    return continue_text(config)


@cli.command()
@configured(ExportConfig)
def export(config: ExportConfig) -> dict[str, Any]:
    """Write a student as a folder for transformers.

    Example: rwkv-distill export --ckpt s2 -o student-bf16
    """
    from rwkv_distill import export as exporting

    result = exporting.export(config)
    click.echo(f"{result['output_dir']}: {result['bytes']:,} bytes")
    return result


@cli.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@configured(ImportConfig)
def import_(config: ImportConfig, path: Path) -> dict[str, Any]:
    """Read an exported folder back as a student in float32.

    Example: rwkv-distill import --format arwkv student-arwkv -o student
    """
    from rwkv_distill import export as exporting

    return exporting.import_student(path, config)


@cli.command()
@configured(BenchConfig)
def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure what the package promises: operators, decoding, memory, packing.

    Example: rwkv-distill bench --op wkv7
    """
    from rwkv_distill.bench import run

    return run(config)


add_harness(cli, "rwkv_distill")


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

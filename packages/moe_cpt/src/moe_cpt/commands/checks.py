"""Commands that measure models and look at runs."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lm_core.cli import Command, configured
from moe_cpt.options.checks import BenchConfig, EvalConfig, InspectConfig, ReferenceConfig, ReportConfig, TensorBoardConfig
from moe_cpt.targets import require_free


@click.command(cls=Command)
@configured(InspectConfig)
def inspect(config: InspectConfig) -> dict[str, Any]:
    """Count the parameters of a mixture, and with --data the tokens that each expert gets.

    Example: moe-cpt inspect --model moe-4of16 --data builtin:python-docs
    """
    from moe_cpt.inspection import inspect as look

    return look(config)


@click.command("eval", cls=Command)
@configured(EvalConfig)
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Held-out loss by source.

    Example: moe-cpt eval --model smollm2-135m --eval-data builtin:python-docs --block_size 512
    """
    return _evaluate(config)


@click.command("ref-loss", cls=Command)
@configured(ReferenceConfig)
def ref_loss(config: ReferenceConfig) -> dict[str, Any]:
    """Write the held-out losses of a model as the reference of a dynamic data selection.

    Example: moe-cpt ref-loss --model smollm2-135m --validation_dir builtin:python-docs,builtin:stdlib -o ref.json
    """
    require_free("output", config.output, config.overwrite)
    found = _evaluate(config)
    config.output.write_text(json.dumps({source: values["loss"] for source, values in found.items()}, indent=1) + "\n")
    return found


def _evaluate(config: EvalConfig) -> dict[str, Any]:
    from moe_cpt.evaluate import score

    scores = score(config)
    for source, found in scores.items():
        print(f"{source}: loss {found.loss:.4f} +- {found.standard_error:.4f}  perplexity {found.perplexity:.2f}  tokens {found.tokens:,}")
    return {
        source: {"loss": found.loss, "standard_error": found.standard_error, "perplexity": found.perplexity, "tokens": found.tokens}
        for source, found in scores.items()
    }


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@configured(ReportConfig)
def report(config: ReportConfig, runs: tuple[Path, ...]) -> dict[str, Any]:
    """Compare runs: held-out loss by source before and after training, router loads, and shares of the sources over time.

    Example: moe-cpt report runs/random runs/activation --output report/
    """
    from moe_cpt.report import compare

    return compare(runs, config.output)


@click.command("tb-spec", cls=Command)
@click.argument("runs", nargs=-1, required=True)
@configured(TensorBoardConfig)
def tb_spec(config: TensorBoardConfig, runs: tuple[str, ...]) -> dict[str, Any]:
    """Print (with --run: become) the TensorBoard command that shows several runs under short names.

    RUNS are NAME:FOLDER, run folders, or patterns of them.

    Example: moe-cpt tb-spec base:outputs/moe_fpt-1 'outputs/moe_lora-*' --port 8001
    """
    from moe_cpt.tensorboard import command

    words = command(runs, config.port)
    print(shlex.join(words))
    if config.run:
        os.execvp(words[0], words)
    return {"command": words}


@click.command(cls=Command)
@click.argument("measurements", nargs=-1)
@configured(BenchConfig)
def bench(config: BenchConfig, measurements: tuple[str, ...]) -> dict[str, Any]:
    """Measure speed, memory and quality on the CPU, each figure beside its target.

    Example: moe-cpt bench layer
    """
    from moe_cpt import bench

    return bench.run(replace(config, only=[*config.only, *measurements]))

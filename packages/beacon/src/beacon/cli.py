"""The `beacon` command."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from beacon.options import (
    BenchConfig,
    CompressConfig,
    CostConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    InfbenchConfig,
    LmConfig,
    LongbenchConfig,
    MultiturnConfig,
    NeedleConfig,
    PasskeyConfig,
    PretrainDataConfig,
    RecallDataConfig,
    ShortConfig,
    TopicConfig,
    TrainConfig,
)
from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from lm_core.harness import add_harness

cli = command_group("Read long contexts through compressed memory: train beacons on a frozen language model, and use them.")


def _environment(*names: str) -> Callable[[click.Context, click.Parameter, str | None], None]:
    """An option that sets variables of the environment, which libraries read, and is no part of the configuration or its records."""

    def keep(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            os.environ.update(dict.fromkeys(names, value))

    return keep


@cli.command()
@click.option(
    "--access-token",
    metavar="TOKEN",
    expose_value=False,
    callback=_environment("HF_TOKEN"),
    help="Token of the Hugging Face hub, kept in no record; better in the environment, as HF_TOKEN.",
)
@click.option(
    "--model-cache-dir", metavar="PATH", expose_value=False, callback=_environment("HF_HUB_CACHE"), help="Folder of downloaded models."
)
@click.option(
    "--dataset-cache-dir",
    metavar="PATH",
    expose_value=False,
    callback=_environment("HF_DATASETS_CACHE", "LM_CORE_CACHE"),
    help="Folder of downloaded and tokenised data.",
)
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Train beacons on a language model.

    Example: beacon train --model smollm2-135m --beacon-window 256 --beacon-ratio 2 4 8 --max-steps 50 --train-data builtin:python-docs
    """
    from beacon.method import Beacon
    from lm_core.run import run

    return run(config, Beacon(config))


@cli.command("pretrain-data")
@configured(PretrainDataConfig)
def pretrain_data(config: PretrainDataConfig) -> dict[str, Any]:
    """Pack text into blocks of tokens.

    Example: beacon pretrain-data --model smollm2-135m --train-data docs=builtin:python-docs code=builtin:stdlib --num-token 1024:100k --output-dir data/packed
    """
    from beacon.data.pretrain import run

    return run(config)


@cli.command("recall-data")
@configured(RecallDataConfig)
def recall_data(config: RecallDataConfig) -> dict[str, Any]:
    """Write rows that ask for what they said before, to be mixed with text.

    Example: beacon recall-data --model smollm2-135m --haystack builtin:python-docs --length 512 --num-rows 2000 --output-dir data/recall
    """
    from beacon.data.recall import run

    return run(config)


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


@evaluate.command()
@configured(NeedleConfig)
def needle(config: NeedleConfig) -> dict[str, Any]:
    """Find a sentence in a long text: scores by length and depth, with a heat map.

    Example: beacon eval needle --model runs/docs --haystack builtin:python-docs --min-length 512 --max-length 2048 --num-length-interval 3 --num-depth-interval 3
    """
    from beacon.eval.needle import run_needle as run

    return run(config)


@evaluate.command()
@configured(PasskeyConfig)
def passkey(config: PasskeyConfig) -> dict[str, Any]:
    """Find a number in a long text: scores by length and depth, with a heat map.

    Example: beacon eval passkey --model runs/docs --min-length 512 --max-length 2048 --num-length-interval 4 --num-depth-interval 5 --baseline full
    """
    from beacon.eval.needle import run_passkey as run

    return run(config)


@evaluate.command()
@configured(TopicConfig)
def topic(config: TopicConfig) -> dict[str, Any]:
    """Which topic of a long conversation came k-th: accuracy by its length.

    Example: beacon eval topic --model runs/docs --num-topics 5 10 20 --baseline full
    """
    from beacon.eval.talk import run_topic as run

    return run(config)


@evaluate.command()
@configured(MultiturnConfig)
def multiturn(config: MultiturnConfig) -> dict[str, Any]:
    """Several questions on one text that is read once: accuracy and seconds of each turn.

    Example: beacon eval multiturn --model runs/docs --haystack builtin:python-docs --length 2048 --turns 4
    """
    from beacon.eval.talk import run_multiturn as run

    return run(config)


@evaluate.command()
@configured(LongbenchConfig)
def longbench(config: LongbenchConfig) -> dict[str, Any]:
    """LongBench from local files: scores by task and category.

    Example: beacon eval longbench --model runs/docs --data-dir longbench --max-length 4096
    """
    from beacon.eval.files import run

    return run(config, "longbench")


@evaluate.command()
@configured(InfbenchConfig)
def infbench(config: InfbenchConfig) -> dict[str, Any]:
    """Question and summary tasks of InfiniteBench from local files.

    Example: beacon eval infbench --model runs/docs --data-dir infbench
    """
    from beacon.eval.files import run

    return run(config, "infbench")


@evaluate.command()
@configured(ShortConfig)
def short(config: ShortConfig) -> dict[str, Any]:
    """Multiple choice on short texts, which beacons leave as they are.

    Example: beacon eval short --model runs/docs --baseline full
    """
    from beacon.eval.short import run

    return run(config)


@evaluate.command()
@configured(CostConfig)
def cost(config: CostConfig) -> dict[str, Any]:
    """Seconds of reading and writing and bytes of keys and values by length of the context, with a picture.

    Example: beacon eval cost --model smollm2-135m --lengths 1024 2048 4096 --beacon-ratio 2 8 --baseline full --output-dir runs/cost
    """
    from beacon.eval.cost import run

    return run(config)


add_harness(cli, "beacon")


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

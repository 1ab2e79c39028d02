"""The `mdm-scaling` command."""

from __future__ import annotations

from typing import Any

import click

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from mdm_scaling import sizes
from mdm_scaling.config import EvalConfig, GenerateConfig, PretrainConfig, TokenizeConfig, settled

cli = command_group("Pre-train masked diffusion and autoregressive language models, compare them, and fit their scaling laws.")


@cli.command()
@configured(PretrainConfig)
def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train one model by masked diffusion or next-token prediction.

    Example: mdm-scaling pretrain --objective mdm --init-from smollm2-135m --data builtin:python-docs --seq-length 256 --train-samples 160
    """
    config = settled(config)
    from mdm_scaling.train import pretrain as train

    return train(config)


@cli.group()
def data() -> None:
    """Corpora in Megatron's format."""


@data.command("tokenize")
@configured(TokenizeConfig)
def data_tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Text to <prefix>_text_document.bin and .idx.

    Example: mdm-scaling data tokenize --input builtin:python-docs --output-prefix corpora/docs --tokenizer smollm2-135m
    """
    from mdm_scaling.data.tokenize import tokenize

    return tokenize(config)


@cli.group()
def presets() -> None:
    """The table of model sizes."""


@presets.command("list")
def presets_list() -> None:
    """All sizes: widths, heads, layers, the nominal count N and the exact one (vocabulary of GPT-2; bytes for the small ones)."""
    click.echo(f"{'name':8} {'hidden':>6} {'4h':>6} {'ffn':>6} {'head':>5} {'heads':>5} {'layers':>6} {'nominal N':>16} {'exact':>16}")
    for name, shape in sizes.ALL.items():
        click.echo(
            f"{name:8} {shape.hidden:6} {4 * shape.hidden:6} {shape.ffn:6} {shape.head_size:5} {shape.heads:5} {shape.layers:6} "
            f"{shape.nominal:16,} {shape.exact():16,}"
        )


@presets.command("show")
@click.argument("name")
def presets_show(name: str) -> None:
    """The options that one preset stands for."""
    shape = sizes.named(name)
    for option, value in {
        "num-layers": shape.layers,
        "hidden-size": shape.hidden,
        "num-attention-heads": shape.heads,
        "kv-channels": shape.head_size,
        "ffn-hidden-size": shape.ffn,
    }.items():
        click.echo(f"--{option} {value}")


@presets.command("count")
@click.argument("name")
@click.option("--vocabulary", type=int, help="Entries of the tokenizer; default: those of GPT-2 (bytes for the small ones).")
@click.option("--untied", is_flag=True, help="With an output head of its own.")
def presets_count(name: str, vocabulary: int | None, untied: bool) -> None:
    """Parameters of one preset: nominal, exact, and by part."""
    shape = sizes.named(name)
    click.echo(f"nominal {shape.nominal:,}")
    click.echo(f"exact   {shape.exact(vocabulary, tied=not untied):,}")
    for part, count in shape.parts(vocabulary, tied=not untied).items():
        click.echo(f"  {part:10} {count:,}")


@cli.group("eval")
def evaluation() -> None:
    """What a model knows."""


@evaluation.command("loss")
@configured(EvalConfig)
def eval_loss(config: EvalConfig) -> dict[str, Any]:
    """The likelihood of a corpus; of a masked model an upper bound on it.

    Example: mdm-scaling eval loss --checkpoint smollm2-135m --data builtin:python-docs --seq-length 256 --limit 16
    """
    from mdm_scaling.evaluate import corpus_loss

    return corpus_loss(config)


@cli.command()
@configured(GenerateConfig)
def generate(config: GenerateConfig) -> dict[str, Any]:
    """Continue prompts.

    Example: mdm-scaling generate --checkpoint smollm2-135m --prompt "The with statement" --max-new-tokens 32
    """
    from mdm_scaling.sampling import run

    return run(config)


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

"""The `mdm-scaling` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from lm_core.harness import add_harness
from mdm_scaling import sizes
from mdm_scaling.analysis import (
    AdviseConfig,
    ChinchillaConfig,
    CollectConfig,
    ConstrainedConfig,
    CrossoverConfig,
    PlanConfig,
    PlotConfig,
    StartConfig,
    StudyConfig,
    SweepConfig,
)
from mdm_scaling.config import DeepSpeedConfig, PretrainConfig, settled
from mdm_scaling.options import (
    BenchConfig,
    ConcatConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    SubsetConfig,
    TasksConfig,
    TokenizeConfig,
    VerifyConfig,
)

cli = command_group("Pre-train masked diffusion and autoregressive language models, compare them, and fit their scaling laws.")


@cli.command()
@configured(PretrainConfig)
def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train one model by masked diffusion or next-token prediction.

    Example: mdm-scaling pretrain --objective mdm --init-from smollm2-135m --data builtin:python-docs --seq-length 256 --train-samples 160
    """
    config = settled(config)
    if config.skip_train:
        from mdm_scaling.evaluate import held_out_loss

        return held_out_loss(config)
    from mdm_scaling.train import pretrain as train

    return train(config)


@cli.command("ds-config")
@configured(DeepSpeedConfig)
def ds_config(config: DeepSpeedConfig) -> dict[str, Any]:
    """Write the DeepSpeed settings of a run, for launchers that want a file; `--deepspeed-config` takes it.

    Example: mdm-scaling ds-config --objective ar --preset 117M --train-samples 25600 --zero-stage 2 --out ds.json
    """
    from mdm_scaling.commands import ds_config as made

    return made(config)


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


@data.command("inspect")
@click.argument("prefix")
def data_inspect(prefix: str) -> None:
    """What the header of a corpus says, and counts."""
    from mdm_scaling.data.tools import inspect

    inspect(prefix)


@data.command("verify")
@configured(VerifyConfig)
@click.argument("prefix")
def data_verify(config: VerifyConfig, prefix: str) -> dict[str, Any]:
    """Check header, offsets, sizes, trailing bytes and the range of tokens."""
    from mdm_scaling.data.tools import verify

    return verify(prefix, config.vocabulary)


@data.command("concat")
@configured(ConcatConfig)
@click.argument("pattern")
def data_concat(config: ConcatConfig, pattern: str) -> dict[str, Any]:
    """Join the corpora that match a quoted pattern, in natural order.

    Example: mdm-scaling data concat 'corpora/part_*.bin' --output-prefix corpora/all
    """
    from mdm_scaling.data.tools import concat

    return concat(config, pattern)


@data.command("subset")
@configured(SubsetConfig)
@click.argument("source", type=click.Path(path_type=Path))
def data_subset(config: SubsetConfig, source: Path) -> dict[str, Any]:
    """The first documents of a .jsonl file that hold so many tokens; smaller subsets are prefixes of larger ones.

    Example: mdm-scaling data subset c4.jsonl.gz --tokens 100M --out c4_100m.jsonl
    """
    from mdm_scaling.data.tools import subset

    return subset(config, source)


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


@evaluation.command("tasks")
@configured(TasksConfig)
def eval_tasks(config: TasksConfig) -> dict[str, Any]:
    """Multiple-choice and cloze tasks.

    Example: mdm-scaling eval tasks --checkpoint smollm2-135m --tasks questions.jsonl
    """
    from mdm_scaling.tasks import run

    return run(config)


@cli.command()
@configured(GenerateConfig)
def generate(config: GenerateConfig) -> dict[str, Any]:
    """Continue prompts, or fill the [MASK]s in them.

    Example: mdm-scaling generate --checkpoint smollm2-135m --prompt "The with statement" --max-new-tokens 32
    """
    from mdm_scaling.sampling import run

    return run(config)


@cli.command()
@configured(ExportConfig)
def export(config: ExportConfig) -> dict[str, Any]:
    """Write a model as a Hugging Face folder and read it back.

    Example: mdm-scaling export --checkpoint runs/mdm --out out/mdm
    """
    from mdm_scaling.export import export as made

    return made(config)


@cli.command("import")
@configured(ImportConfig)
@click.argument("model")
def import_model(config: ImportConfig, model: str) -> dict[str, Any]:
    """Make a Llama-shaped model ready for one objective: its weights, and rows for the mask and padding.

    Example: mdm-scaling import smollm2-135m --objective mdm --out models/smollm2_mdm
    """
    from mdm_scaling.export import bring

    return bring(config, model)


@cli.group()
def plan() -> None:
    """Runs before they are made."""


@plan.command("run")
@configured(PlanConfig)
def plan_run(config: PlanConfig) -> dict[str, Any]:
    """One run: tokens, samples, steps, warm-up, corpus and time.

    Example: mdm-scaling plan run --objective mdm --flops 1e19 --preset 117M
    """
    from mdm_scaling.commands import plan_run as made

    return made(config)


@plan.command("sweep")
@configured(SweepConfig)
def plan_sweep(config: SweepConfig) -> dict[str, Any]:
    """A manifest of many runs, for `runs start`.

    Example: mdm-scaling plan sweep --kind isoflop --base base.yaml --flops 1e13,3e13 --presets 7M,14M,20M --out sweep.jsonl
    """
    from mdm_scaling.commands import plan_sweep as made

    return made(config)


@plan.command("advise")
@configured(AdviseConfig)
def plan_advise(config: AdviseConfig) -> dict[str, Any]:
    """Which objective, size and number of epochs to choose.

    Example: mdm-scaling plan advise --flops 1e19 --unique-tokens 100M
    """
    from mdm_scaling.commands import advise

    return advise(config)


@cli.group()
def runs() -> None:
    """Many runs."""


@runs.command("start")
@configured(StartConfig)
@click.argument("manifest", type=click.Path(path_type=Path))
def runs_start(config: StartConfig, manifest: Path) -> dict[str, Any]:
    """Make the runs of a manifest that are not done yet.

    Example: mdm-scaling runs start sweep.jsonl --jobs 2
    """
    from lm_core.errors import RunFailed
    from mdm_scaling import sweep

    states = sweep.start(sweep.read(manifest)[config.share()], config.out, jobs=config.jobs, retry=config.retry)
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        raise RunFailed(f"runs: {len(failed)} of {len(states)} failed, first {config.out / failed[0]}; see log.txt there")
    return {"out": str(config.out), "states": states}


@runs.command("collect")
@configured(CollectConfig)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
def runs_collect(config: CollectConfig, folders: tuple[Path, ...]) -> dict[str, Any]:
    """Gather finished runs into one table.

    Example: mdm-scaling runs collect runs/sweep --out runs.csv
    """
    from mdm_scaling.sweep import collect

    rows = collect(folders, config.out)
    click.echo(f"{config.out}: {len(rows)} runs")
    return {"out": str(config.out), "runs": len(rows)}


@cli.group()
def fit() -> None:
    """Scaling laws of finished runs."""


@fit.command("chinchilla")
@configured(ChinchillaConfig)
@click.argument("table", type=click.Path(path_type=Path))
def fit_chinchilla(config: ChinchillaConfig, table: Path) -> dict[str, Any]:
    """A law of runs that see their data once.

    Example: mdm-scaling fit chinchilla runs.csv --objective ar --out law_ar.json
    """
    from mdm_scaling.commands import fit_chinchilla as made

    return made(config, table)


@fit.command("data-constrained")
@configured(ConstrainedConfig)
@click.argument("table", type=click.Path(path_type=Path))
def fit_constrained(config: ConstrainedConfig, table: Path) -> dict[str, Any]:
    """A law of runs that repeat their data.

    Example: mdm-scaling fit data-constrained runs.csv --objective mdm --out law_mdm.json
    """
    from mdm_scaling.commands import fit_constrained as made

    return made(config, table)


@fit.command("crossover")
@configured(CrossoverConfig)
def fit_crossover(config: CrossoverConfig) -> dict[str, Any]:
    """The compute beyond which masked diffusion wins, by unique data.

    Example: mdm-scaling fit crossover --runs runs.csv --unique-tokens 16384,49152
    """
    from mdm_scaling.commands import fit_crossover as made

    return made(config)


@cli.command()
@configured(PlotConfig)
@click.argument("kind", type=click.Choice(["isoflop", "frontier", "data-value", "crossover", "contour", "residuals"]))
@click.argument("table", required=False, type=click.Path(path_type=Path))
def plot(config: PlotConfig, kind: str, table: Path | None) -> dict[str, Any]:
    """A figure of runs and laws, and its numbers as CSV.

    Example: mdm-scaling plot data-value runs.csv --out value.png
    """
    from mdm_scaling.commands import plot as made

    return made(kind, config, table)


@cli.command()
@configured(StudyConfig)
def study(config: StudyConfig) -> dict[str, Any]:
    """Train, fit, draw and report: a whole comparison on one machine.

    Example: mdm-scaling study --preset quick --out study
    """
    from mdm_scaling.study import run

    return run(config)


@cli.command()
@configured(BenchConfig)
def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure the loss, the noise, the fit, the bound and the sampler on the CPU, each figure beside its target.

    Example: mdm-scaling bench --only head
    """
    from mdm_scaling import bench as measurements

    return measurements.run(config)


add_harness(cli, "mdm_scaling.harness", example="lm-eval --model mdm_scaling --model_args pretrained=FOLDER,num_mc=32 --tasks NAME")


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

"""The `moe-cpt` command."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from lm_core.errors import ConfigError, InputError, ResumeRefused, RunFailed, reading
from lm_core.harness import add_harness
from moe_cpt.config import (
    ActivationConfig,
    BenchConfig,
    ClusteringConfig,
    ClusterTextConfig,
    ConvertConfig,
    EvalConfig,
    ExportConfig,
    FeaturesConfig,
    FilterConfig,
    GradientConfig,
    GraphConfig,
    InspectConfig,
    LegacyConfig,
    PackConfig,
    PlanConfig,
    ReferenceConfig,
    ReportConfig,
    ResidualConfig,
    ScaleConfig,
    ScoreConfig,
    SFTConfig,
    SlurmCheckConfig,
    SlurmRenderConfig,
    SplitConfig,
    TensorBoardConfig,
    TokenizeConfig,
    TrainConfig,
    TrainGateConfig,
)

logger = logging.getLogger(__name__)
# what a refused resume names where --allow-data-change would accept it
LEAVES = ("data", "prob_map", "reference_loss", "max_length", "seed", "global_batch")
cli = command_group("Dense LLaMA models into mixtures of experts, and their continued pre-training.")


@cli.group()
def split() -> None:
    """Split the feed-forward layers of a dense model into experts."""


@split.command()
@configured(SplitConfig)
def random(config: SplitConfig) -> dict[str, Any]:
    """Give each expert neurons at random.

    Example: moe-cpt split random --model_path smollm2-135m --num_experts 16 --save_path split.safetensors
    """
    return _split("random", config)


@split.command()
@configured(ClusteringConfig)
def clustering(config: ClusteringConfig) -> dict[str, Any]:
    """Put neurons with similar weights into one expert.

    Example: moe-cpt split clustering --model_path smollm2-135m --num_experts 16 --save_path split.safetensors
    """
    options = {"proj_type": config.proj_type, "metric": config.metric, "max_iter": config.max_iter, "n_init": config.n_init}
    return _split("clustering", config, **options)


@split.command()
@configured(ActivationConfig)
def activation(config: ActivationConfig) -> dict[str, Any]:
    """Put neurons that are active on the same tokens into one expert.

    Example: moe-cpt split activation --model_path smollm2-135m --features act/ --num_experts 16 --save_path split.safetensors
    """
    options = {"features": config.features, "num_shared_experts": config.num_shared_experts, "k_act": config.k_act}
    return _split("activation", config, **options)


@split.command()
@configured(GraphConfig)
def graph(config: GraphConfig) -> dict[str, Any]:
    """Put neurons that are active together into one expert, by their co-activation graph.

    Example: moe-cpt split graph --model_path smollm2-135m --hidden_features_path up/ --num_experts 16 --save_path split.safetensors
    """
    names = ("hidden_features_path", "proj_type", "metric", "threshold", "batch_size")
    return _split("graph", config, **{name: getattr(config, name) for name in names})


IMPORTANCE = ("score_file_path", "proj_type", "expert_size", "criterion", "share_neurons")


@split.command()
@configured(GradientConfig)
def gradient(config: GradientConfig) -> dict[str, Any]:
    """Give each expert the neurons that matter most for its cluster of texts.

    Example: moe-cpt split gradient --model_path smollm2-135m --score_file_path score.safetensors --num_experts 16 --save_path split.safetensors
    """
    return _split("gradient", config, **{name: getattr(config, name) for name in IMPORTANCE})


@split.command()
@configured(ResidualConfig)
def residual(config: ResidualConfig) -> dict[str, Any]:
    """Share the neurons that matter for most clusters of texts, and split the others by importance.

    Example: moe-cpt split residual --model_path smollm2-135m --score_file_path score.safetensors --num_experts 14 --save_path split.safetensors
    """
    return _split("residual", config, **{name: getattr(config, name) for name in (*IMPORTANCE, "num_experts_residual")})


@cli.command(name="cluster-text")
@configured(ClusterTextConfig)
def cluster_text(config: ClusterTextConfig) -> dict[str, Any]:
    """Put texts into clusters of similar ones, one file per cluster.

    Example: moe-cpt cluster-text -d builtin:python-docs -d builtin:stdlib -n 16 -m centres/ -o clusters/
    """
    from moe_cpt.split.text_clusters import cluster

    counts = cluster(config)
    for number, count in enumerate(counts):
        print(f"cluster {number}: {count:,} texts")
    return {"output_dir": str(config.output_dir), "texts": counts}


@cli.command()
@configured(ScoreConfig)
def score(config: ScoreConfig) -> dict[str, Any]:
    """Write how much each neuron of a dense model matters for each cluster of texts.

    Example: moe-cpt score --model_name_or_path smollm2-135m --dataset clusters/ --block_size 512 --max_tokens 4096 --save_path score.safetensors
    """
    from moe_cpt.split.importance import score_clusters

    found = score_clusters(config)
    print(f"{config.save_path}: {found['clusters']} clusters, {found['samples']} samples")
    return found


@cli.command(name="train-gate")
@configured(TrainGateConfig)
def train_gate(config: TrainGateConfig) -> dict[str, Any]:
    """Train routers to find the experts whose neurons are most active on a token.

    Example: moe-cpt train-gate --model_path smollm2-135m --split_file_path split.safetensors --hidden_features_path feats/ --save_path gate.safetensors
    """
    from moe_cpt.train_gate import train_gate as fit

    shares = fit(config)
    for layer, share in enumerate(shares):
        print(f"layer {layer}: {share:.1%} of the {config.num_selects} most active experts found on held-out tokens")
    return {"save_path": str(config.save_path), "overlap": shares}


@cli.command()
@configured(FeaturesConfig)
def features(config: FeaturesConfig) -> dict[str, Any]:
    """Write what the feed-forward layers of a dense model do on a text.

    Example: moe-cpt features --model_path smollm2-135m --data builtin:python-docs --what act --max_tokens 8192 --save_path act/
    """
    from lm_core.models import load_model, load_tokenizer
    from moe_cpt.models import source_folder
    from moe_cpt.split.features import bytes_of, token_rows, write_features, write_statistics
    from moe_cpt.tensors import require_swiglu

    if config.save_path.exists() and not config.overwrite:
        raise ConfigError(f"save_path: {config.save_path} exists; add --overwrite, or choose another folder")
    folder = str(source_folder(config.model_path))
    dense = load_model(folder).train(False)
    require_swiglu(dense.config.to_dict(), config.model_path)
    tokenizer = load_tokenizer(folder)
    rows = token_rows(
        config.data,
        tokenizer,
        text_column=config.text_column,
        length=config.max_length,
        tokens=int(config.max_tokens),
        batch=config.batch_size,
    )
    tokens = sum(row.numel() for row in rows)
    print(f"{config.save_path}: {bytes_of(dense.config, tokens, config.what, config.reduce) / 2**20:,.1f} MiB for {tokens:,} tokens")
    if config.reduce == "none":
        written = write_features(config.save_path, dense, rows, config.what)
    else:
        written = write_statistics(config.save_path, dense, rows, config.what, config.reduce)
    return {"save_path": str(config.save_path), "tokens": tokens, "bytes": written}


@cli.command()
@configured(InspectConfig)
def inspect(config: InspectConfig) -> dict[str, Any]:
    """Count the parameters of a mixture, and with --data the tokens that each expert gets.

    Example: moe-cpt inspect --model moe-4of16 --data builtin:python-docs
    """
    from moe_cpt.inspection import inspect as look

    return look(config)


@cli.command(name="import-legacy")
@configured(LegacyConfig)
def import_legacy(config: LegacyConfig) -> dict[str, Any]:
    """Write a checkpoint of the original LLaMA-MoE code as a mixture of this package.

    Example: moe-cpt import-legacy --model LLaMA-MoE-v1-3_5B-4_16 --save_path moe-4of16
    """
    from lm_core.models import model_folder
    from moe_cpt.legacy import import_legacy as write

    made = write(model_folder(config.model), config.save_path, overwrite=config.overwrite)
    print(f"{config.save_path}: {made.num_selects} of {made.num_experts} experts, scale factor {made.score_scale_factor}")
    return {"save_path": str(config.save_path), "num_experts": made.num_experts, "num_selects": made.num_selects}


@cli.command()
@configured(ExportConfig)
def export(config: ExportConfig) -> dict[str, Any]:
    """Write a mixture as a folder that stock transformers load, and compare its logits.

    Example: moe-cpt export --model moe-4of16 --format llama_moe --save_path exported/
    """
    from moe_cpt.export import export as write

    return write(config)


@cli.command()
@configured(ConvertConfig)
def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the mixture of experts of a dense model and a split.

    Example: moe-cpt convert --model_path smollm2-135m --split_file_path split.safetensors --num_selects 4 --save_path moe-4of16
    """
    import torch

    from lm_core.models import load_tokenizer
    from moe_cpt.calibrate import read_scales
    from moe_cpt.convert import convert as write
    from moe_cpt.export import export as write_stock
    from moe_cpt.models import source_folder
    from moe_cpt.plan import parameter_counts
    from moe_cpt.split import Split
    from moe_cpt.split.features import token_rows
    from moe_cpt.split.legacy import read_legacy
    from moe_cpt.tensors import ModelTensors, read_config

    source, path = source_folder(config.model_path), config.split_file_path
    if path.is_dir():
        stored = read_config(source)
        chosen = read_legacy(path, ModelTensors(source), stored["num_hidden_layers"], stored["intermediate_size"])
    else:
        chosen = Split.load(path)
    if config.format != "llama_moe" and config.save_path.exists() and not config.overwrite:
        raise ConfigError(f"save_path: {config.save_path} exists; add --overwrite, or choose another folder")
    file = config.score_scale_factor_file_path
    rows = []
    if config.gate_init == "ridge" and config.calibration_data:
        tokenizer, tokens = load_tokenizer(str(source)), int(config.calibration_tokens)
        rows = token_rows(config.calibration_data, tokenizer, text_column=config.text_column, length=512, tokens=tokens)
    # a mixture of another format is exported from one of ours
    own = config.save_path if config.format == "llama_moe" else config.save_path.with_name(config.save_path.name + ".llama_moe")
    made = write(
        source,
        chosen,
        own,
        num_selects=config.num_selects,
        score_scale_factor=config.score_scale_factor if file is None else read_scales(file, len(chosen.indices)),
        gate_network=config.gate_network,
        gate_init=config.gate_init,
        calibration=rows,
        trained_gate=config.select_file_path,
        add_noise=config.add_noise,
        gate_type=config.gate_type,
        calculator_type=config.calculator_type,
        add_weight_norm=config.add_weight_norm,
        moe_layers=config.chosen_layers(),
        use_softmax=config.use_softmax,
        multiply_gate_scores=config.multiply_gate_scores,
        dtype=None if config.dtype == "source" else getattr(torch, config.dtype),
        seed=config.seed,
        overwrite=config.overwrite or config.format != "llama_moe",
    )
    if config.format != "llama_moe":
        try:
            write_stock(ExportConfig(model=str(own), save_path=config.save_path, format=config.format, overwrite=config.overwrite))
        finally:
            shutil.rmtree(own)
    counts = parameter_counts(made.to_dict())
    print(f"{config.save_path}: {made.num_selects} of {made.num_experts} experts, scale factor {made.score_scale_factor}")
    print(f"parameters  dense {counts.dense:,}  total {counts.total:,}  active {counts.active:,}")
    return {"save_path": str(config.save_path), "dense": counts.dense, "total": counts.total, "active": counts.active}


@cli.command()
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Continue the pre-training of a mixture.

    Example: moe-cpt train --model smollm2-135m --from_dense random --data builtin:python-docs --block_size 256 --max_steps 20 --warmup 2
    """
    require_launched(config)
    if config.require_checklist:
        _require(config)
    if not config.limits().limits.keys() & {"epochs", "hours", "targets"} and os.environ.get("RANK", "0") == "0":
        plan = config.plan()
        logger.info("\n".join([plan.header, *plan.lines(config.warmup, config.eval_steps())]))
    from lm_core.run import run
    from moe_cpt.method import MoeCPT

    method = MoeCPT(config)
    with naming_the_leave():
        result = run(config, method)
    method.keep_split()
    return result


@cli.command()
@configured(SFTConfig)
def sft(config: SFTConfig) -> dict[str, Any]:
    """Tune a mixture on conversations.

    Example: moe-cpt sft --model_name_or_path runs/moe/final --dataset_dir_or_path builtin:python-docs --model_max_length 256 --max_steps 20
    """
    require_launched(config)
    from lm_core.run import run
    from moe_cpt.sft import SupervisedTuning

    method = SupervisedTuning(config)
    with naming_the_leave():
        result = run(config, method)
    method.keep_split()
    return result


@cli.command(name="eval")
@configured(EvalConfig)
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Held-out loss by source.

    Example: moe-cpt eval --model smollm2-135m --eval-data builtin:python-docs --block_size 512
    """
    return _evaluate(config)


@cli.command(name="ref-loss")
@configured(ReferenceConfig)
def ref_loss(config: ReferenceConfig) -> dict[str, Any]:
    """Write the held-out losses of a model as the reference of a dynamic data selection.

    Example: moe-cpt ref-loss --model smollm2-135m --validation_dir builtin:python-docs,builtin:stdlib -o ref.json
    """
    found = _evaluate(config)
    config.output.write_text(json.dumps({source: values["loss"] for source, values in found.items()}, indent=1) + "\n")
    return found


@cli.command()
@configured(PlanConfig)
def plan(config: PlanConfig) -> dict[str, Any]:
    """Print what a run would do: updates, samples, parameters, and its hours where a speed is given.

    Example: moe-cpt plan --model smollm2-135m --from_dense random --num_tokens 1B --seconds_per_step 2
    """
    from lm_core.config import to_dict
    from moe_cpt.method import MoeCPT
    from moe_cpt.plan import hours_of, parameter_counts

    made, model = config.plan(), MoeCPT(config).model_config()
    counts = parameter_counts(model.to_dict())
    seconds = config.seconds_per_step if config.logdir is None else seconds_per_step(config.logdir)
    lines = [made.header, *made.lines(config.warmup, config.eval_steps())]
    lines.append(f"parameters: active {counts.active}, total {counts.total}, dense {counts.dense}")
    lines += [] if seconds is None else [hours_of(made.max_steps, seconds)]
    print(*lines, f"launch: {json.dumps(to_dict(config), default=str)}", sep="\n")
    return {
        "max_steps": made.max_steps,
        "global_batch_size": made.global_batch,
        "tokens_per_batch": made.tokens_per_batch,
        "parameters": {"active": counts.active, "total": counts.total, "dense": counts.dense},
        "hours": None if seconds is None else made.max_steps * seconds / 3600,
    }


@cli.command()
@configured(TrainConfig)
def checklist(config: TrainConfig) -> dict[str, Any]:
    """Print the values of a run that are worth a look before it starts, and mark those that look wrong.

    Example: moe-cpt checklist --model smollm2-135m --from_dense random --data builtin:python-docs --num_tokens 1M --comment "first try"
    """
    from moe_cpt.checklist import checklist as items_of

    items = items_of(config)
    print(*items, sep="\n")
    return {"items": [{"name": item.name, "value": item.value, "problem": item.problem} for item in items]}


@cli.command(name="calibrate-scale")
@configured(ScaleConfig)
def calibrate_scale(config: ScaleConfig) -> dict[str, Any]:
    """Write score scale factors measured against the dense model.

    Example: moe-cpt calibrate-scale --model_path moe-4of16 --dense_path smollm2-135m --data builtin:python-docs --mode lsq -o scales.json
    """
    from moe_cpt.calibrate import calibrate

    scales = calibrate(config)
    config.save_path.write_text(json.dumps(scales) + "\n")
    print(f"{config.save_path}: {config.mode} factors from {min(scales):.4g} to {max(scales):.4g}")
    return {"save_path": str(config.save_path), "scales": scales}


@cli.command()
@configured(TokenizeConfig)
def tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Text to lines of token ids, file by file.

    Example: moe-cpt tokenize -i raw/ -o tokenised/ -t smollm2-135m -f jsonl -p 4
    """
    from moe_cpt.corpus import tokenize as run

    return _counted(run(config))


@cli.command()
@configured(PackConfig)
def pack(config: PackConfig) -> dict[str, Any]:
    """Tokenised documents to memory-mapped shards, source by source.

    Example: moe-cpt pack -i tokenised/ -o packed/ -t smollm2-135m
    """
    from moe_cpt.corpus import pack as run

    return _counted(run(config))


@cli.command(name="filter")
@configured(FilterConfig)
def keep(config: FilterConfig) -> dict[str, Any]:
    """Keep the records whose number lies within bounds, both included.

    Example: moe-cpt filter -i raw/ -o fluent/ --column fluency --min 0.7 --report kept.json
    """
    from moe_cpt.corpus import keep_between

    counts = _counted(keep_between(config))
    if config.report is not None:
        config.report.write_text(json.dumps(counts, indent=1) + "\n")
    return counts


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@configured(ReportConfig)
def report(config: ReportConfig, runs: tuple[Path, ...]) -> dict[str, Any]:
    """Compare runs: held-out loss by source before and after training, router loads, and shares of the sources over time.

    Example: moe-cpt report runs/random runs/activation --output report/
    """
    from moe_cpt.report import compare

    return compare(runs, config.output)


@cli.group()
def slurm() -> None:
    """Scripts for clusters."""


@slurm.command(name="check")
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@configured(SlurmCheckConfig)
def slurm_check(config: SlurmCheckConfig, script: Path) -> dict[str, Any]:
    """Find contradictions in a Slurm script before it waits in a queue; exit code 3 for errors.

    Example: moe-cpt slurm check launchers/moe_cpt/fpt.sh --fix
    """
    from moe_cpt.slurm import check_slurm

    if config.header is not None and not config.header.is_file():
        raise ConfigError(f"header: {config.header} does not exist; name the log of a run")
    header = None if config.header is None else config.header.read_text()
    found = check_slurm(script.read_text(), folder=Path.cwd(), max_cpus=config.max_cpus, header=header, make_folders=config.fix)
    print(*([str(finding) for finding in found] or [f"{script}: no contradictions"]), sep="\n")
    if any(finding.severity == "error" for finding in found):
        # after the findings are printed, as JSON where that is wanted
        click.get_current_context().call_on_close(_failed)
    return {"findings": [asdict(finding) for finding in found]}


@slurm.command(name="render")
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@configured(SlurmRenderConfig)
def slurm_render(config: SlurmRenderConfig, script: Path) -> dict[str, Any]:
    """Write a Slurm script for other numbers of machines and GPUs.

    Example: moe-cpt slurm render launchers/moe_cpt/lora.sh --nodes 4 --gpus 8 --output launchers/moe_cpt/lora_4.sh
    """
    from moe_cpt.slurm import check_slurm, rendered

    if config.output.exists() and not config.overwrite:
        raise ConfigError(f"output: {config.output} exists; add --overwrite, or choose another file")
    text = rendered(script.read_text(), config.nodes, config.gpus)
    if wrong := [finding for finding in check_slurm(text, folder=Path.cwd()) if finding.code in ("S01", "S02", "S09")]:
        raise InputError(f"script: {script} cannot be made consistent ({wrong[0]}); correct it first")
    config.output.write_text(text)
    config.output.chmod(0o755)
    return {"output": str(config.output)}


def _failed() -> None:
    raise click.exceptions.Exit(RunFailed.code)


@cli.command(name="tb-spec")
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


@cli.group()
def data() -> None:
    """Look at training data."""


@data.command()
@configured(TrainConfig)
def check(config: TrainConfig) -> dict[str, Any]:
    """Read the data as train would, and print documents, tokens, samples and shares by source.

    Example: moe-cpt data check --model smollm2-135m --dataset_dir packed/ --validation_dir val/ --prob_map uniform
    """
    from lm_core.data.vocab import build_tokenizer
    from moe_cpt.data import described

    found = described(config, build_tokenizer(config))
    for source, facts in found.items():
        print(f"{source}:", ", ".join(f"{name} {value:,.6g}" for name, value in facts.items()))
    return found


@cli.command()
@click.argument("measurements", nargs=-1)
@configured(BenchConfig)
def bench(config: BenchConfig, measurements: tuple[str, ...]) -> dict[str, Any]:
    """Measure speed, memory and quality on the CPU, each figure beside its target.

    Example: moe-cpt bench layer
    """
    from moe_cpt import bench

    return bench.run(replace(config, only=[*config.only, *measurements]))


def _counted(counts: Mapping[str, Any]) -> dict[str, Any]:
    for name, count in counts.items():
        print(f"{name}: kept {count.kept:,}, left out {count.dropped:,}" + (f", tokens {count.tokens:,}" if count.tokens else ""))
    return {name: asdict(count) for name, count in counts.items()}


def _evaluate(config: EvalConfig) -> dict[str, Any]:
    from moe_cpt.evaluate import score

    scores = score(config)
    for source, found in scores.items():
        print(f"{source}: loss {found.loss:.4f} +- {found.standard_error:.4f}  perplexity {found.perplexity:.2f}  tokens {found.tokens:,}")
    return {
        source: {"loss": found.loss, "standard_error": found.standard_error, "perplexity": found.perplexity, "tokens": found.tokens}
        for source, found in scores.items()
    }


def _require(config: TrainConfig) -> None:
    """Print the checklist; raise RunFailed when an item fails."""
    from moe_cpt.checklist import checklist as items_of

    items = items_of(config)
    print(*items, sep="\n", file=sys.stderr)
    if wrong := [item.name for item in items if item.problem]:
        raise RunFailed(f"require_checklist: {', '.join(wrong)} should be looked at again; correct them, or leave out --require-checklist")


@contextmanager
def naming_the_leave() -> Iterator[None]:
    """A resume that is refused for what --allow-data-change accepts says so."""
    try:
        yield
    except ResumeRefused as refusal:
        field = str(refusal).partition(":")[0].replace(" ", "_")
        if field in LEAVES:
            raise ResumeRefused(f"{refusal}, or add --allow-data-change") from None
        raise


def seconds_per_step(logdir: Path) -> float:
    """Mean seconds of an update in an earlier run."""
    path = logdir / "metrics.jsonl"
    way_out = "name a run folder, or give --seconds-per-step"
    with reading(f"logdir: {path}", way_out):
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        if not rows or not rows[-1]["step"]:
            raise InputError(f"logdir: {logdir} holds no metrics of a run with steps; {way_out}")
        return float(rows[-1]["seconds"] / rows[-1]["step"])


def require_launched(config: TrainConfig) -> None:
    """Raise ConfigError when the run has not the processes that the options name."""
    if config.dry_run or (config.num_nodes is None and config.num_gpu_per_node is None):
        return
    for variable, name in (("SLURM_NNODES", "num_nodes"), ("SLURM_GPUS_ON_NODE", "num_gpu_per_node")):
        given, named = os.environ.get(variable, ""), getattr(config, name)
        if given.isdigit() and named is not None and int(given) != named:
            raise ConfigError(f"{name}: {named}, but {variable} is {given}; correct one of them (moe-cpt slurm check finds such lines)")
    running = int(os.environ.get("WORLD_SIZE", config.num_processes))
    if config.devices() != running:
        named = f"{config.num_nodes or 1} x {config.num_gpu_per_node or 1} processes"
        raise ConfigError(f"num_gpu_per_node: {named} are named, but this run has {running}; correct them, or the launcher")


def _split(method: str, config: SplitConfig, **options: Any) -> dict[str, Any]:
    from moe_cpt.models import source_folder
    from moe_cpt.split import described, split_ffn

    if config.save_path.exists() and not config.overwrite:
        raise ConfigError(f"save_path: {config.save_path} exists; add --overwrite, or choose another file")
    folder = source_folder(config.model_path)
    made = split_ffn(folder, method, num_experts=config.num_experts, seed=config.seed, **options)
    made.save(config.save_path)
    neurons, costs = made.indices[0].shape[1], made.args.get("cost", [])
    shared = len(made.shared[0]) if made.shared else 0
    for layer in range(len(made.indices)):
        print(described(made, layer))
    print(f"{config.save_path}: {len(made.indices)} layers, {made.num_experts} experts of {neurons} neurons, {shared} shared neurons")
    return {
        "save_path": str(config.save_path),
        "layers": len(made.indices),
        "num_experts": made.num_experts,
        "shared": shared,
        "cost": costs,
    }


add_harness(cli, "moe_cpt.model")


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

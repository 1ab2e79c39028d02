"""The `moe-cpt` command."""

from __future__ import annotations

import os
import sys
from typing import Any

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from lm_core.errors import ConfigError
from moe_cpt.config import ConvertConfig, EvalConfig, SplitConfig, TrainConfig

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


@cli.command()
@configured(ConvertConfig)
def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the mixture of experts of a dense model and a split.

    Example: moe-cpt convert --model_path smollm2-135m --split_file_path split.safetensors --num_selects 4 --save_path moe-4of16
    """
    from lm_core.models import model_folder
    from moe_cpt.convert import convert as write
    from moe_cpt.plan import parameter_counts
    from moe_cpt.split import Split

    made = write(
        model_folder(config.model_path),
        Split.load(config.split_file_path),
        config.save_path,
        num_selects=config.num_selects,
        score_scale_factor=config.score_scale_factor,
        gate_network=config.gate_network,
        gate_init=config.gate_init,
        use_softmax=config.use_softmax,
        multiply_gate_scores=config.multiply_gate_scores,
        seed=config.seed,
        overwrite=config.overwrite,
    )
    counts = parameter_counts(made.to_dict())
    print(f"{config.save_path}: {made.num_selects} of {made.num_experts} experts, scale factor {made.score_scale_factor:g}")
    print(f"parameters  dense {counts.dense:,}  total {counts.total:,}  active {counts.active:,}")
    return {"save_path": str(config.save_path), "dense": counts.dense, "total": counts.total, "active": counts.active}


@cli.command()
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Continue the pre-training of a mixture.

    Example: moe-cpt train --model smollm2-135m --from_dense random --data builtin:python-docs --block_size 256 --max_steps 20 --warmup 2
    """
    require_launched(config)
    if not config.limits().limits.keys() & {"epochs", "hours", "targets"} and os.environ.get("RANK", "0") == "0":
        print(config.plan().header, file=sys.stderr)
    from lm_core.run import run
    from moe_cpt.method import MoeCPT

    return run(config, MoeCPT(config))


@cli.command(name="eval")
@configured(EvalConfig)
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Held-out loss by source.

    Example: moe-cpt eval --model smollm2-135m --eval-data builtin:python-docs --block_size 512
    """
    from moe_cpt.evaluate import score

    scores = score(config)
    for source, found in scores.items():
        print(f"{source}: loss {found.loss:.4f} +- {found.standard_error:.4f}  perplexity {found.perplexity:.2f}  tokens {found.tokens:,}")
    return {
        source: {"loss": found.loss, "standard_error": found.standard_error, "perplexity": found.perplexity, "tokens": found.tokens}
        for source, found in scores.items()
    }


def require_launched(config: TrainConfig) -> None:
    """Raise ConfigError when the run has not the processes that the options name."""
    if config.dry_run or (config.num_nodes is None and config.num_gpu_per_node is None):
        return
    running = int(os.environ.get("WORLD_SIZE", config.num_processes))
    if config.devices() != running:
        named = f"{config.num_nodes or 1} x {config.num_gpu_per_node or 1} processes"
        raise ConfigError(f"num_gpu_per_node: {named} are named, but this run has {running}; correct them, or the launcher")


def _split(method: str, config: SplitConfig) -> dict[str, Any]:
    from lm_core.models import model_folder
    from moe_cpt.split import split_ffn

    if config.save_path.exists() and not config.overwrite:
        raise ConfigError(f"save_path: {config.save_path} exists; add --overwrite, or choose another file")
    folder = model_folder(config.model_path)
    made = split_ffn(folder, method, num_experts=config.num_experts, seed=config.seed)
    made.save(config.save_path)
    print(f"{config.save_path}: {len(made.indices)} layers, {made.num_experts} experts of {made.indices[0].shape[1]} neurons each")
    return {"save_path": str(config.save_path), "layers": len(made.indices), "num_experts": made.num_experts}


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)

"""Commands that split a dense model, and those that measure what a split goes by."""

from __future__ import annotations

from typing import Any

import click

from lm_core.cli import Command, Group, configured
from moe_cpt.options.splits import (
    ActivationConfig,
    ClusteringConfig,
    ClusterTextConfig,
    FeaturesConfig,
    GradientConfig,
    GraphConfig,
    ResidualConfig,
    ScoreConfig,
    SplitConfig,
)
from moe_cpt.targets import require_free

IMPORTANCE = ("score_file_path", "proj_type", "expert_size", "criterion", "share_neurons")


@click.group(cls=Group)
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


def _split(method: str, config: SplitConfig, **options: Any) -> dict[str, Any]:
    from moe_cpt.models import source_folder
    from moe_cpt.split import described, split_ffn

    require_free("save_path", config.save_path, config.overwrite)
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


@click.command(cls=Command)
@configured(FeaturesConfig)
def features(config: FeaturesConfig) -> dict[str, Any]:
    """Write what the feed-forward layers of a dense model do on a text.

    Example: moe-cpt features --model_path smollm2-135m --data builtin:python-docs --what act --max_tokens 8192 --save_path act/
    """
    from lm_core.models import load_model, load_tokenizer
    from moe_cpt.models import source_folder
    from moe_cpt.split.features import bytes_of, token_rows, write_features, write_statistics
    from moe_cpt.tensors import require_swiglu

    require_free("save_path", config.save_path, config.overwrite)
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


@click.command("cluster-text", cls=Command)
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


@click.command(cls=Command)
@configured(ScoreConfig)
def score(config: ScoreConfig) -> dict[str, Any]:
    """Write how much each neuron of a dense model matters for each cluster of texts.

    Example: moe-cpt score --model_name_or_path smollm2-135m --dataset clusters/ --block_size 512 --max_tokens 4096 --save_path score.safetensors
    """
    from moe_cpt.split.importance import score_clusters

    found = score_clusters(config)
    print(f"{config.save_path}: {found['clusters']} clusters, {found['samples']} samples")
    return found

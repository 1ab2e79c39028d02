"""Options of the commands that split a dense model, and of those that measure what a split goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lm_core.config import Count, change, config, opt
from lm_core.errors import ConfigError


@config
class SplitConfig:
    """Split the feed-forward layers of a dense model into experts."""

    model_path: str = opt(help="Dense model: a folder, a .gguf file, smollm2-135m or a hub id.")
    save_path: Path = opt(help="File to write, for example split.safetensors.", flags=("-o",))
    num_experts: int = opt(16, "Routed experts per layer.", ge=1)
    seed: int = opt(1227, "Address of all randomness.", ge=0)
    overwrite: bool = opt(False, "Replace what is at --save-path.")


@config
class ClusteringConfig(SplitConfig):
    """Split by similar weights: balanced k-means of the normalised rows of one projection."""

    proj_type: Literal["up_proj", "gate_proj"] = opt("up_proj", "Projection whose rows are compared.")
    metric: Literal["l2", "cos"] = opt("l2", "Distance of a row to a centre.")
    max_iter: int = opt(500, "Most iterations of k-means.", ge=1)
    n_init: int = opt(1, "Starts, of which the best is kept.", ge=1)


@config
class ActivationConfig(SplitConfig):
    """Split by common activity: balanced k-means of the neurons' activations, the most active neurons shared."""

    num_experts: int = change(SplitConfig, "num_experts", help="Routed experts per layer; with the shared ones they divide the neurons.")
    features: Path = opt(help="Folder written by moe-cpt features --what act.")
    num_shared_experts: int = opt(0, "Experts made of the most active neurons, which see every token.", ge=0)
    k_act: int = opt(10, "Neurons that count as active on a token.", ge=1)


@config
class GraphConfig(SplitConfig):
    """Split by common activity: parts of the co-activation graph that cut few of its edges."""

    hidden_features_path: Path = opt(help="Folder written by moe-cpt features --what up (or gate).")
    proj_type: Literal["up_proj", "gate_proj"] = opt("up_proj", "Projection whose outputs are compared.")
    metric: Literal["l1_norm", "l2_norm", "plain"] = opt("l1_norm", "Size of an activation: its absolute value, its square, or itself.")
    threshold: float = opt(1.0, "Most that one batch of tokens adds to an edge.", gt=0)
    batch_size: int = opt(16, "Tokens whose common activity is capped together.", ge=1)


@config
class GradientConfig(SplitConfig):
    """Split by importance: every expert takes the neurons that matter most for its cluster of texts."""

    num_experts: int = change(SplitConfig, "num_experts", help="Routed experts per layer, one per cluster of texts.")
    score_file_path: Path = opt(help="File written by moe-cpt score.")
    proj_type: Literal["up_proj", "gate_proj"] = opt("up_proj", "Projection whose scores count.")
    expert_size: int | None = opt(None, "Neurons of an expert; default: an equal part of all.", ge=1)
    criterion: Literal["max", "min"] = opt("max", "Take the neurons of the highest or of the lowest scores.")
    share_neurons: bool = opt(False, "Let a neuron be in several experts, or in none.")


@config
class ResidualConfig(GradientConfig):
    """Split by importance, with the neurons that matter for most clusters in shared experts."""

    num_experts_residual: int = opt(2, "Shared experts, which see every token; 14 routed and 2 shared ones are 16 equal parts.", ge=1)


@config
class ClusterTextConfig:
    """Put texts into clusters of similar ones."""

    data_dir: list[str] = opt(
        help="Texts: a folder or file of .jsonl, or written like --data of train; repeatable.", flags=("-d", "--data"), min_length=1
    )
    output_dir: Path = opt(help="Folder to write: one .jsonl file per cluster.", flags=("-o",))
    model_dir: Path = opt(help="Folder for the clusters' centres.", flags=("-m",))
    num_clusters: int = opt(16, "Clusters.", ge=2, flags=("-n",))
    do_train: bool = opt(True, "Find the centres; without it those in --model_dir are used.")
    do_eval: bool = opt(True, "Write every text into the file of its cluster.")
    encoder: Literal["tfidf", "sentence"] = opt("tfidf", "Compare texts by their words, or by a model's mean hidden state.")
    encoder_path: str | None = opt(None, "With --encoder sentence: the model.")
    text_column: str = opt("text", "Column or key that holds the text.", flags=("--content_column",))
    seed: int = opt(1227, "Address of all randomness.", ge=0)
    overwrite: bool = opt(False, "Write into folders that exist.")

    def check(self) -> None:
        if not self.do_train and not self.do_eval:
            raise ConfigError("do_train: neither --do_train nor --do_eval, so nothing is done; leave one of them on")
        if (self.encoder == "sentence") != (self.encoder_path is not None):
            raise ConfigError(
                f"encoder_path: {self.encoder_path} does not go with --encoder {self.encoder}; sentence needs one, tfidf none"
            )


@config
class ScoreConfig:
    """How much each neuron matters for each cluster of texts, by the gradient of the loss."""

    model_name_or_path: str = opt(help="Dense model: a folder, a .gguf file, smollm2-135m or a hub id.", flags=("--model",))
    dataset: Path = opt(help="Folder written by moe-cpt cluster-text.")
    save_path: Path = opt(help="File to write, for example score.safetensors.", flags=("-o",))
    kernel: Literal["plain", "l1_norm", "l2_norm"] = opt("l1_norm", "Size of a gradient: itself, its absolute value, or its square.")
    accumulate_level: Literal["sample", "total"] = opt("sample", "Take the size for every sample, or of the mean over all samples.")
    importance_type: Literal["feature_grad", "feature_change"] = opt(
        "feature_change", "Derivative of the loss by a hidden value, or times that value."
    )
    max_length: int = opt(4096, "Tokens per sample.", ge=2, flags=("--block_size",))
    batch_size: int = opt(1, "Samples in one pass.", ge=1)
    max_tokens: Count = opt(0, "Tokens per cluster; 0 uses all.", ge=0)
    text_column: str = opt("text", "Key that holds the text.", flags=("--content_column",))
    overwrite: bool = opt(False, "Replace what is at --save-path.")


@config
class FeaturesConfig:
    """What the feed-forward layers of a dense model do on a text."""

    model_path: str = opt(help="Dense model: a folder, a .gguf file, smollm2-135m or a hub id.")
    data: list[str] = opt(help="Text, written like --data of train.", min_length=1)
    text_column: str = opt("text", "Column or key that holds the text.")
    save_path: Path = opt(help="Folder to write, one file per layer.", flags=("-o",))
    max_length: int = opt(2048, "Tokens per sample.", ge=2, flags=("--block_size",))
    batch_size: int = opt(4, "Samples in one forward pass.", ge=1)
    max_tokens: Count = opt(1_000_000, "Tokens to run on.", ge=1)
    what: list[Literal["inputs", "gate", "up", "act"]] = opt(
        help="Tensors to keep, repeatable: the layer's inputs, its two projections, or their product after the activation.",
        factory=lambda: ["act"],
    )
    reduce: Literal["none", "coactivation", "rate", "energy"] = opt(
        "none",
        "Keep the values of every token, or of the text only the mean over tokens of |a| |a'| for all pairs of values, of a > 0, or of the square.",
    )
    overwrite: bool = opt(False, "Write into a folder that exists.")

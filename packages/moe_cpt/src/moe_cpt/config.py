"""Options of `moe-cpt`: the spellings of the original guide over the options that every command shares."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lm_core.config import Count, change, config, explicit, opt
from lm_core.errors import ConfigError
from lm_core.flags import Word
from lm_core.guide import Meaning, TrainerSpellings, right
from lm_core.options import DataOptions, EngineOptions, ModelOptions, OptimOptions, OutputOptions, RunConfig
from lm_core.progress import Budget, Every, Progress, Size
from lm_core.schedule import learning_rate
from moe_cpt.plan import Plan, steps_of_tokens

GateNetwork = Literal["mlp", "linear"]
GateType = Literal[
    "TopKBalancedNoisyGate", "SwitchBalancedGate", "UniformPlainGate", "UniformLearnableGate", "RandomPlainGate", "RandomLearnableGate"
]
CalculatorType = Literal["UniversalCalculator", "UniformCalculator", "SwitchDropTokenCalculator"]
GATE_TYPE = "Which experts see a token: the best K with noise in training, the best one by probability, all of them, or K at random."
CALCULATOR_TYPE = (
    "Experts take all tokens sent to them; Uniform needs all experts selected; SwitchDropToken refuses those beyond a capacity."
)
# options that only a conversion uses: a checkpoint's router and experts have their shape already
CONVERSION = ("num_experts", "gate_network")
ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "trainable", "modules_to_save", "peft_path")
DYNAMIC = ("dynamic_eta", "dynamic_smoothing", "dynamic_min_weight", "dynamic_max_weight")
SIZES_OF_STEP = ("micro_batch_size", "accumulate", "max_length", "num_nodes", "num_gpu_per_node", "num_processes")
SAVE_PATH = "Folder to write; an existing one needs --overwrite."


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
class TrainGateConfig:
    """Routers that are trained to find the experts whose neurons are most active."""

    model_path: str = opt(help="Dense model: a folder, a .gguf file, smollm2-135m or a hub id.")
    split_file_path: Path = opt(help="Split of that model, as written by moe-cpt split.")
    hidden_features_path: Path = opt(help="Folder written by moe-cpt features --what inputs --what act.")
    save_path: Path = opt(help="File to write, for example gate.safetensors.", flags=("-o",))
    gate_network: GateNetwork = opt("mlp", "Shape of the router.", flags=("--gate_network_type",))
    num_selects: int = opt(4, "Experts whose choice is compared on held-out tokens.", ge=1)
    select_criterion: Literal["plain", "positive", "l1_norm", "l2_norm"] = opt(
        "l2_norm", "How active an expert is: the sum of its hidden values, of their positive parts, or their norm."
    )
    epochs: int = opt(100, "Passes over the tokens.", ge=1)
    lr: float = opt(0.1, "Learning rate of the first step; it falls to zero.", gt=0)
    batch_size: int = opt(1024, "Tokens per step.", ge=1)
    train_percent: float = opt(0.95, "Share of the tokens to train on; the others are held out.", gt=0, lt=1)
    seed: int = opt(1227, "Address of all randomness.", ge=0)
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


@config
class InspectConfig:
    """Parameters of a mixture, and how its routers choose on a text."""

    model: str = opt(help="Mixture written by moe-cpt convert or train.")
    data: list[str] = opt(help="Text to route, written like --data of train; without it only parameters are counted.", factory=list)
    text_column: str = opt("text", "Column or key that holds the text.")
    max_length: int = opt(512, "Tokens per sample.", ge=2, flags=("--block_size",))
    max_tokens: Count = opt(8192, "Tokens to route.", ge=1)


@config
class LegacyConfig:
    """A checkpoint of the original LLaMA-MoE code in this package's layout."""

    model: str = opt(help="Folder of the checkpoint.")
    save_path: Path = opt(help=SAVE_PATH, flags=("-o",))
    overwrite: bool = opt(False, "Replace what is at --save-path.")


@config
class ExportConfig:
    """A mixture as a folder that stock transformers load."""

    model: str = opt(help="Mixture written by moe-cpt convert or train.")
    save_path: Path = opt(help=SAVE_PATH, flags=("-o",))
    format: Literal["llama_moe", "mixtral", "granitemoeshared", "llama"] = opt(
        help="llama_moe brings its own code; mixtral and granitemoeshared need a linear router, the second one shared experts; llama is the dense model."
    )
    peft_path: Path | None = opt(None, "Adapter of a run with --mode lora, to be merged into --model first.")
    keep_noise: bool = opt(False, "With llama_moe: keep the weights of routing noise.")
    overwrite: bool = opt(False, "Replace what is at --save-path.")

    def check(self) -> None:
        if self.keep_noise and self.format != "llama_moe":
            raise ConfigError(f"keep_noise: {self.format} has no place for noise; use --format llama_moe, or leave it out")


@config
class ConvertConfig:
    """Write the mixture of experts of a dense model and a split."""

    model_path: str = opt(help="Dense model: a folder, a .gguf file, smollm2-135m or a hub id.")
    split_file_path: Path = opt(help="Split of that model, as written by moe-cpt split, or a folder of lists of the original code.")
    save_path: Path = opt(help=SAVE_PATH, flags=("-o",))
    num_selects: int = opt(4, "Experts that see a token.", ge=1)
    score_scale_factor_file_path: Path | None = opt(None, "JSON list with one factor per layer, as written by moe-cpt calibrate-scale.")
    score_scale_factor: float | None = opt(
        None,
        "Factor of the routed experts' output; default: experts over selected experts.",
        gt=0,
        flags=("--moe_calculator_score_scale_factor",),
    )
    gate_network: GateNetwork = opt("mlp", "Shape of the router.", flags=("--gate_network_type",))
    gate_init: Literal["normal", "zeros", "centroid", "ridge", "trained"] = opt(
        "normal",
        "Initial router: random, zero (needs training with noise before it routes), the experts' mean gate rows, a fit to their output on a "
        "text, or that of --select_file_path.",
    )
    select_file_path: Path | None = opt(None, "With --gate_init trained: file written by moe-cpt train-gate.")
    calibration_data: list[str] = opt(help="Text for --gate-init ridge, written like --data of train.", factory=list)
    calibration_tokens: Count = opt(65536, "Tokens for --gate-init ridge.", ge=1)
    text_column: str = opt("text", "Column or key that holds the text.")
    gate_type: GateType = opt("TopKBalancedNoisyGate", GATE_TYPE)
    calculator_type: CalculatorType = opt("UniversalCalculator", CALCULATOR_TYPE)
    moe_layers: str = opt("all", "Layers to convert: all, a comma list such as 2,3,4, or -A-B for all but the first A and the last B.")
    add_noise: bool = opt(True, "Learn the spread of routing noise, used in training.")
    add_weight_norm: bool = opt(False, "Learn the factor of the routed experts' output, one number per layer.")
    use_softmax: bool = opt(True, "Scores are a softmax over the selected logits, not the logits.")
    multiply_gate_scores: bool = opt(True, "Multiply expert outputs by their scores; without it every selected expert has weight 1.")
    dtype: Literal["source", "float32", "bfloat16", "float16"] = opt("source", "Type of the weights that are written.")
    format: Literal["llama_moe", "mixtral", "granitemoeshared"] = opt(
        "llama_moe", "A mixture to train here, or one that stock transformers load: mixtral, or granitemoeshared where experts are shared."
    )
    seed: int = opt(1227, "Address of all randomness.", ge=0)
    overwrite: bool = opt(False, "Replace what is at --save-path.")

    def check(self) -> None:
        if self.score_scale_factor is not None and self.score_scale_factor_file_path is not None:
            raise ConfigError(f"score_scale_factor: {self.score_scale_factor} and a file of factors are both given; drop one of them")
        if (self.gate_init == "trained") != (self.select_file_path is not None):
            raise ConfigError(f"select_file_path: {self.select_file_path} does not go with --gate_init {self.gate_init}; trained needs one")
        if self.format != "llama_moe" and self.gate_network != "linear":
            raise ConfigError(f"format: {self.format} has a linear router; add --gate_network linear")
        self.chosen_layers()

    def chosen_layers(self) -> str | list[int] | dict[str, int]:
        """`moe_layers` as the mixture's config has it."""
        text = self.moe_layers.strip()
        if text == "all":
            return text
        if match := re.fullmatch(r"-(\d+)-(\d+)", text):
            return {"skip_first": int(match[1]), "skip_last": int(match[2])}
        if not re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
            raise ConfigError(f"moe_layers: {self.moe_layers!r} is not all, a comma list of layers, or -A-B; write for example 2,3,4")
        return [int(part) for part in text.split(",")]


@config
class SlurmCheckConfig:
    """What to compare a Slurm script with."""

    max_cpus: int = opt(128, "Most CPUs per task that the cluster has.", ge=1)
    header: Path | None = opt(None, "Log of a run: its first lines must say what the script computes.")
    fix: bool = opt(False, "Make the folders of the logs.")


@config
class SlurmRenderConfig:
    """Machines of a Slurm script."""

    nodes: int = opt(help="Machines.", ge=1)
    gpus: int = opt(help="GPUs of each machine.", ge=1)
    output: Path = opt(help="Script to write, for scripts of this repository beside the original.", flags=("-o",))
    overwrite: bool = opt(False, "Replace what is at --output.")


@config
class ReportConfig:
    """Where to write pictures of runs."""

    output: Path = opt(help="Folder for the pictures and the table.", flags=("-o",))


@config
class TensorBoardConfig:
    """Where to show runs."""

    port: int = opt(8001, "Port of the page.", ge=1, le=65535)
    run: bool = opt(False, "Start TensorBoard instead of printing its command.")


@config
class TokenizeConfig:
    """Text to tokenised documents."""

    input: Path = opt(help="File or folder of raw text.", flags=("-i",))
    output: Path = opt(help="Folder to write; its files are named like those of --input.", flags=("-o",))
    tokenizer: str = opt(help="Tokenizer: bytes, a folder, smollm2-135m or a hub id.", flags=("-t",))
    format: Literal["jsonl", "txt"] = opt(help="One JSON object per line, or one document per line.", flags=("-f",))
    content_column: str = opt("content", "Key that holds the text.", flags=("-c",))
    src_tokenizer: str | None = opt(None, "The column holds ids of this tokenizer, which are decoded first.", flags=("-s",))
    use_fast: bool = opt(False, "Refuse a tokenizer that is not one of those in Rust, which are taken wherever there is one.")
    num_proc: int | None = opt(None, "Files that are worked on at a time; default: one per processor.", ge=1, flags=("-p",))
    append_eos: bool = opt(True, "End every document with the end token.")
    on_bad_line: Literal["error", "skip"] = opt("error", "What to do with a line that holds no text.")
    overwrite: bool = opt(False, "Write into a folder that exists.")


@config
class PackConfig:
    """Tokenised documents to memory-mapped shards, source by source."""

    input: Path = opt(help="Folder with one folder of tokenised .jsonl files per source.", flags=("-i",))
    output: Path = opt(help="Folder to write, with one folder of shards per source.", flags=("-o",))
    tokenizer: str = opt(help="Tokenizer that made the ids: bytes, a folder, smollm2-135m or a hub id.", flags=("-t",))
    text_column: str = opt("content", "Key of text, in rows that are not tokenised.")
    dtype: Literal["auto", "uint16", "uint32"] = opt("auto", "Type of the ids; auto is the smaller one that holds the vocabulary.")
    shard_tokens: Count = opt(10**9, "Tokens in one shard.", ge=1)
    overwrite: bool = opt(False, "Write into a folder that exists.")


@config
class FilterConfig:
    """Keep the records of a corpus whose numeric column lies within bounds."""

    input: Path = opt(help="File or folder of .jsonl files.", flags=("-i",))
    output: Path = opt(help="Folder to write; its files are named like those of --input.", flags=("-o",))
    column: str = opt(help="Key of the number, for example a fluency score.")
    min: float | None = opt(None, "Least value that is kept.")
    max: float | None = opt(None, "Largest value that is kept.")
    report: Path | None = opt(None, "JSON file for the counts by source.")
    overwrite: bool = opt(False, "Write into a folder that exists.")

    def check(self) -> None:
        if self.min is None and self.max is None:
            raise ConfigError("min: neither --min nor --max is given, so nothing would be left out; give one of them")


@config
class EvalConfig:
    """Held-out loss of a model, by source."""

    model: str = opt(help="Mixture or dense model: a folder, a .gguf file, smollm2-135m or a hub id.", flags=("--model_name_or_path",))
    tokenizer: str | None = opt(
        None, "Tokenizer: bytes, a folder or a hub id; default: the model's own.", flags=("--tokenizer_name_or_path",)
    )
    eval_data: list[str] = opt(
        help="Held-out data, repeatable or a comma list: a folder with one file per source, builtin:python-docs, builtin:stdlib, synthetic:NAME, "
        "a file, a folder or a hub id.",
        flags=("--validation_dir",),
        min_length=1,
    )
    text_column: str = opt("text", "Column or key that holds the text.")
    packing: Literal["stream", "best-fit", "document"] = opt("stream", "How documents share a sample.")
    max_length: int = opt(2048, "Tokens per sample.", ge=2, flags=("--block_size",))
    micro_batch_size: int = opt(8, "Samples in one forward pass.", ge=1, flags=("--per_device_eval_batch_size",))
    eval_tokens: Count = opt(0, "Held-out tokens per source; 0 uses all.", ge=0)
    precision: Literal["fp32", "bf16"] = opt("fp32", "Arithmetic of the forward pass.")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "Device to run on.")


@config
class ReferenceConfig(EvalConfig):
    """Held-out loss by source as the reference of a dynamic data selection."""

    output: Path = opt(help="JSON file to write.", flags=("-o",))


@config
class ScaleConfig:
    """Measure score scale factors on the inputs that the dense model's feed-forward layers see."""

    model_path: str = opt(help="Mixture written by moe-cpt convert.")
    dense_path: str = opt(help="Dense model it was made from: a folder, a .gguf file, smollm2-135m or a hub id.")
    data: list[str] = opt(help="Text to calibrate on, written like --data of train.", min_length=1)
    text_column: str = opt("text", "Column or key that holds the text.")
    mode: Literal["ratio", "lsq", "rms", "unbiased"] = opt(
        "ratio", "N / K; or with the layer's output u at factor 1 and the dense f: <u,f>/<u,u>, |f|/|u|, or <f,f>/<u,f>."
    )
    layerwise: bool = opt(False, "One factor per layer instead of one for all.")
    max_tokens: Count = opt(65536, "Tokens to calibrate on.", ge=1)
    max_length: int = opt(512, "Tokens per sample.", ge=2, flags=("--block_size",))
    save_path: Path = opt(help="JSON file to write: a list with one factor per layer.", flags=("-o",))


@config
class BenchConfig:
    """Speed, memory and quality beside their targets."""

    only: list[str] = opt(help="Measurements to make: layer, data, split, construction, train; default: all.", factory=list)
    threads: int = opt(1, "Threads of the tensor operations.", ge=1)
    repeats: int = opt(8, "Timed repetitions; the least of them counts.", ge=3)


@config
class TrainConfig(RunConfig, TrainerSpellings):
    """Continued pre-training of a mixture of experts made from a dense LLaMA."""

    words: ClassVar[Mapping[str, Word]] = {
        **TrainerSpellings.words,
        "--num-train-epochs": Word("--max_steps, --num_tokens or --budget sets the length"),
        "--save-strategy": Word("--save_steps counts steps", ("steps",)),
        "--evaluation-strategy": Word("--eval_steps counts steps", ("steps",)),
    }
    model: str = change(
        ModelOptions,
        "model",
        help="Mixture written by moe-cpt convert, or with --from-dense a dense model: a folder, a .gguf file, smollm2-135m, llama_test or a hub id.",
        flags=("--model_name_or_path",),
    )
    tokenizer: str | None = change(ModelOptions, "tokenizer", flags=("--tokenizer_name_or_path",))
    from_dense: Literal["none", "random", "clustering"] = opt(
        "none", "Split and convert a dense --model first, by this method, into init/ of the run folder."
    )
    num_experts: int = opt(16, "With --from-dense: routed experts per layer.", ge=1)
    num_selects: int | None = opt(None, "Experts that see a token; default: the checkpoint's, 4 with --from-dense.", ge=1)
    score_scale_factor: float | None = opt(
        None,
        "Factor of the routed experts' output; default: the checkpoint's, experts over selected experts with --from-dense.",
        gt=0,
        flags=("--moe_calculator_score_scale_factor",),
    )
    gate_network: GateNetwork = opt("mlp", "With --from-dense: shape of the router.", flags=("--gate_network_type",))
    model_type: Literal["llama", "llama_moe"] | None = opt(
        None, "What --model must be, looked up before it is loaded: llama_moe, or with --from-dense llama; default: not looked up."
    )
    debug_mode: bool = opt(False, "Try the run on the first two layers of --model and the first file of each folder of --data.")
    mode: Literal["fpt", "lora"] = opt("fpt", "Train all weights, or low-rank adapters and the routers.")
    lora_rank: int = opt(8, "With --mode lora: rank of the adapters.", ge=1)
    lora_alpha: float = opt(32.0, "Adapters are scaled by alpha / rank.", gt=0)
    lora_dropout: float = opt(0.1, "Dropout in front of the adapters of linear layers.", ge=0, lt=1)
    trainable: str = opt(
        "q_proj,v_proj", "Comma list of what gets adapters: names of linear layers; gate_proj, up_proj and down_proj mean all experts."
    )
    modules_to_save: str = opt("", "Comma list of modules that are trained in full beside the adapters.")
    peft_path: Path | None = opt(None, "Adapter of an earlier run to go on with; its own settings hold.")
    gate_type: GateType | None = opt(None, f"{GATE_TYPE} Default: the checkpoint's.")
    calculator_type: CalculatorType | None = opt(None, f"{CALCULATOR_TYPE} Default: the checkpoint's.")
    gate_balance_loss_weight: float | None = opt(None, "Weight of the balance loss; default: the checkpoint's, else 0.01.", ge=0)
    balance_scope: Literal["micro", "global"] = opt(
        "micro", "Experts are balanced over each process's micro-batch, or over all processes and the micro-batches of a step so far."
    )
    experts_backend: Literal["auto", "fused", "grouped_mm", "loop"] = opt(
        "auto", "How experts are computed; auto is fused where its kernels can be had, else grouped_mm."
    )
    k_schedule: str | None = opt(
        None,
        "Selected experts from a step on, as STEP:K or STEP:K:FACTOR, for example 0:16,1000:8,3000:4; the factor is K by default. "
        "Begins as the dense model where the first K is all experts and --gate_init was zeros.",
    )
    freeze_router: bool = opt(False, "Do not train the routers.", flags=("--freeze_gate",))
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = opt(
        "sdpa", "Implementation of attention; flash_attention_2 needs the package flash-attn and a GPU."
    )

    data: list[str] = change(
        DataOptions,
        "data",
        help="Training data, repeatable or a comma list: a folder with one folder per source, builtin:python-docs, builtin:stdlib, synthetic:NAME, "
        "a file, a folder or a hub id; add [N] for N samples, @W for a weight.",
        flags=("--dataset_dir",),
    )
    eval_data: list[str] = change(
        DataOptions,
        "eval_data",
        help="Held-out data, written like --data, or a folder with one file per source; default: the held-out split of --data.",
        flags=("--validation_dir",),
    )
    validation_split_percentage: float | None = opt(None, "--hold-out in percent.", gt=0, lt=100)
    num_workers: int = change(DataOptions, "num_workers", flags=("--dataloader_num_workers",))
    data_cache_dir: Path | None = opt(None, "Folder for tokenised data; default: $LM_CORE_CACHE, else ~/.cache/lm_core.")
    prob_map: str | None = opt(
        None,
        "Shares of the sources: llama, sheared_llama, uniform, a JSON or YAML file, or inline JSON; "
        "default: llama for a folder of sources, else the weights of --data, else equal.",
    )
    on_exhausted: Literal["repeat", "stop", "renormalize"] = opt(
        "repeat", "When all samples of a source were read: read them again, end the run, or leave its share to the others."
    )
    dynamic_data_selection: Literal["none", "sheared_llama", "sheared_llama_paper"] = opt(
        "none", "After each evaluation, move the shares towards sources whose loss exceeds its reference most."
    )
    reference_loss: Path | None = opt(
        None, "JSON file of losses by source, as written by moe-cpt ref-loss; default: LLaMA-2-7B on SlimPajama."
    )
    dynamic_eta: float = opt(1.0, "Step size of the shares' update.", gt=0)
    dynamic_smoothing: float = opt(1e-4, "Part of all shares that is spread evenly at each update.", ge=0, le=1)
    dynamic_min_weight: float = opt(0.0, "Least share of a source.", ge=0, le=1)
    dynamic_max_weight: float = opt(1.0, "Largest share of a source.", gt=0, le=1)

    max_length: int = change(DataOptions, "max_length", default=2048, flags=("--block_size",))
    document_mask: bool = opt(False, "With --packing stream: documents of a sample do not see each other, and positions start again.")
    lr: float = change(OptimOptions, "lr", default=2e-4)
    lr_floor_style: Literal["clipped", "scaled"] = opt(
        "clipped", "Cosine to 0 that stops at the final rate, or one that reaches the final rate at the end of the run."
    )
    min_lr_ratio: float = change(OptimOptions, "min_lr_ratio", flags=("--final_lr_portion",))
    warmup: Count = change(OptimOptions, "warmup", default=100, flags=("--warmup_steps",))
    warmup_tokens: Count | None = opt(None, "--warmup in tokens, as whole steps, at least one.", ge=1)
    weight_decay: float = change(
        OptimOptions, "weight_decay", default=0.1, help="Decoupled weight decay; not applied to biases, norms and router noise."
    )
    betas: tuple[float, float] = change(OptimOptions, "betas", default=(0.9, 0.95))
    grad_clip: float = change(OptimOptions, "grad_clip", flags=("--max_grad_norm",))
    precision: Literal["fp32", "bf16", "fp16"] = change(EngineOptions, "precision", default="bf16")
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = opt("auto", "--precision in torch's words; auto leaves it.")
    deepspeed_config: Path | None = change(EngineOptions, "deepspeed_config", flags=("--deepspeed",))
    micro_batch_size: int = change(EngineOptions, "micro_batch_size", flags=("--per_device_train_batch_size",))
    eval_micro_batch_size: int | None = change(EngineOptions, "eval_micro_batch_size", flags=("--per_device_eval_batch_size",))
    accumulate: int = change(EngineOptions, "accumulate", flags=("--gradient_accumulation_steps",))
    num_nodes: int | None = opt(None, "Machines of the run, for its plan; default: those of the launcher.", ge=1)
    num_gpu_per_node: int | None = opt(None, "Processes per machine, for its plan; default: those of the launcher.", ge=1)
    flops_per_device: float | Literal["auto"] = opt(
        312e12, "Peak FLOP/s of one device, for speed/mfu; 312e12 is an A100 in bfloat16, 989e12 an H200, auto looks the device up.", gt=0
    )

    num_tokens: Count = opt(10**11, "Tokens to train on; whole updates are counted.", ge=1, flags=("--max_tokens",))
    max_steps: int | None = opt(None, "Updates to make, in place of --num-tokens.", ge=1)
    max_train_samples: Count | None = opt(None, "One more limit: end before a batch that would pass so many samples.", ge=1)
    budget: str = change(
        OutputOptions, "budget", default="", help="Replaces --num-tokens and --max-steps: for example 300 steps, or 2 hours."
    )
    seed: int = change(OutputOptions, "seed", default=1227)
    overwrite: bool = change(OutputOptions, "overwrite", flags=("--overwrite_output_dir",))
    save_every: str = change(OutputOptions, "save_every", flags=("--save_steps",))
    keep_checkpoints: int = change(OutputOptions, "keep_checkpoints", default=1, flags=("--save_total_limit",))
    keep_optimizer: int = change(OutputOptions, "keep_optimizer", default=1, flags=("--save_optim_limit",))
    eval_every: str = change(OutputOptions, "eval_every", flags=("--eval_steps",))
    eval_tokens: Count = change(
        OutputOptions, "eval_tokens", help="--eval-every in tokens, as whole steps, at least one; 0 leaves it to --eval-every."
    )
    held_out_tokens: Count = opt(0, "Held-out tokens per source and evaluation; 0 uses all.", ge=0)
    log_every: int = change(OutputOptions, "log_every", default=5, flags=("--logging_steps",))
    log_first: bool = change(OutputOptions, "log_first", flags=("--logging_first_step",))
    allow_data_change: bool = opt(
        False,
        "With --resume: --data, --prob-map, --reference-loss, --block-size, --seed and the global batch may differ from the checkpoint's.",
    )
    comment: str = opt("", "What the run is for; kept in its record.")
    require_checklist: bool = opt(False, "Print the checklist and stop, before anything is loaded, when an item fails.")

    @classmethod
    def meanings(cls, values: Mapping[str, Any]) -> dict[str, list[Meaning]]:
        found = super().meanings(values)
        precision = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(values.get("torch_dtype")))
        if precision:
            found["torch_dtype"] = [Meaning("precision", precision)]
        if percent := right(float, values.get("validation_split_percentage")):
            found["validation_split_percentage"] = [Meaning("hold_out", percent / 100)]
        if eval_tokens := right(Count, values.get("eval_tokens")):
            found["eval_tokens"] = [Meaning("eval_every", str(max(1, int(eval_tokens) // tokens_of_step(cls, values))))]
        if warmup_tokens := right(Count, values.get("warmup_tokens")):
            budget = right(str, values.get("budget"))
            unit = Budget.parse(budget).unit if budget else "steps"
            # --warmup is given in the unit of the budget
            if unit in ("steps", "tokens"):
                size = tokens_of_step(cls, values) if unit == "steps" else 1
                found["warmup_tokens"] = [Meaning("warmup", max(1, int(warmup_tokens) // size))]
        return found

    def check(self) -> None:
        given = explicit(self)
        if self.from_dense == "none":
            for name in CONVERSION:
                if name in given:
                    raise ConfigError(f"{name}: {getattr(self, name)} belongs to --from-dense; a checkpoint has its own, so leave it out")
        elif self.num_selects is not None and self.num_selects > self.num_experts:
            raise ConfigError(f"num_selects: {self.num_selects} of {self.num_experts} experts; use 1 to {self.num_experts}")
        for name in ADAPTERS:
            if name in given and self.mode != "lora":
                raise ConfigError(f"{name}: {getattr(self, name)} belongs to --mode lora; add that, or leave it out")
        if self.peft_path is not None and (clash := given & set(ADAPTERS) - {"peft_path"}):
            raise ConfigError(f"{min(clash)}: the adapter in {self.peft_path} has its own; leave one of them out")
        if self.allow_data_change and self.resume == "none":
            raise ConfigError("allow_data_change: nothing is resumed; add --resume auto, or leave it out")
        if self.k_schedule is not None:
            parse_k_schedule(self.k_schedule)
            if clash := given & {"num_selects", "score_scale_factor"}:
                raise ConfigError(f"{min(clash)}: --k-schedule {self.k_schedule} sets it; drop one of them")
        if self.warmup_tokens is not None and self.limits().unit not in ("steps", "tokens"):
            raise ConfigError(
                f"warmup_tokens: {self.warmup_tokens} has no measure in a run of {self.limits()}; give --warmup as a fraction"
            )
        if self.document_mask and self.packing != "stream":
            raise ConfigError(f"document_mask: {self.packing} packing keeps documents apart already; leave it out")
        if self.max_steps is not None and "num_tokens" in given and self.max_steps != self.steps_of_tokens():
            raise ConfigError(
                f"max_steps: {self.max_steps}, but --num-tokens {self.num_tokens} makes {self.steps_of_tokens()} updates; drop one of them"
            )
        if self.budget and (clash := given & {"max_steps", "num_tokens"}):
            raise ConfigError(f"{min(clash)}: --budget {self.budget!r} sets the length already; drop one of them")

        if self.dynamic_data_selection == "none":
            for name in sorted(given):
                if name == "reference_loss" or name in DYNAMIC:
                    raise ConfigError(
                        f"{name}: {getattr(self, name)} is used by --dynamic-data-selection only; choose a rule, or leave it out"
                    )
        elif self.eval_every == "never":
            raise ConfigError("eval_every: never, but --dynamic-data-selection moves shares after evaluations; give an interval")
        if self.dynamic_min_weight > self.dynamic_max_weight:
            raise ConfigError(
                f"dynamic_min_weight: {self.dynamic_min_weight} is above --dynamic-max-weight {self.dynamic_max_weight}; exchange them"
            )

    def devices(self) -> int:
        """Processes of the run: those named, else those of the launcher."""
        return devices(self.num_nodes, self.num_gpu_per_node, self.num_processes)

    def tokens_per_batch(self) -> int:
        return self.micro_batch_size * self.accumulate * self.devices() * self.max_length

    def held_out_tokens_used(self) -> int:
        return int(self.held_out_tokens)

    def steps_of_tokens(self) -> int:
        """Whole updates in `num_tokens`. Raises ConfigError when there is none."""
        steps = steps_of_tokens(int(self.num_tokens), self.tokens_per_batch())
        if steps == 0:
            raise ConfigError(f"num_tokens: {self.num_tokens} is less than one batch of {self.tokens_per_batch()} tokens; give more")
        return steps

    def limits(self) -> Budget:
        if self.budget:
            return Budget.parse(self.budget)
        steps = self.max_steps or self.steps_of_tokens()
        if self.max_train_samples is not None:
            batch = self.tokens_per_batch() // self.max_length
            if self.max_train_samples < batch:
                raise ConfigError(f"max_train_samples: {self.max_train_samples} is less than one batch of {batch} samples; give more")
            steps = min(steps, int(self.max_train_samples) // batch)
        return Budget({"steps": steps})

    def plan(self) -> Plan:
        """Updates and batch in numbers. Raises ConfigError for a budget that only the data or the clock turns into updates."""
        limits = self.limits().limits
        batch = self.tokens_per_batch() // self.max_length
        per_step = {"steps": 1, "samples": batch, "tokens": self.tokens_per_batch()}
        if unknown := limits.keys() - per_step.keys():
            raise ConfigError(
                f"budget: {self.budget!r} is not a number of updates before the run; use steps, samples or tokens, not {min(unknown)}"
            )
        steps = min(math.ceil(limit / per_step[unit]) for unit, limit in limits.items())
        return Plan(steps, batch, self.tokens_per_batch())

    def eval_steps(self) -> int | None:
        """Steps between evaluations, None for never or an interval in epochs."""
        every = Every.parse(self.eval_every, "eval_every")
        return every.steps or (max(1, round(every.fraction * self.plan().max_steps)) if every.fraction else None)

    def learning_rate(self, progress: Progress, size: Size, epoch_samples: int) -> float:
        """core's shapes, and the clipped cosine."""
        clipped = self.schedule == "cosine" and self.lr_floor_style == "clipped"
        return learning_rate(self, self.limits(), progress, size, epoch_samples, clipped_cosine if clipped else None)


def devices(num_nodes: int | None, num_gpu_per_node: int | None, num_processes: int) -> int:
    """Processes of a run: those of its plan, else those that the launcher started or the command will start."""
    if num_nodes is None and num_gpu_per_node is None:
        return int(os.environ.get("WORLD_SIZE", num_processes))
    return (num_nodes or 1) * (num_gpu_per_node or 1)


def tokens_of_step(cls: type, values: Mapping[str, Any]) -> int:
    """Tokens of one update by options as they were written, those of `cls` where there are none."""
    size = {name: right(int | None, values[name]) if name in values else cls.__dataclass_fields__[name].default for name in SIZES_OF_STEP}  # type: ignore[attr-defined]
    machines = devices(size["num_nodes"], size["num_gpu_per_node"], size["num_processes"] or 1)
    return max(1, (size["micro_batch_size"] or 1) * (size["accumulate"] or 1) * machines * (size["max_length"] or 1))


@dataclass(frozen=True)
class Selection:
    """K experts and the factor of their output, from a step on."""

    step: int
    num_selects: int
    scale: float


def parse_k_schedule(text: str) -> list[Selection]:
    """The entries of --k-schedule, by step. Raises ConfigError for anything else.

    >>> parse_k_schedule("0:16,1000:4:3.5")
    [Selection(step=0, num_selects=16, scale=16.0), Selection(step=1000, num_selects=4, scale=3.5)]
    """
    found = []
    for entry in text.split(","):
        parts = entry.strip().split(":")
        try:
            step, selects, scale = int(parts[0]), int(parts[1]), float(parts[2] if len(parts) == 3 else parts[1])
        except (ValueError, IndexError):
            raise ConfigError(f"k_schedule: {entry.strip()!r} is not STEP:K or STEP:K:FACTOR; write for example 0:16,1000:8") from None
        if len(parts) > 3 or selects < 1 or not scale > 0:
            raise ConfigError(f"k_schedule: {entry.strip()!r} needs at least one expert and a factor above 0; write for example 1000:8")
        found.append(Selection(step, selects, scale))
    steps = [entry.step for entry in found]
    if steps[0] != 0 or sorted(set(steps)) != steps:
        raise ConfigError(f"k_schedule: steps {', '.join(map(str, steps))} do not rise from 0; begin with 0:K")
    return found


def clipped_cosine(at: float, floor: float, warmup: float = 0.0) -> float:
    """Half a cosine from 1 to 0, never below `floor`; 0.1 is reached at 0.7952.

    >>> clipped_cosine(0.5, floor=0.1), clipped_cosine(0.8, floor=0.1)
    (0.5, 0.1)
    """
    return max(floor, 0.5 * (1 + math.cos(math.pi * at)))


@config
class PlanConfig(TrainConfig):
    """What a run would do, before it starts."""

    seconds_per_step: float | None = opt(None, "Seconds of one update, to tell the hours of the run.", gt=0)
    logdir: Path | None = opt(None, "Folder of an earlier run of the same kind, whose speed tells the hours of this one.")

    def check(self) -> None:
        if self.seconds_per_step is not None and self.logdir is not None:
            raise ConfigError(f"logdir: {self.logdir} and --seconds-per-step {self.seconds_per_step} both tell the speed; drop one of them")


@config
class SFTConfig(TrainConfig):
    """Supervised tuning of a mixture on conversations."""

    data: list[str] = change(
        TrainConfig,
        "data",
        help="Conversations, repeatable or a comma list: .jsonl files whose rows hold conversations, or builtin:python-docs (a title, then its text).",
        flags=("--dataset_dir_or_path", "--dataset_dir"),
    )
    max_length: int = change(TrainConfig, "max_length", flags=("--model_max_length", "--block_size"))
    lr: float = change(TrainConfig, "lr", default=2e-5)
    warmup: Count = change(TrainConfig, "warmup", default=0.03, flags=("--warmup_ratio", "--warmup_steps"))
    num_train_epochs: Count = opt(2, "Passes over the data, unless --max-steps or --budget is given.", gt=0)

    def check(self) -> None:
        if self.dynamic_data_selection != "none" or self.prob_map is not None:
            raise ConfigError("prob_map: conversations are used as often as they are; leave out --prob-map and --dynamic-data-selection")
        if "num_tokens" in explicit(self):
            raise ConfigError(f"num_tokens: {self.num_tokens} is for train; give --num-train-epochs, --max-steps or --budget")

    def limits(self) -> Budget:
        if self.budget:
            return Budget.parse(self.budget)
        return Budget({"steps": self.max_steps} if self.max_steps else {"epochs": self.num_train_epochs})

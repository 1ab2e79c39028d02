"""Options of `lowrank-opt train`: the contract flags of the original guide over the options that every command shares."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lm_core.config import Count, Mistakes, change, config, explicit, leaves, load, opt, section
from lm_core.deepspeed_settings import engine_kind, split
from lm_core.errors import ConfigError
from lm_core.options import DataOptions, EngineOptions, ModelOptions, OptimOptions, OutputOptions, RunConfig
from lm_core.progress import Budget, Progress, Size
from lm_core.schedule import cosine, fraction_of_run
from lowrank_opt.models import HUB_MODELS, PRESETS

log = logging.getLogger("lowrank_opt")

OPTIMIZERS = Literal[
    "lora",
    "galore",
    "galore8bit",
    "lora+galore",
    "lora+galore8bit",
    "baseline",
    "adamw8bit",
    "apollo",
    "apollo-mini",
    "fira",
    "qgalore",
    "ldadam",
    "muon",
]
LORA_FILE, GALORE_FILE = Path("config/lora_config.json"), Path("config/galore_config.json")
# options that only some modes and optimizers use: an explicit one elsewhere is refused, never ignored
ONLY_FOR_MODE = {"num_training_tokens": "pretraining", "task": "finetuning", "num_labels": "finetuning"}
# other words for engines
DIST = {"none": "replicated", "ddp": "replicated", "fsdp": "sharded"}
ONLY_FOR_SCHEDULE = {
    "cooldown": ("cosine", "linear", "constant", "exp", "inverse-sqrt"),
    "tmax": ("cosine_tmax",),
    "tmax_unit": ("cosine_tmax",),
    "restart_every": ("cosine_restarts",),
}
PROJECTED = ("galore", "galore8bit", "lora+galore", "lora+galore8bit", "fira", "qgalore")
# those whose update needs no more of a gradient than L, which --engine lowrank exchanges
REDUCED = tuple(name for name in PROJECTED if name != "fira")
EIGHT_BIT = ("galore8bit", "lora+galore8bit", "adamw8bit", "qgalore")
LOW_RANK = (*PROJECTED, "apollo", "apollo-mini", "ldadam", "muon")
# those whose update can do with some rows of each matrix, which --engine sharded leaves to a process
BY_ROWS = (*PROJECTED, "apollo", "apollo-mini")
# of section galore, what LDAdam uses as well
OF_LDADAM = ("rank", "proj_type", "full_rank_policy", "proj_dtype")


@config
class GaloreOptions:
    """Section `galore`: the content of galore_config.json; each key is a flag, too."""

    rank: float = opt(128, "Rank of the projection; below 1 a fraction of the smaller side.", gt=0)
    update_proj_gap: int = opt(200, "Steps between two projections of a parameter.", ge=1)
    scale: float = opt(0.25, "Factor of the projected update.", gt=0)
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = opt("std", "Which side is projected.")
    target_modules: list[str] = opt(
        help="Regular expressions on parameter names to project; auto takes every linear layer except embeddings and heads.",
        factory=lambda: ["auto"],
    )
    exclude_modules: list[str] = opt(help="Regular expressions on parameter names to leave out.", factory=list)
    proj_method: Literal["auto", "svd", "gram", "rsvd", "subspace", "random"] = opt("auto", "How a basis is computed.")
    oversample: int = opt(16, "Columns beyond the rank in rsvd and subspace.", ge=0)
    power_iters: int = opt(2, "Power iterations of rsvd.", ge=0)
    moment_transfer: Literal["none", "project", "reset"] = opt("none", "What happens to the moments when a basis changes.")
    stagger: bool = opt(True, "Spread the refreshes of different parameters over the gap.")
    adaptive: bool | None = opt(None, "Double the gap of parameters whose basis hardly moves; default: true for qgalore, else false.")
    adaptive_threshold: float = opt(0.4, "Mean overlap of successive bases that doubles the gap.", gt=0, le=1)
    adaptive_window: int = opt(5, "Overlaps that the mean is taken over.", ge=1)
    max_gap: int | None = opt(None, "Longest gap of the adaptive rule in steps; default: 16 times the gap.", ge=1)
    full_rank_policy: Literal["identity", "rotate", "error"] = opt(
        "identity", "What happens to parameters whose smaller side is at most the rank."
    )
    proj_dtype: Literal["param", "fp32", "bf16", "int4"] | None = opt(
        None,
        "Type that bases are kept in, param being that of the weight; products with one in bf16 are taken in bf16. "
        "Default: int4 for qgalore, else param.",
    )
    state_bits: Literal[8, 32] | None = opt(None, "Bits of the moments; default: 8 for the optimizers that are called so, else 32.")
    block_size: int = opt(256, "Values that share one scale in 8-bit state.", ge=1)
    min_8bit_size: int = opt(4096, "State tensors with fewer values stay float32.", ge=0)
    embedding_state_bits: Literal[8, 32] = opt(32, "Bits of the embeddings' state under an 8-bit optimizer.")
    compat: Literal["none", "galore_torch"] = opt("none", "Reproduce the arithmetic of another implementation, for comparison.")


@config
class ApolloOptions:
    """Section `apollo`: the object `apollo` of galore_config.json, where its keys have no prefix."""

    apollo_rank: int | None = opt(None, "Rank of APOLLO's random space; default: 256, 1 for apollo-mini.", ge=1)
    apollo_scale: float | None = opt(None, "Its root multiplies the update; default: 1, 128 for apollo-mini.", gt=0)
    apollo_scale_type: Literal["channel", "tensor"] | None = opt(
        None, "One factor per channel or per matrix; default: channel, tensor for apollo-mini."
    )
    apollo_update_proj_gap: int = opt(200, "Steps between two random spaces.", ge=1)
    apollo_norm_growth: float = opt(1.01, "Largest growth of an update's norm from step to step; Fira's, too.", gt=0)
    apollo_scale_front: bool = opt(False, "Scale before the limiter instead of after it.")
    apollo_proj_method: Literal["random", "svd"] = opt("random", "How the space is chosen.")


@config
class LdadamOptions:
    """Section `ldadam`: the object `ldadam` of galore_config.json, where its keys have no prefix."""

    ldadam_betas: tuple[float, float] = opt((0.908, 0.99), "Decay rates of the projected moments; other parameters have --betas.")
    ldadam_rho: float = opt(0.908, "Share of the momentum, beside the gradient, in what the basis follows.", ge=0, lt=1)
    ldadam_error_feedback: bool = opt(True, "Add what a step left out to the next gradient; takes a float32 copy of the gradient.")


@config
class LoraOptions:
    """Section `lora`: the content of lora_config.json."""

    r: int = opt(8, "Rank of the adapters.", ge=1)
    lora_alpha: float = opt(8, "Adapters are scaled by lora_alpha / r.", gt=0)
    lora_dropout: float = opt(0.1, "Dropout in front of the adapters.", ge=0, lt=1)
    target_modules_pretraining: list[str] = opt(
        help="Linear layers that get adapters in pretraining.", factory=lambda: ["q_proj", "v_proj"]
    )
    target_modules_finetuning: list[str] = opt(help="Linear layers that get adapters in finetuning.", factory=lambda: ["query", "value"])
    target_modules_by_model: dict[str, list[str]] = opt(
        help="Linear layers by model name or model type; wins over the two above.",
        factory=lambda: {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]},
    )
    use_rslora: bool = opt(False, "Scale by lora_alpha / sqrt(r).")
    use_dora: bool = opt(False, "Train the magnitude of weights separately (DoRA).")
    bias: Literal["none", "all", "lora_only"] = opt("none", "Biases trained beside the adapters.")
    init_lora_weights: str = opt(
        "true",
        "Initial adapters: true, gaussian, orthogonal; exported merged: pissa, pissa_niter_N, olora (out of the weights), lora_ga (by their gradient).",
    )
    lora_ga_batches: int = opt(64, "Micro-batches that lora_ga takes the gradient from.", ge=1)
    relora_every: int = opt(0, "Updates after which adapters are merged into the weights and begin again (ReLoRA); 0 is never.", ge=0)
    relora_warmup: int = opt(50, "Updates over which the learning rate rises after each of these restarts.", ge=1)
    train_base_modules: Literal["auto", "none"] = opt(
        "auto", "Train embeddings, norms and head beside the adapters: auto does in pretraining."
    )


@config
class TrainConfig(RunConfig):
    """Low-rank training of language models: LoRA, GaLore and full-rank AdamW."""

    mode: Literal["pretraining", "finetuning"] = opt(help="Pre-train from random weights, or continue from trained ones.")
    optimizer: OPTIMIZERS = opt(help="What is trained and how: baseline is AdamW on all parameters.")
    model: str = change(
        ModelOptions,
        "model",
        help="llama_60m, llama_130m, llama_350m, llama_1b, llama_3b, llama_7b, roberta, gpt2, smollm2-135m, a folder, a .gguf file or a hub id.",
    )
    init: Literal["auto", "pretrained", "random"] = opt(
        "auto", "Initial weights; auto: random in pretraining and for *_test models, else pretrained."
    )
    model_path: Path | None = opt(None, "Folder with trained weights (and tokenizer) for a --model that is a named size.")
    micro_batch_size: int = change(EngineOptions, "micro_batch_size", default=16, flags=("-b", "--batch_size"))
    # one engine more than the base has, which a type checker takes for a broken promise
    engine: Literal["auto", "replicated", "lowrank", "sharded", "deepspeed"] = change(  # type: ignore[assignment]
        EngineOptions,
        "engine",
        help="Where weights, gradients and optimizer state live; lowrank is replicated, and processes exchange projected gradients.",
    )
    dist: Literal["none", "ddp", "fsdp"] | None = opt(None, "Other words for --engine: none and ddp are replicated, fsdp is sharded.")
    shard_optimizer: bool = opt(
        False, "Keep the optimizer state of each parameter in one process, which updates it for all; replicated engine, or lowrank."
    )
    verify_replicas_every: int = opt(0, "Updates between two comparisons of all processes' weights and bases; 0 is never.", ge=0)
    accumulate: int = change(EngineOptions, "accumulate", flags=("--grad_accumulation",))
    total_batch_size: int | None = opt(None, "Samples of one update over all processes; replaces --accumulate.", ge=1)
    num_epochs: int = opt(30, "Passes over the training data; in pretraining over --num-training-tokens.", ge=1)
    num_training_tokens: Count = opt(10**9, "Pretraining only: tokens of one epoch, over all processes.", ge=1)
    budget: str = change(
        OutputOptions, "budget", default="", help="Replaces --num-epochs and --num-training-tokens: for example 300 steps, or 10M tokens."
    )
    max_steps: int | None = opt(None, "Replaces the budget by this many updates.", ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = change(
        EngineOptions, "precision", default="fp16", flags=("--dtype",), help="Arithmetic; bf16 keeps the weights in bfloat16, too."
    )
    # one word more than the base has, which a type checker takes for a broken promise
    nonfinite: Literal["stop", "drop", "skip"] = change(  # type: ignore[assignment]
        EngineOptions, "nonfinite", help="What to do with a step whose loss or gradient is not finite; skip is drop."
    )
    param_dtype: Literal["auto", "fp32", "bf16"] = opt("auto", "Type of the weights; auto: bf16 under --precision bf16, else fp32.")
    lr: float = change(OptimOptions, "lr", default=4e-4)
    weight_decay: float = change(OptimOptions, "weight_decay", default=0.01)
    grad_clip: float = change(OptimOptions, "grad_clip", default=0.0)
    clip_mode: Literal["auto", "global", "delayed", "per_param"] = opt(
        "auto",
        "What --grad-clip limits: the global norm; per layer the global norm of the step before, or each parameter's share of it.",
    )
    per_layer: bool = opt(False, "Update every parameter inside the backward pass, so that only one gradient is held.")
    tmax: int = opt(30, "Half period of the cosine, in units of --tmax-unit.", ge=1)
    tmax_unit: Literal["epoch", "step"] = opt("epoch", "Unit of --tmax.")
    # one shape more than the base has, which a type checker takes for a broken promise
    schedule: Literal["cosine_tmax", "cosine", "cosine_restarts", "linear", "constant", "exp", "inverse-sqrt"] = opt(  # type: ignore[assignment]
        "cosine_tmax", "Shape of the learning rate after warm-up.", flags=("--scheduler",)
    )
    restart_every: int | None = opt(None, "Updates between two starts of cosine_restarts.", ge=1)
    data: list[str] = change(DataOptions, "data", flags=("--dataset", "--train_files"))
    dataset_config: str | None = opt(
        None, "Configuration of the hub data sets that --data names without one, as in allenai/c4:en. Default: en for c4."
    )
    streaming: bool = opt(
        False, "Read hub data sets while training instead of writing them to token shards first; one document per sample."
    )
    shuffle_buffer: Count = opt(10_000, "Documents of a stream that are shuffled among each other.", ge=1)
    eval_data: list[str] = change(DataOptions, "eval_data", flags=("--validation_files",))
    eval_every: str = change(OutputOptions, "eval_every", default="1000")
    eval_tokens: Count = change(OutputOptions, "eval_tokens", default=10_000_000)
    keep_checkpoints: int = change(OutputOptions, "keep_checkpoints", flags=("--keep_last",))
    wandb_project: str = change(OutputOptions, "wandb_project", default="lowrank-opt")
    csv: Path = opt(Path("output.csv"), "Table of the training steps that are logged, in the run folder.")
    dry_run: bool = change(RunConfig, "dry_run", flags=("--estimate_only",))
    # two words more than the base has, which a type checker takes for a broken promise
    packing: Literal["document", "stream", "best-fit", "false", "true"] = change(  # type: ignore[assignment]
        DataOptions, "packing", default="document", help="How documents share a sample; false is document, true is stream."
    )
    task: Literal["lm", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"] = opt(
        "lm", "Finetuning only: next token, or a GLUE task; its data are --data with sentence (or sentence1, sentence2) and label."
    )
    num_labels: int | None = opt(None, "Labels of the task; 1 predicts a number. Default: those of --task.", ge=1)
    lora_config: Path = opt(
        Path("config/lora_config.json"), "JSON file with the keys of section lora; the packaged defaults where it is absent."
    )
    galore_config: Path = opt(
        Path("config/galore_config.json"), "JSON file with the keys of section galore; the packaged defaults where it is absent."
    )
    resume_reset_optimizer: bool = opt(
        False, "Resume the weights and the place in the data, with a fresh optimizer: another one, or another rank."
    )
    stochastic_rounding: bool = opt(True, "Round updates of bfloat16 weights at random, so that small ones are not lost.")
    test: bool = opt(False, "Smoke test: 1000 tokens or 64 samples, one epoch, float32, nothing sent anywhere.")
    galore: GaloreOptions = section(GaloreOptions)
    apollo: ApolloOptions = section(ApolloOptions)
    ldadam: LdadamOptions = section(LdadamOptions)
    lora: LoraOptions = section(LoraOptions)

    @classmethod
    def further_layers(cls, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The two JSON files, read like a last --config; an absent default one stands for the packaged content. And --dist as an engine."""
        layers: list[Mapping[str, Any]] = []
        # values of another type are refused where all options are checked
        texts = {name: value for name, value in values.items() if isinstance(value, str | Path)}
        if texts.get("dist") in DIST:
            layers.append({"engine": DIST[str(texts["dist"])]})
        for section_name, default in (("lora", LORA_FILE), ("galore", GALORE_FILE)):
            option = f"{section_name}_config"
            path = Path(texts.get(option, default))
            if path.exists():
                values_read = load(path)
                inner = {one: values_read.pop(one, {}) for one in ("apollo", "ldadam")}
                if wrong := next((one for one, content in inner.items() if not isinstance(content, Mapping)), None):
                    raise Mistakes([f"{option}: {wrong} in {path} is no object; write its keys in braces"])
                if section_name == "lora":
                    if isinstance(values_read.get("init_lora_weights"), bool):
                        values_read["init_lora_weights"] = str(values_read["init_lora_weights"]).lower()
                    values_read = with_targets(values_read, f"target_modules_{texts.get('mode')}")
                layers.append({section_name: values_read})
                layers += [{one: {f"{one}_{name}": value for name, value in values.items()}} for one, values in inner.items()]
            elif path != default:
                raise Mistakes([f"{option}: {path} does not exist; name a JSON file, or leave the option out for the packaged values"])
        return layers

    def check(self) -> None:
        if self.model in PRESETS and not self.random_init() and self.model_path is None:
            raise ConfigError(f"model: {self.model} has no trained weights; add --init random, --model-path FOLDER, or name a hub id")
        if self.model_path is not None and self.model not in {**PRESETS, **HUB_MODELS}:
            raise ConfigError(f"model_path: {self.model} is no named size; write --model {self.model_path} instead")
        if self.model_path is not None and self.init == "random":
            raise ConfigError(f"model_path: the weights in {self.model_path} would be ignored under --init random; drop one of them")
        if self.param_dtype == "bf16" and self.precision != "bf16":
            raise ConfigError(f"param_dtype: bf16 weights need bf16 arithmetic, not {self.precision}; add --precision bf16")
        if self.model.startswith("roberta") and not self.classifies():
            raise ConfigError(f"model: {self.model} predicts no next token; use --mode finetuning with a --task such as sst2")
        if self.num_labels is not None and not self.classifies():
            raise ConfigError(f"num_labels: {self.num_labels} labels belong to a --task such as sst2, not to next tokens; drop it")
        if self.galore.rank >= 1 and not self.galore.rank.is_integer():
            raise ConfigError(f"galore.rank: {self.galore.rank:g} is neither a whole number nor a fraction below 1; use one of them")
        if not re.fullmatch(r"true|false|gaussian|pissa|pissa_niter_\d+|olora|orthogonal|lora_ga", self.lora.init_lora_weights):
            raise ConfigError(
                f"lora.init_lora_weights: {self.lora.init_lora_weights!r} is unknown; use true, gaussian, pissa, pissa_niter_N, olora, "
                "orthogonal or lora_ga"
            )
        if "lora.lora_ga_batches" in explicit(self) and self.lora.init_lora_weights != "lora_ga":
            raise ConfigError(f"lora.lora_ga_batches: {self.lora.init_lora_weights} takes no gradient; drop it, or use lora_ga")
        self.check_relora()
        if self.dist is not None and self.engine not in ("auto", DIST[self.dist]):
            raise ConfigError(f"dist: {self.dist} means --engine {DIST[self.dist]}, not {self.engine}; drop one of them")
        self.check_streaming()
        self.check_length()
        self.check_batch()
        self.check_engine()
        self.check_clipping()
        if self.budget and self.max_steps is not None:
            raise ConfigError(f"max_steps: {self.max_steps} and --budget {self.budget!r} both set the length; drop one of them")

    def check_relora(self) -> None:
        """Refuse what cannot merge adapters on the way."""
        lora = self.lora
        if not lora.relora_every:
            if "lora.relora_warmup" in explicit(self):
                raise ConfigError(
                    f"lora.relora_warmup: {lora.relora_warmup} updates follow no restart; add for example --relora-every 1000"
                )
            return
        if self.optimizer != "lora" or moment_bits(self) == 8:
            raise ConfigError("lora.relora_every: restarts prune moments in 32 bits of the adapters themselves; use --optimizer lora")
        if lora.use_dora:
            raise ConfigError("lora.relora_every: DoRA's magnitudes are no part of what is merged; drop --use-dora")
        if split(self)[0]:
            raise ConfigError(
                f"lora.relora_every: weights are whole where adapters are merged, not under {split(self)[1]}; use --engine replicated"
            )

    def check_streaming(self) -> None:
        """Refuse what cannot be made of documents that come one by one."""
        if "shuffle_buffer" in explicit(self) and not (self.streaming and self.shuffle):
            raise ConfigError(
                f"shuffle_buffer: {self.shuffle_buffer} documents are shuffled under --streaming true --shuffle true; drop it"
            )
        if not self.streaming:
            return
        if self.classifies():
            raise ConfigError(f"streaming: --task {self.task} reads all its texts first; drop --streaming")
        if self.packing not in ("document", "false"):
            raise ConfigError(f"packing: {self.packing} joins documents, and --streaming reads one per sample; use document")
        if self.mode == "finetuning" and any("[" not in source for source in self.data):
            raise ConfigError(f"streaming: {self.data[0]} has no known length, which epochs need; write {self.data[0]}[100k]")

    def check_length(self) -> None:
        """Refuse a budget of tokens that is less than one update."""
        tokens = self.limits().limits.get("tokens")
        one = self.max_length * max(self.micro_batch_size * processes(self) * self.accumulate, self.total_batch_size or 0)
        if tokens is not None and tokens < one and not self.test:
            option = "budget" if self.budget else "num_training_tokens"
            raise ConfigError(
                f"{option}: {tokens:,.0f} tokens are less than one update of {one:,} ({one // self.max_length} samples of "
                f"--max-length {self.max_length}); train longer, or lower --batch-size"
            )

    def check_batch(self) -> None:
        """Refuse a total batch that whole micro-batches cannot make up, and one that --accumulate contradicts."""
        if self.total_batch_size is None:
            return
        samples = self.micro_batch_size * processes(self)
        if self.total_batch_size % samples:
            raise ConfigError(
                f"total_batch_size: {self.total_batch_size} is no multiple of {samples} (--batch-size {self.micro_batch_size} on "
                f"{processes(self)} processes); use {samples * max(1, round(self.total_batch_size / samples))}"
            )
        if self.accumulate not in (1, self.total_batch_size // samples):
            raise ConfigError(
                f"total_batch_size: {self.total_batch_size} means --accumulate {self.total_batch_size // samples}, "
                f"not {self.accumulate}; drop one of them"
            )

    def check_engine(self) -> None:
        """Refuse engines that keep no whole gradient where the update needs one."""
        stage, said = split(self)
        if stage and self.per_layer:
            raise ConfigError(f"per_layer: {said} keeps no whole gradient; use --engine replicated")
        if engine_kind(self) == "sharded":
            self.check_rows(said)
        elif stage and self.optimizer in LOW_RANK:
            rows = "--engine sharded, or " if self.optimizer in BY_ROWS else ""
            whole = "--engine lowrank" if self.optimizer in REDUCED else "--engine replicated"
            raise ConfigError(
                f"optimizer: {said} flattens matrices, which {self.optimizer} needs as they are; use {rows}{whole} with --shard-optimizer true"
            )
        elif stage and moment_bits(self) == 8:
            raise ConfigError(f"optimizer: {said} would cut through the blocks of moments in 8 bits; use --engine sharded or replicated")
        if stage and self.verify_replicas_every:
            raise ConfigError(f"verify_replicas_every: {said} keeps no replicas to compare; drop it, or use --engine replicated")
        if self.shard_optimizer and stage:
            raise ConfigError(f"shard_optimizer: {said} splits it already; drop it, or use --engine replicated")
        if self.engine == "lowrank":
            self.check_reduction()
        if self.resume_reset_optimizer and self.resume == "none":
            raise ConfigError("resume_reset_optimizer: nothing is resumed; add --resume auto, or a checkpoint folder")
        if self.resume_reset_optimizer and engine_kind(self) == "deepspeed":
            raise ConfigError("resume_reset_optimizer: DeepSpeed's checkpoints hold weights and state together; start a new run")

    def check_rows(self, said: str) -> None:
        """Refuse what needs more than some rows of a matrix."""
        if self.optimizer in LOW_RANK and self.optimizer not in BY_ROWS:
            raise ConfigError(
                f"optimizer: {said} leaves every process some rows of a matrix, which {self.optimizer} needs whole; use --engine replicated"
            )
        if self.optimizer in PROJECTED and self.galore.proj_type in ("left", "full"):
            raise ConfigError(
                f"galore.proj_type: {said} leaves every process some rows of a matrix, and {self.galore.proj_type} needs whole ones; "
                "use right, or --engine replicated"
            )
        if self.optimizer in PROJECTED and self.galore.compat != "none":
            raise ConfigError(f"galore.compat: {self.galore.compat} needs whole matrices, not {said}; drop it, or use --engine replicated")

    def check_reduction(self) -> None:
        """Refuse what cannot do with the sum of projected gradients."""
        if self.optimizer in LOW_RANK and self.optimizer not in REDUCED:
            raise ConfigError(
                f"engine: lowrank sums projected gradients, and {self.optimizer} needs whole ones; "
                f"use --engine replicated, or one of {', '.join(REDUCED)}"
            )
        if self.precision == "fp16":
            raise ConfigError(
                "precision: fp16 learns of an overflow after gradients were projected; use bf16 or fp32 with --engine lowrank"
            )
        if self.nonfinite != "stop":
            raise ConfigError(f"nonfinite: {self.nonfinite} cannot take back a basis that --engine lowrank has refreshed; use stop")

    def check_clipping(self) -> None:
        """Refuse what the place of the update does not allow."""
        if self.clip_mode != "auto" and self.grad_clip == 0:
            raise ConfigError(f"clip_mode: {self.clip_mode} clips nothing while --grad-clip is 0; add for example --grad-clip 1")
        if self.clip_mode == "global" and self.per_layer:
            raise ConfigError("clip_mode: per-layer updates are made before the global norm is known; use delayed or per_param")
        if self.clip_mode in ("delayed", "per_param") and not self.per_layer:
            raise ConfigError(f"clip_mode: {self.clip_mode} belongs to per-layer updates; add --per-layer true, or use global")
        if self.per_layer and self.precision == "fp16":
            raise ConfigError("per_layer: fp16 learns of an overflow after the updates were made; use --dtype bf16 or fp32")
        if self.per_layer and processes(self) > 1 and self.engine != "lowrank":
            raise ConfigError(f"per_layer: updates inside backward run in one process, not {processes(self)}; use --engine lowrank instead")
        if self.per_layer and self.nonfinite != "stop":
            raise ConfigError("per_layer: updates inside backward cannot be dropped; use --nonfinite stop")

    def limits(self) -> Budget:
        """--budget or --max-steps, else epochs in finetuning and tokens in pretraining; tiny under --test."""
        if self.test:
            return Budget.parse("1000 tokens" if self.mode == "pretraining" else "64 samples")
        if self.max_steps is not None:
            return Budget({"steps": self.max_steps})
        if self.budget:
            return Budget.parse(self.budget)
        if self.mode == "pretraining":
            return Budget({"tokens": self.num_epochs * self.num_training_tokens})
        return Budget({"epochs": self.num_epochs})

    def learning_rate(self, progress: Progress, size: Size, epoch_samples: int) -> float:
        """The schedule; it rises anew after each restart of ReLoRA's adapters."""
        rate, every = self.scheduled_rate(progress, size, epoch_samples), self.lora.relora_every
        restarts, since = divmod(progress.steps, every) if every else (0, 0)
        return rate * min(1.0, (since + 1) / self.lora.relora_warmup) if restarts else rate

    def scheduled_rate(self, progress: Progress, size: Size, epoch_samples: int) -> float:
        """core's shapes, `cosine_tmax`: half a cosine over `tmax` epochs (or updates), then the final rate, and
        `cosine_restarts`: core's cosine over `restart_every` updates, again and again."""
        if self.schedule not in ("cosine_tmax", "cosine_restarts"):
            return super().learning_rate(progress, size, epoch_samples)
        limits, after = self.limits(), progress.after(size)
        warmup = fraction_of_run(self.warmup, limits)
        rise = min(1.0, limits.fraction(progress, size, epoch_samples) / warmup) if warmup else 1.0
        if self.schedule == "cosine_restarts":
            if self.restart_every is None:
                raise ConfigError(
                    "restart_every: cosine_restarts needs the updates between two starts; add for example --restart-every 1000"
                )
            return self.lr * rise * cosine(((after.steps - 1) % self.restart_every + 1) / self.restart_every, self.min_lr_ratio)
        if self.tmax_unit == "step":
            passes = float(after.steps)
        elif self.mode == "pretraining":
            passes = after.tokens / self.num_training_tokens
        else:
            passes = after.samples / epoch_samples
        return self.lr * rise * cosine_tmax(passes, self.tmax, self.min_lr_ratio, repeat=self.tmax_unit == "step")

    def classifies(self) -> bool:
        """Whether a text has one label instead of one per token."""
        return self.mode == "finetuning" and self.task != "lm"

    def random_init(self) -> bool:
        """Whether the weights start random."""
        if self.model_path is not None:
            return False
        if self.init == "auto":
            return self.mode == "pretraining" or self.model.endswith("_test")
        return self.init == "random"

    def weights_dtype(self) -> str:
        """fp32 or bf16."""
        return self.param_dtype if self.param_dtype != "auto" else "bf16" if self.precision == "bf16" else "fp32"

    def run_folder(self) -> Path:
        if self.output_dir is not None:
            return self.output_dir
        model = self.model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
        return Path("models") / f"{model}_{self.optimizer}_{'pretrained' if self.mode == 'pretraining' else 'finetuned'}"


def with_targets(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The content of lora_config.json, where one value may stand for a list of targets, and an object by model for that of the present mode.

    >>> with_targets({"target_modules_finetuning": {"gpt2": ["c_attn"]}}, "target_modules_finetuning")
    {'target_modules_by_model': {'gpt2': ['c_attn']}}
    """
    for name in ("target_modules_pretraining", "target_modules_finetuning"):
        if isinstance(values.get(name), str):
            values = {**values, name: [values[name]]}
        elif isinstance(values.get(name), Mapping):
            by_model = dict(values[name]) if name == key else {}
            own = values.get("target_modules_by_model", {})
            values = {k: v for k, v in values.items() if k != name}
            values["target_modules_by_model"] = {**by_model, **own} if isinstance(own, Mapping) else own
    return values


def processes(config: TrainConfig) -> int:
    """How many processes the run has, or will have once it has started them."""
    return int(os.environ.get("WORLD_SIZE", config.num_processes))


def resolved(config: TrainConfig) -> TrainConfig:
    """`config` as it runs: the smoke test in float32, and the total batch as a number of micro-batches."""
    if config.test:
        config = again(config, precision="fp32", param_dtype="auto", wandb="off")
    by_epochs = not config.budget and config.max_steps is None
    if by_epochs and config.schedule == "cosine_tmax" and config.tmax_unit == "epoch" and config.num_epochs > config.tmax:
        log.warning(
            "tmax: %d epochs are longer than --tmax %d; the learning rate stays at its end, --min-lr-ratio %g of the peak, for the rest",
            config.num_epochs, config.tmax, config.min_lr_ratio,
        )  # fmt: skip
    if config.packing in ("false", "true"):
        config = again(config, packing="stream" if config.packing == "true" else "document")
    if config.nonfinite == "skip":
        config = again(config, nonfinite="drop")
    if config.classifies() and "eval_every" not in explicit(config):
        config = again(config, eval_every="epoch")
    if config.total_batch_size is not None:
        config = again(config, accumulate=config.total_batch_size // (config.micro_batch_size * processes(config)))
    return config


def with_data(config: TrainConfig) -> TrainConfig:
    """`config` with the default data of pretraining, C4 from the hub, as many rows as one epoch of tokens takes; and with
    --dataset-config behind the hub data sets that name none."""
    if not config.data and config.mode == "finetuning" and not config.classifies():
        raise ConfigError("data: nothing to train on; give --data, for example --data builtin:python-docs, or a --task")
    if config.data and "c4" not in config.data and config.dataset_config is None:
        return config
    if config.classifies():
        if config.dataset_config is not None:
            raise ConfigError(f"dataset_config: --task {config.task} says which part of GLUE is meant; drop it")
        return config
    c4 = f"allenai/c4:{config.dataset_config or 'en'}[{rows_of_an_epoch(config)}]"
    given = config.data or ["c4"]
    data = [c4 if source == "c4" else with_configuration(source, config.dataset_config) for source in given]
    if config.dataset_config is not None and data == given:
        raise ConfigError(f"dataset_config: no --data is a hub data set without a configuration ({', '.join(given)}); drop it")
    return again(config, data=data)


def rows_of_an_epoch(config: TrainConfig) -> int:
    """Documents that make up one epoch of tokens: they are cut to max_length, and the mean one of C4 has more than 200 tokens."""
    return math.ceil(config.num_training_tokens / min(200, config.max_length / 2))


def with_configuration(source: str, name: str | None) -> str:
    """A data argument with the configuration `name`, if it is a hub id OWNER/NAME without one.

    >>> with_configuration("owner/texts[100]@0.5", "en"), with_configuration("builtin:stdlib", "en")
    ('owner/texts:en[100]@0.5', 'builtin:stdlib')
    """
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)((\[[^\[\]]*\])?(@[^@/\[\]]*)?)", source)
    if name is None or found is None or Path(source).expanduser().exists() or Path(found[1]).expanduser().exists():
        return source
    return f"{found[1]}:{name}{found[2]}"


def again(config: TrainConfig, **values: Any) -> TrainConfig:
    """`config` with other values, whichever of the two was given on the command line."""
    made = replace(config, **values)
    object.__setattr__(made, "_given", vars(config).get("_given", frozenset()))
    return made


def cosine_tmax(passes: float, tmax: float, floor: float, repeat: bool) -> float:
    """Half a cosine from 1 to `floor` over `tmax`; beyond it the floor, or, with `repeat`, the other half and so on.

    >>> [round(cosine_tmax(x, 2, 0.0, repeat=False), 3) for x in (0, 1, 2, 3)]
    [1.0, 0.5, 0.0, 0.0]
    """
    at = passes / tmax if repeat else min(1.0, passes / tmax)
    return floor + (1 - floor) * (1 + math.cos(math.pi * at)) / 2


def moment_bits(config: TrainConfig) -> int:
    """Bits of the moments, those of embeddings and small tensors aside."""
    return config.galore.state_bits or (8 if config.optimizer in EIGHT_BIT else 32)


def used_by(config: TrainConfig, path: str) -> tuple[str, ...] | None:
    """The optimizers that use the option at `path` of a section; None where the present one does for certain."""
    head, _, name = path.rpartition(".")
    if name == "state_bits":
        return None
    if name in ("target_modules", "exclude_modules"):
        return LOW_RANK
    if name in ("block_size", "min_8bit_size", "embedding_state_bits"):
        return None if moment_bits(config) == 8 else tuple(one for one in EIGHT_BIT if one != config.optimizer)
    if name == "apollo_norm_growth":
        return "apollo", "apollo-mini", "fira"
    lora = ("lora", "lora+galore", "lora+galore8bit")
    projected = (*PROJECTED, "ldadam") if name in OF_LDADAM else PROJECTED
    return {"galore": projected, "lora": lora, "apollo": ("apollo", "apollo-mini"), "ldadam": ("ldadam",)}.get(head)


def without_foreign(config: TrainConfig) -> TrainConfig:
    """`config` without what a file says for its own optimizer, where the command line names another; what is left out is logged."""
    given = vars(config).get("_given", frozenset())
    if "optimizer" not in given or given & {"galore_config", "lora_config"}:
        return config
    found = {path for path in explicit(config) - given if (users := used_by(config, path)) and config.optimizer not in users}
    if not found:
        return config
    log.warning("optimizer: --optimizer %s does not use %s of the file; they are left out", config.optimizer, ", ".join(sorted(found)))
    foreign = [leaf for leaf in leaves(TrainConfig) if leaf.path in found]
    sections = {leaf.path.partition(".")[0] for leaf in foreign}
    defaults = {
        name: {leaf.path.partition(".")[2]: leaf.default for leaf in foreign if leaf.path.startswith(name + ".")} for name in sections
    }
    return again(config, **{name: replace(getattr(config, name), **values) for name, values in defaults.items()})


def refuse_unused(config: TrainConfig) -> None:
    """Raise ConfigError for an option that somebody chose and that this mode, optimizer, schedule or budget would ignore."""
    chosen = explicit(config)
    for path in sorted(chosen):
        flag = flag_of(path)
        if (mode := ONLY_FOR_MODE.get(path)) and config.mode != mode:
            raise ConfigError(f"{path}: only {mode} uses {flag}, not --mode {config.mode}; drop it")
        if (users := used_by(config, path)) and config.optimizer not in users:
            raise ConfigError(f"{path}: {flag} belongs to {', '.join(users)}, not to --optimizer {config.optimizer}; drop it")
        if (shapes := ONLY_FOR_SCHEDULE.get(path)) and config.schedule not in shapes:
            raise ConfigError(f"{path}: {flag} belongs to --schedule {', '.join(shapes)}, not to {config.schedule}; drop it")
    for length in ("num_epochs", "num_training_tokens"):
        for instead in ("budget", "max_steps"):
            if length in chosen and getattr(config, instead) and not config.test:
                raise ConfigError(
                    f"{length}: {flag_of(length)} and {flag_of(instead)} {getattr(config, instead)} both set the length; drop one of them"
                )


def flag_of(path: str) -> str:
    """The flag of the option at `path`."""
    return "--" + path.rpartition(".")[2].replace("_", "-")

"""Options of the commands: those that every training command shares, with the spellings and defaults of this package, and its own."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from lm_core.config import Count, change, config, explicit, leaves, opt
from lm_core.deepspeed_settings import engine_kind
from lm_core.errors import ConfigError
from lm_core.options import DataOptions, EngineOptions, ModelOptions, OptimOptions, OutputOptions, RunConfig
from lm_core.progress import Budget, Progress, Size
from lm_core.schedule import learning_rate
from mdm_scaling import planner, sizes
from mdm_scaling.sizes import Shape
from mdm_scaling.spellings import MegatronSpellings

# how many processes hold one model together
SHARED = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
LENGTHS = ("budget", "train_samples", "train_tokens", "flops", "epochs")
SHAPE_OPTIONS = ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "num_key_value_heads", "ffn_hidden_size")
# what a network is made of, which one that exists brings along
PARTS = (
    "max_position_embeddings",
    "use_rotary_position_embeddings",
    "rotary_theta",
    "normalization",
    "norm_eps",
    "swiglu",
    "disable_bias_linear",
    "untie_embeddings",
)
# what --eval-data is given in place of data by scripts that mean --eval-window
WINDOWS = (["fixed"], ["rolling"])
# what the order of the samples follows from: with one of them the content of the data, as a run sees it, changes, too
ORDER = (*LENGTHS, "unique_tokens", "seed", "global_batch_size", "max_length", "packing", "epoch_shuffle", "data", "train_data_path_file")
DIFFUSION_ONLY = (
    "mask_eps",
    "t_sampling",
    "mask_mode",
    "loss_weight",
    "max_loss_weight",
    "low_noise_start",
    "low_noise_iter",
    "low_noise_ratio",
)


@config
class ShapeOptions:
    """Sizes of a new network; those that are given override the preset's."""

    num_layers: int | None = opt(None, "Decoder layers.", ge=1)
    hidden_size: int | None = opt(None, "Width of the residual stream.", ge=2)
    num_attention_heads: int | None = opt(None, "Attention heads.", ge=1)
    kv_channels: int | None = opt(None, "Width of one head.", ge=2, multiple_of=2)
    num_key_value_heads: int | None = opt(None, "Key and value heads; default: as many as attention heads.", ge=1)
    ffn_hidden_size: int | None = opt(
        None,
        "Width of the feed-forward layers; default: two thirds of four times the hidden size, down to a multiple of 64; without SwiGLU four times.",
        ge=1,
    )
    max_position_embeddings: int | None = opt(None, "Positions of a new network; default: the sequence length.", ge=2)
    use_rotary_position_embeddings: bool = opt(
        True, "Turn queries and keys of a new network by their positions; else learned positions are added to the tokens."
    )
    rotary_theta: float = opt(10000.0, "Base of the rotary angles of a new network.", gt=0)
    normalization: Literal["rmsnorm", "layernorm"] = opt("rmsnorm", "Norms of a new network.")
    swiglu: bool = opt(True, "Gate a new network's feed-forward layers by SiLU; else they have two matrices and GELU between them.")
    norm_eps: float = opt(1e-5, "Term in the denominator of a new network's norms.", flags=("--norm-epsilon",), gt=0)
    disable_bias_linear: bool = opt(True, "Leave biases out of a new network's linear layers.")
    untie_embeddings: bool = opt(False, "Give a new network an output head of its own.", flags=("--untie-embeddings-and-output-weights",))
    init_std: float = opt(0.02, "Standard deviation of new weights.", gt=0, flags=("--init-method-std",))
    make_vocab_size_divisible_by: int = opt(sizes.DIVISIBLE_BY, "Rows of the embedding are rounded up to a multiple of this.", ge=1)
    restrict_logits: bool = opt(True, "Leave the mask and padding rows out of the softmax.")
    attention_dropout: float = opt(0.1, "Chance to drop an attention weight, for both objectives.", ge=0, lt=1)
    hidden_dropout: float = opt(
        0.1, "Chance to drop an element of the embedding and of what a layer adds, for both objectives.", ge=0, lt=1
    )


@config
class DiffusionOptions:
    """How sequences are masked, and how masked tokens weigh; only with `--objective mdm`."""

    mask_eps: float = opt(1e-3, "Smallest chance to mask a token.", gt=0, lt=1)
    t_sampling: Literal["stratified", "shift", "iid"] = opt("stratified", "How noise levels are spread over the sequences of a step.")
    mask_mode: Literal["bernoulli", "fixed-count"] = opt("bernoulli", "Mask every token by chance, or a fixed number of tokens.")
    loss_weight: Literal["elbo", "uniform"] = opt("elbo", "Weigh masked tokens as the likelihood bound does, or all alike.")
    max_loss_weight: float | None = opt(None, "Largest weight of a masked token; a clipped loss is no bound.", gt=0)
    low_noise_start: bool = opt(False, "Begin with less noise.")
    low_noise_iter: int = opt(1000, "Steps that begin with less noise.", ge=1)
    low_noise_ratio: float = opt(0.5, "Factor of the noise level in those steps.", gt=0, le=1)


@config
class ExperimentOptions:
    """Perturbations of training, all neutral by default and off in evaluations."""

    ar_ratio: float = opt(0.0, "Chance that the mask of a sequence is its suffix of the same length; only mdm.", ge=0, le=1)
    randmask_ratio: float = opt(0.0, "Chance to select a position for token masking; only ar.", ge=0, le=1)
    randmask_mode: Literal["attention", "column", "input"] = opt(
        "attention", "What a selected position does: hide earlier keys at random, be hidden from other positions, or become the mask."
    )
    num_order_list: int = opt(0, "Number of orders, of which each sequence draws one; the first is from left to right; only ar.", ge=0)
    use_predefined_order: bool = opt(False, "Orders that move further away from left to right one by one, instead of uniform ones.")
    order_target_position: Literal["none", "embedding"] = opt(
        "none", "Whether a model is told the position of the token to predict, without which other orders are ambiguous; only ar."
    )


@config
class PretrainConfig(RunConfig, MegatronSpellings, ShapeOptions, DiffusionOptions, ExperimentOptions):
    """Pre-training by masked diffusion or next-token prediction."""

    objective: Literal["ar", "mdm"] = opt(help="Autoregressive, or masked diffusion.")
    model: str = change(
        ModelOptions,
        "model",
        default="",
        flags=("--preset", "--init-from"),
        help="A size of `presets list` (random weights), or a Llama-shaped model or run to go on from: a folder, smollm2-135m or a hub id.",
    )
    data: list[str] = change(
        DataOptions,
        "data",
        flags=("--data-path",),
        help="Training data, repeatable: a prefix of .bin and .idx files, or any data argument; @W gives a weight.",
    )
    train_data_path_file: Path | None = opt(None, 'File of quoted pairs "WEIGHT PREFIX", in place of --data.')
    eval_data: list[str] = change(DataOptions, "eval_data", flags=("--valid-data-path",))
    valid_data_path_file: Path | None = opt(None, "Such a file of held-out data.")
    split: str | None = opt(
        None,
        "Shares of the documents, in their order, to train on, hold out and leave: A,B,C; default: 969,30,1 for .bin files, else --hold-out.",
    )
    text_column: str = change(DataOptions, "text_column", flags=("--json-key",))
    vocab_file: Path | None = opt(None, "GPT-2's vocabulary as JSON, with --merge-file in place of --tokenizer.")
    merge_file: Path | None = opt(None, "GPT-2's merges, one pair per line.")
    data_cache_dir: Path | None = opt(
        None,
        "Folder for tokenised data and the order of samples; default: $LM_CORE_CACHE, else ~/.cache/lm_core.",
        flags=("--data-cache-path",),
    )
    max_length: int = change(DataOptions, "max_length", default=2048, flags=("--seq-length",))
    unique_tokens: Count | None = opt(None, "Cut the training documents to their first so many tokens.", ge=2)
    epoch_shuffle: Literal["pooled", "per-epoch"] = opt("pooled", "Shuffle the documents of all epochs together, or of each by itself.")
    # a package may give an inherited option other choices, which a type checker takes for a broken promise
    packing: Literal["stream", "fixed"] = opt(  # type: ignore[assignment]
        "stream", "Join documents in a new order in each epoch, or cut the same samples every time."
    )
    shuffle: Literal[False] = opt(False, "Core's own permutation stays off: samples come in Megatron's order, which is shuffled.")
    reset_attention_mask: bool = opt(False, "Let no token see another document; a document ends with the end-of-document token.")
    reset_position_ids: bool = opt(False, "Count the positions of every document from 0.")
    eod_mask_loss: bool = opt(False, "Do not predict end-of-document tokens.")
    num_workers: int = change(DataOptions, "num_workers", default=2)
    variable_length_ratio: float = opt(0.0, "Share of sequences that are cut to a random length.", ge=0, le=1)

    global_batch_size: int = opt(256, "Sequences per update, over all processes; --accumulate follows from it.", ge=1)
    rampup_batch_size: tuple[int, int, int] | None = opt(
        None, "Begin with smaller updates, as A,B,C: with A sequences, which grow by B until they are all of them after C samples."
    )
    budget: str = change(OutputOptions, "budget", default="", help="When to stop, such as 10M tokens; or use one of the options below.")
    train_samples: Count | None = opt(None, "Sequences to train on.", ge=1)
    train_tokens: Count | None = opt(None, "Tokens to train on.", ge=1)
    flops: float | None = opt(None, "Training FLOPs, 6 N D with the nominal N.", gt=0)
    epochs: float | None = opt(None, "Passes over the first --unique-tokens.", gt=0)

    lr: float = change(OptimOptions, "lr", default=2e-4)
    min_lr: float | None = opt(None, "Final learning rate, in place of --min-lr-ratio.", ge=0)
    min_lr_ratio: float = change(OptimOptions, "min_lr_ratio", default=0.1)
    schedule: Literal["cosine", "linear", "constant", "exp", "inverse-sqrt", "inverse-square-root"] = change(  # type: ignore[assignment]
        OptimOptions, "schedule", flags=("--lr-decay-style",)
    )
    warmup: Count | None = opt(  # type: ignore[assignment]
        None,
        "Warm-up: samples (or the unit of --budget), or a fraction of the run below 1; default: a hundredth, at least 100 samples, at most half.",
        flags=("--lr-warmup-samples", "--lr-warmup-fraction"),
        ge=0,
    )
    lr_decay_samples: Count | None = opt(None, "Samples at which the decay ends; default: the length of the run.", ge=1)
    weight_decay: float = change(OptimOptions, "weight_decay", default=0.1)
    betas: tuple[float, float] = change(OptimOptions, "betas", default=(0.9, 0.95), flags=("--adam-betas",))
    eps: float = change(OptimOptions, "eps", flags=("--adam-eps",))
    grad_clip: float = change(OptimOptions, "grad_clip", flags=("--clip-grad",))

    engine: Literal["auto", "replicated", "sharded", "deepspeed", "single", "pipeline", "torch"] = change(  # type: ignore[assignment]
        EngineOptions,
        "engine",
        help="Where weights, gradients and optimizer state live; single is replicated, pipeline and torch split a model over processes.",
    )
    tensor_model_parallel_size: int = opt(
        1, "Processes that share one model, each with a part of the heads and feed-forward columns.", ge=1
    )
    pipeline_model_parallel_size: int = opt(
        1, "Processes that share one model, each with some of its layers; multiplies with the above.", ge=1
    )
    precision: Literal["fp32", "bf16", "fp16"] = change(EngineOptions, "precision", default="bf16")
    nonfinite: Literal["stop", "drop"] = change(EngineOptions, "nonfinite", default="drop")
    seed: int = change(OutputOptions, "seed", default=1234)
    output_dir: Path | None = change(OutputOptions, "output_dir", flags=("--save",))
    run_name: str | None = change(OutputOptions, "run_name", flags=("--wandb-exp-name",))
    wandb_project: str = change(OutputOptions, "wandb_project", help="Project name in Weights & Biases; alone, it means --wandb online.")
    resume: str = change(OutputOptions, "resume", flags=("--load",))
    override_resume: list[str] = opt(
        help="Option that a resumed run may change although samples or model depend on it, repeatable; data: the content of the data.",
        factory=list,
    )
    save_every: str = change(OutputOptions, "save_every", flags=("--save-interval",))
    keep_checkpoints: int = change(OutputOptions, "keep_checkpoints", flags=("--keep-last",))
    keep_best: bool = change(OutputOptions, "keep_best", default=True)
    eval_every: str = change(OutputOptions, "eval_every", default="1000", flags=("--eval-interval",))
    skip_train: bool = opt(
        False,
        "Train nothing: export the newest checkpoint in --load to its folder final, and score the held-out corpora under it, by --num-mc draws.",
    )
    eval_iters: int = opt(100, "Global batches of an evaluation, at most one pass; --eval-tokens wins.", ge=1)
    eval_window: Literal["fixed", "rolling"] = opt(
        "fixed", "Evaluate the same held-out sequences every time, or go on behind the last ones, from the beginning after the end."
    )
    log_every: int = change(OutputOptions, "log_every", flags=("--log-interval",))
    kill_file: Path | None = change(OutputOptions, "kill_file", flags=("--kill-switch-file",))
    stop_every: int | None = change(OutputOptions, "stop_every", flags=("--exit-interval",))
    stop_minutes: float | None = change(OutputOptions, "stop_minutes", flags=("--exit-duration-in-mins",))
    num_mc: int = opt(1, "Draws of the noise per held-out sequence.", ge=1)
    eval_seed: int = opt(4321, "Address of the noise of evaluations.", ge=0)

    def check(self) -> None:
        sized = [name for name in SHAPE_OPTIONS if getattr(self, name) is not None]
        if sized and self.model and self.model not in sizes.ALL:
            raise ConfigError(f"{sized[0]}: {self.model} brings its own sizes; drop --{sized[0].replace('_', '-')}, or name a preset")
        if self.model and self.model not in sizes.ALL and (own := [name for name in PARTS if name in explicit(self)]):
            raise ConfigError(f"{own[0]}: {self.model} brings its own; drop --{own[0].replace('_', '-')}, or name a preset")
        self._check_parts()
        if self.objective == "ar" and (wrong := [name for name in DIFFUSION_ONLY if name in explicit(self)]):
            raise ConfigError(f"{wrong[0]}: only --objective mdm masks tokens; drop --{wrong[0].replace('_', '-')}")
        if self.objective == "ar" and self.ar_ratio:
            raise ConfigError(f"ar_ratio: {self.ar_ratio:g} replaces masks, which --objective ar has none of; use --objective mdm")
        ordered = self.order_target_position != "none"
        perturbed = [name for name in ("randmask_ratio", "num_order_list", "use_predefined_order") if getattr(self, name)]
        if self.objective == "mdm" and (perturbed or ordered):
            name = [*perturbed, "order_target_position"][0]
            raise ConfigError(f"{name}: {getattr(self, name)} perturbs next-token prediction, not --objective mdm; use --objective ar")
        if self.num_orders > 1 and (self.eod_mask_loss or self.variable_length_ratio or self.randmask_ratio):
            raise ConfigError(
                "num_order_list: goes with neither --eod-mask-loss, --variable-length-ratio nor --randmask-ratio; drop one of the two"
            )
        if self.randmask_ratio and self.randmask_mode != "input" and self.variable_length_ratio:
            raise ConfigError("randmask_ratio: of this mode does not go with --variable-length-ratio; drop one of the two")
        if apart := [name for name in ("reset_attention_mask", "reset_position_ids") if getattr(self, name)]:
            hidden = self.randmask_ratio and self.randmask_mode != "input"
            if self.num_orders > 1 or self.variable_length_ratio or hidden or ordered:
                raise ConfigError(
                    f"{apart[0]}: goes with neither --num-order-list, --order-target-position, --variable-length-ratio nor --randmask-ratio of keys; "
                    "drop one of the two"
                )
        if self.mask_mode == "fixed-count" and self.t_sampling == "shift":
            raise ConfigError("t_sampling: shift gives every step the same counts under --mask-mode fixed-count; use stratified or iid")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ConfigError(f"min_lr: {self.min_lr:g} is above the peak {self.lr:g}; use a smaller value")
        if self.max_position_embeddings is not None and self.max_length > self.max_position_embeddings:
            raise ConfigError(
                f"max_length: {self.max_length} is beyond the {self.max_position_embeddings} positions; use at most that many"
            )
        if self.data and self.train_data_path_file:
            raise ConfigError("train_data_path_file: --data is given, too; use one of them")
        if self.eval_data and self.eval_data not in WINDOWS and self.valid_data_path_file:
            raise ConfigError("valid_data_path_file: --eval-data is given, too; use one of them")
        if (self.vocab_file is None) != (self.merge_file is None):
            raise ConfigError("vocab_file: comes with --merge-file; give both, or --tokenizer FOLDER")
        if self.tokenizer == "gpt2-bpe" and not self.vocab_file:
            raise ConfigError("tokenizer: gpt2-bpe is made of --vocab-file and --merge-file; give both, or name another tokenizer")
        if self.vocab_file and self.tokenizer not in (None, "gpt2-bpe"):
            raise ConfigError(f"vocab_file: --tokenizer {self.tokenizer} is given, too; use one of them")
        if self.skip_train and not (self.eval_data or self.valid_data_path_file):
            raise ConfigError("skip_train: nothing to score; give --valid-data-path-file or --eval-data")
        if self.rampup_batch_size:
            start, more, samples = self.rampup_batch_size
            full = self.global_batch_size
            if start < 1 or more < 1 or samples < 1 or start >= full or (full - start) % more:
                raise ConfigError(
                    f"rampup_batch_size: {start},{more},{samples} does not grow from {start} to the {full} of --global-batch-size in steps of {more}; "
                    "give a start below it, and a step that divides the rest"
                )
        _ = self.arithmetic
        known = {leaf.path for leaf in leaves(type(self))} | {"data"}
        if unknown := [name for name in self.overridden if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, 1)
            raise ConfigError(
                f"override_resume: {unknown[0]!r} is no option; {f'did you mean {near[0]}?' if near else '--help lists them'}"
            )
        if self.split is not None:
            planner.shares(self.split)
        for name in SHARED:
            if getattr(self, name) > 1 and engine_kind(self) != "replicated":
                raise ConfigError(
                    f"{name}: {getattr(self, name)} goes with the replicated engine alone; drop --engine, --zero-stage and --offload"
                )
        if self.engine in ("single", "pipeline", "torch") and (self.zero_stage or self.offload != "none" or self.deepspeed_config):
            raise ConfigError(f"engine: {self.engine} has no ZeRO stage, offload or DeepSpeed file; drop these, or use --engine deepspeed")
        if self.engine in ("pipeline", "torch") and self.tensor_model_parallel_size * self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"engine: {self.engine} splits a model, and one process would hold all of it; add --pipeline-model-parallel-size 2, or use single"
            )
        if self.shape and self.shape.layers < self.pipeline_model_parallel_size:
            raise ConfigError(
                f"pipeline_model_parallel_size: {self.pipeline_model_parallel_size} stages, but {self.shape.layers} layers; use at most that many"
            )

    def _check_parts(self) -> None:
        shape = self.shape
        if shape is None:
            return
        if shape.positions and "rotary_theta" in explicit(self):
            raise ConfigError("rotary_theta: there are no rotary positions; drop it or --no-use-rotary-position-embeddings")
        if shape.positions == self.max_length and self.num_orders > 1:
            raise ConfigError(
                f"num_order_list: reaches position {self.max_length}, the {shape.positions} learned ones end before it; "
                f"add --max-position-embeddings {self.max_length + 1}"
            )
        if not shape.is_llama and self.order_target_position != "none":
            raise ConfigError(
                "order_target_position: is a part of LLaMA alone; drop it, or --normalization, --no-swiglu and learned positions"
            )

    @property
    def shape(self) -> Shape | None:
        """The sizes of a new network; None where a model brings its own."""
        if re.fullmatch(r"\d+[kKmMbB]?", self.model):
            # no model is called so: a size, perhaps with a typing error
            sizes.named(self.model)
        if self.model and self.model not in sizes.ALL:
            return None
        base = sizes.ALL.get(self.model)
        layers, hidden = self.num_layers or (base and base.layers), self.hidden_size or (base and base.hidden)
        heads, head_size = self.num_attention_heads or (base and base.heads), self.kv_channels or (base and base.head_size)
        if not (layers and hidden and heads and head_size):
            raise ConfigError(
                "model: no network; give --preset, --init-from, or --num-layers, --hidden-size, --num-attention-heads and --kv-channels"
            )
        ffn = self.ffn_hidden_size or (base.ffn if base and not self.hidden_size and self.swiglu else None)
        vocabulary = base.vocabulary if base else sizes.NOMINAL_VOCABULARY
        return sizes.shape(
            layers, hidden, heads, head_size, ffn, self.num_key_value_heads, vocabulary, layernorm=self.normalization == "layernorm",
            swiglu=self.swiglu, bias=not self.disable_bias_linear,
            positions=0 if self.use_rotary_position_embeddings else self.max_position_embeddings or self.max_length,
        )  # fmt: skip

    @property
    def arithmetic(self) -> Literal["fp32", "bf16", "fp16"]:
        """The precision by whichever option names it."""
        names: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
        chosen = [name for name in names if getattr(self, name)]
        if "precision" in explicit(self) and self.precision not in chosen:
            chosen.append(self.precision)
        if len(chosen) > 1:
            raise ConfigError(f"precision: {' and '.join(chosen)} given; use one of them")
        return chosen[0] if chosen else self.precision

    @property
    def overridden(self) -> frozenset[str]:
        """Options that a resumed run may change, and the data where their order follows from one of these."""
        names = {name.replace("-", "_") for name in self.override_resume}
        return frozenset(names | {"data"} if names & set(ORDER) else names)

    def sequences(self, world: int) -> int:
        """Sequences of one update on so many processes."""
        return self.micro_batch_size * self.accumulate * self.replicas(world)

    @cached_property
    def smaller_batches(self) -> list[int]:
        """Sequences of each update before the batch is full."""
        return planner.batches(*self.rampup_batch_size, self.global_batch_size) if self.rampup_batch_size else []

    def ramp(self, world: int) -> list[int]:
        return [size // (self.micro_batch_size * world) for size in self.smaller_batches]

    def update(self, step: int, world: int) -> tuple[int, int]:
        """(number of the first sequence, sequences) of an update on so many processes."""
        smaller, full = self.smaller_batches, self.sequences(world)
        if step < len(smaller):
            return sum(smaller[:step]), smaller[step]
        return sum(smaller) + (step - len(smaller)) * full, full

    def replicas(self, world: int) -> int:
        """Copies of the model on so many processes; each one sees other data."""
        one = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        if world % one:
            name = next(name for name in SHARED if getattr(self, name) > 1)
            raise ConfigError(
                f"{name}: {one} processes share a model, which does not divide the {world} processes; start a multiple of {one}"
            )
        return world // one

    @property
    def num_orders(self) -> int:
        """Orders to predict in; 1 is plain next-token prediction."""
        return max(1, self.num_order_list)

    @property
    def count(self) -> int:
        """N: the nominal count of a new network, the exact one of a model that brings its own sizes."""
        return self.shape.nominal if self.shape else planner.count_of(self.model)

    @property
    def samples(self) -> int | None:
        """Sequences of the run by the option that was chosen; None where `budget` says it in its own words."""
        if self.train_samples:
            return int(self.train_samples)
        if self.train_tokens:
            return round(int(self.train_tokens) / self.max_length)
        if self.flops:
            return round(planner.tokens_for(self.flops, self.count) / self.max_length)
        if self.epochs:
            assert self.unique_tokens
            return int(self.unique_tokens * self.epochs // self.max_length)
        return None

    def limits(self) -> Budget:
        given = [name for name in LENGTHS if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ConfigError(f"budget: {found} given; use exactly one of {', '.join('--' + name.replace('_', '-') for name in LENGTHS)}")
        if self.epochs and not self.unique_tokens:
            raise ConfigError("epochs: counts passes over --unique-tokens, which is not given; add it, or use --budget 'N epochs'")
        samples = self.samples
        if samples is None:
            return Budget.parse(self.budget)
        # whole updates only
        whole = 0
        for size in self.smaller_batches:
            whole += size if whole + size <= samples else 0
        whole += (samples - whole) // self.global_batch_size * self.global_batch_size
        if whole == 0:
            raise ConfigError(f"budget: {samples} samples are less than one update of {self.global_batch_size}; lower --global-batch-size")
        return Budget({"samples": whole})

    def learning_rate(self, progress: Progress, size: Size, epoch_samples: int) -> float:
        limits = self.limits()
        length = limits.limits[limits.unit]
        warmup = self.warmup
        if warmup is None:
            warmup = planner.warmup(int(length)) if limits.unit == "samples" else 0.01
        if limits.unit == "samples" and warmup == length and self.schedule != "constant":
            raise ConfigError(f"warmup: {warmup:g} samples are the whole run, with none left for the decay; shorten it")
        if self.lr_decay_samples:
            if limits.unit != "samples":
                raise ConfigError(f"lr_decay_samples: the run is limited in {limits.unit}; give its length in samples, too")
            warmup = warmup if warmup >= 1 else warmup * length
            if warmup >= self.lr_decay_samples:
                raise ConfigError(f"lr_decay_samples: {self.lr_decay_samples:g} is not beyond the warm-up of {warmup:g}; make it longer")
            limits = Budget({"samples": self.lr_decay_samples})
        ratio = self.min_lr_ratio if self.min_lr is None else self.min_lr / self.lr
        shape = "inverse-sqrt" if self.schedule == "inverse-square-root" else self.schedule
        return learning_rate(_Rates(self.lr, shape, warmup, self.cooldown, ratio), limits, progress, size, epoch_samples)  # type: ignore[arg-type]

    def run_folder(self) -> Path:
        if self.output_dir is not None:
            return self.output_dir
        name = self.model.rstrip("/").rpartition("/")[2] or "model"
        return Path("runs") / f"{name}_{self.objective}"


class _Rates:
    """What core's schedule asks of the options."""

    def __init__(self, lr: float, schedule: str, warmup: float, cooldown: float, min_lr_ratio: float) -> None:
        self.lr, self.schedule, self.warmup, self.cooldown, self.min_lr_ratio = lr, schedule, warmup, cooldown, min_lr_ratio


def settled(options: PretrainConfig) -> PretrainConfig:
    """`options` with what follows from others: the accumulation, the length of an evaluation, where to resume."""
    world = int(os.environ.get("WORLD_SIZE") or options.num_processes)
    options = replace(_with_accumulation(options, options.replicas(world)), precision=options.arithmetic)
    one = options.micro_batch_size * options.replicas(world)
    if wrong := [number for number in (options.rampup_batch_size or ())[:2] if number % one]:
        raise ConfigError(
            f"rampup_batch_size: {wrong[0]} is not a multiple of {one} ({options.micro_batch_size} sequences on each copy of the model); "
            "change --micro-batch-size"
        )
    if options.vocab_file and options.merge_file:
        from mdm_scaling.data.vocabulary import gpt2

        options = replace(options, tokenizer=str(gpt2(options.vocab_file, options.merge_file)), vocab_file=None, merge_file=None)
    if options.eval_data in WINDOWS:
        options = replace(options, eval_data=[], eval_window="rolling" if options.eval_data == ["rolling"] else "fixed")
    if options.tokenizer is not None:
        name = "bytes" if options.tokenizer == "byte" else options.tokenizer.removeprefix("hf:")
        options = replace(options, tokenizer=name)
    if not options.eval_tokens:
        options = replace(options, eval_tokens=options.eval_iters * options.global_batch_size * options.max_length)
    if options.resume not in ("auto", "none") and Path(options.resume).resolve() == options.run_folder().resolve():
        # Megatron's scripts give one folder for both
        options = replace(options, resume="auto")
    return options


def _with_accumulation(options: PretrainConfig, world: int) -> PretrainConfig:
    one = options.micro_batch_size * world
    chosen, wanted = explicit(options), options.global_batch_size
    if "accumulate" in chosen and one * options.accumulate != wanted:
        if "global_batch_size" in chosen:
            raise ConfigError(
                f"global_batch_size: {wanted} is not {options.micro_batch_size} x {options.accumulate} on {world} processes; leave --accumulate out"
            )
        return replace(options, global_batch_size=one * options.accumulate)
    if wanted % one:
        raise ConfigError(
            f"global_batch_size: {wanted} is not a multiple of {one} ({options.micro_batch_size} sequences on each of {world} processes); "
            "change --micro-batch-size"
        )
    return replace(options, accumulate=wanted // one)


@config
class DeepSpeedConfig(PretrainConfig):
    """What DeepSpeed is told for a run."""

    out: Path = opt(help="JSON file to write.")

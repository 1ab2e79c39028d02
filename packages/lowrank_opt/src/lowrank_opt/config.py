"""Options of `lowrank-opt train`: the contract flags of the original guide over the options that every command shares."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lm_core.config import Count, Mistakes, change, config, load, opt, section
from lm_core.errors import ConfigError
from lm_core.options import DataOptions, EngineOptions, ModelOptions, OptimOptions, OutputOptions, RunConfig
from lm_core.progress import Budget, Progress, Size
from lm_core.schedule import cosine, fraction_of_run
from lowrank_opt import checks
from lowrank_opt.checks import DIST
from lowrank_opt.optimizer_options import OPTIMIZERS, ApolloOptions, GaloreOptions, LdadamOptions, LoraOptions

LORA_FILE, GALORE_FILE = Path("config/lora_config.json"), Path("config/galore_config.json")


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
        "lm",
        "Finetuning only: next token, or a GLUE task; its data are --data with sentence (or sentence1, sentence2) and label. "
        "sst2 where nothing else is meant: without --data, and for roberta.",
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
    stochastic_rounding: bool = opt(True, "Round updates of weights in bfloat16 or 8 bits at random, so that small ones are not lost.")
    test: bool = opt(False, "Smoke test: 1000 tokens or 64 samples, one epoch, float32, nothing sent anywhere.")
    galore: GaloreOptions = section(GaloreOptions)
    apollo: ApolloOptions = section(ApolloOptions)
    ldadam: LdadamOptions = section(LdadamOptions)
    lora: LoraOptions = section(LoraOptions)

    @classmethod
    def further_layers(cls, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The two JSON files, read like a last --config; an absent default one stands for the packaged content. And --dist as an engine,
        and the task of finetuning that names none."""
        layers: list[Mapping[str, Any]] = []
        # values of another type are refused where all options are checked
        texts = {name: value for name, value in values.items() if isinstance(value, str | Path)}
        if texts.get("dist") in DIST:
            layers.append({"engine": DIST[str(texts["dist"])]})
        classifier = str(texts.get("model", "")).startswith("roberta")
        if texts.get("mode") == "finetuning" and "task" not in values and (classifier or not values.get("data")):
            layers.append({"task": "sst2"})
        for section_name, default in (("lora", LORA_FILE), ("galore", GALORE_FILE)):
            option = f"{section_name}_config"
            path = Path(texts.get(option, default))
            if os.path.exists(path):  # unlike Path.exists, also of a name that no file can have
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
        checks.check(self)

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


def cosine_tmax(passes: float, tmax: float, floor: float, repeat: bool) -> float:
    """Half a cosine from 1 to `floor` over `tmax`; beyond it the floor, or, with `repeat`, the other half and so on.

    >>> [round(cosine_tmax(x, 2, 0.0, repeat=False), 3) for x in (0, 1, 2, 3)]
    [1.0, 0.5, 0.0, 0.0]
    """
    at = passes / tmax if repeat else min(1.0, passes / tmax)
    return floor + (1 - floor) * (1 + math.cos(math.pi * at)) / 2

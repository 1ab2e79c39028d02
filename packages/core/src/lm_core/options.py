"""The options that every `train`-like command shares, by topic. A package inherits `RunConfig` and adds its own.

Options are flat: the flag `--max-length` is the YAML key `max_length`. A package changes a default or adds a
historic spelling with `change(Base, "name", default=..., flags=(...))`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lm_core.config import Count, config, opt
from lm_core.errors import ConfigError
from lm_core.progress import Budget, Every, Progress, Size
from lm_core.schedule import learning_rate


@config
class ModelOptions:
    model: str = opt(help="Model: a preset name, a folder, a .gguf file, smollm2-135m, or a hub id.")
    tokenizer: str | None = opt(
        None, "Tokenizer: bytes, bpe:N (N entries, trained from the data), a folder or a hub id; default: the model's own."
    )
    gradient_checkpointing: bool = opt(False, "Recompute activations in the backward pass instead of keeping them.")


@config
class DataOptions:
    data: list[str] = opt(
        help="Training data, repeatable: builtin:python-docs, builtin:stdlib, synthetic:NAME, a file, a folder or a hub id; add [N] for N samples, @W for a weight.",
        factory=list,
    )
    eval_data: list[str] = opt(help="Held-out data, written like --data; default: the held-out split of --data.", factory=list)
    text_column: str = opt("text", "Column or key that holds the text.")
    hold_out: float = opt(0.05, "Fraction of the documents held out when --eval-data is not given.", ge=0, lt=1)
    max_length: int = opt(512, "Tokens per sample.", ge=2)
    packing: Literal["stream", "best-fit", "document"] = opt("stream", "How documents share a sample.")
    shuffle: bool = opt(True, "Permute the samples of every epoch.")
    num_workers: int = opt(0, "Processes that prepare batches beside the training process.", ge=0)


@config
class OptimOptions:
    lr: float = opt(3e-4, "Peak learning rate.", flags=("-l", "--learning-rate"), gt=0)
    schedule: Literal["cosine", "linear", "constant", "exp", "inverse-sqrt"] = opt("cosine", "Shape of the learning rate after warm-up.")
    warmup: Count = opt(0, "Warm-up length: a fraction of the budget below 1, else in the unit of the budget.", ge=0)
    cooldown: Count = opt(0, "Linear cool-down to the final rate at the end, written like --warmup.", ge=0)
    min_lr_ratio: float = opt(0.0, "Final learning rate as a fraction of the peak.", ge=0, le=1)
    weight_decay: float = opt(0.0, "Decoupled weight decay; not applied to biases and norms.", ge=0)
    betas: tuple[float, float] = opt((0.9, 0.999), "Decay rates of Adam's two moments, as A,B.")
    eps: float = opt(1e-8, "Term added to Adam's denominator.", gt=0)
    grad_clip: float = opt(1.0, "Largest global gradient norm; 0 turns clipping off.", ge=0)


@config
class EngineOptions:
    engine: Literal["auto", "replicated", "sharded", "deepspeed"] = opt("auto", "Where weights, gradients and optimizer state live.")
    zero_stage: Literal[0, 1, 2, 3] | None = opt(None, "ZeRO stage of the deepspeed engine; 0 is the replicated engine.")
    offload: Literal["none", "optimizer", "all"] = opt("none", "What the deepspeed engine keeps in host memory.")
    deepspeed_config: Path | None = opt(None, "JSON of DeepSpeed settings, taken over where no option of ours decides.")
    precision: Literal["fp32", "bf16", "fp16"] = opt(
        "fp32", "Arithmetic of forward and backward passes; weights and optimizer state stay float32."
    )
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "Device to train on.")
    kernels: Literal["auto", "reference", "cpu", "cuda"] = opt("auto", "Which implementation of the compiled operators runs.")
    num_processes: int = opt(1, "Processes on this machine; more than 1 without a launcher starts torchrun.", ge=1)
    micro_batch_size: int = opt(8, "Samples per process in one forward pass.", ge=1)
    eval_micro_batch_size: int | None = opt(
        None, "Samples per process in one forward pass of an evaluation; default: --micro-batch-size.", ge=1
    )
    accumulate: int = opt(1, "Micro-batches per process in one update.", ge=1)
    nonfinite: Literal["stop", "drop"] = opt("stop", "What to do with a step whose loss or gradient is not finite.")
    deterministic: bool = opt(False, "Refuse operations without a deterministic implementation.")


@config
class OutputOptions:
    output_dir: Path | None = opt(None, "Run folder; default: runs/<model>_<method>.", flags=("-o",))
    budget: str = opt(
        "1000 steps", 'When to stop, for example "100M tokens", "3 epochs" or "500 steps, 2 hours"; the first limit reached ends the run.'
    )
    stop_loss: float | None = opt(None, "Stop when the mean training loss of the last 20 steps is below this value.")
    kill_file: Path | None = opt(None, "Stop after a checkpoint as soon as this file exists.")
    stop_minutes: float | None = opt(None, "Save and leave with exit code 130 after so many minutes; --resume auto goes on.", gt=0)
    stop_every: int | None = opt(None, "Save and leave with exit code 130 at every multiple of so many steps; --resume auto goes on.", ge=1)
    seed: int = opt(0, "Address of all randomness.", ge=0)
    resume: str = opt(
        "none",
        "Continue a run: none, auto or latest (the newest complete checkpoint, else start) or a checkpoint folder.",
        flags=("--resume_from_checkpoint",),
    )
    overwrite: bool = opt(False, "Delete what the run folder holds and start again.")
    save_every: str = opt("1000", "Steps between checkpoints, a fraction of the budget, epoch, or never.")
    keep_checkpoints: int = opt(2, "How many of the newest checkpoints to keep; 0 keeps all.", ge=0)
    keep_optimizer: int = opt(0, "How many of the newest checkpoints keep their optimizer state; 0: all of them.", ge=0)
    save_only_model: bool = opt(False, "Checkpoints are model folders without what it takes to resume from them.")
    keep_best: bool = opt(False, "Keep the model with the lowest held-out loss in best/, a folder like final/.")
    eval_every: str = opt("0.1", "Steps between evaluations, a fraction of the budget, epoch, or never.")
    eval_tokens: Count = opt(0, "Held-out tokens per source and evaluation; 0 uses all.", ge=0)
    log_every: int = opt(10, "Steps between two log records.", ge=1)
    log_first: bool = opt(True, "Log the first step, too.")
    tensorboard: bool = opt(True, "Write TensorBoard files into the run folder.")
    wandb: Literal["off", "offline", "online"] = opt("off", "Weights & Biases; online needs WANDB_API_KEY.")
    wandb_project: str = opt("lm-methods", "Project name in Weights & Biases.")
    wandb_group: str | None = opt(None, "Group of the run in Weights & Biases.")
    run_name: str | None = opt(None, "Name of the run in Weights & Biases; default: that of the run folder.")
    sample_prompt: str | None = opt(None, "Prompt to continue at the end of the run; the text goes to sample.txt.")


@config
class RunConfig(ModelOptions, DataOptions, OptimOptions, EngineOptions, OutputOptions):
    """All shared options. A package that counts or schedules otherwise overrides the methods below."""

    dry_run: bool = opt(False, "Build everything, run one micro-batch, print parameters, memory, steps, tokens and time, and stop.")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if self.resume == "latest":
            # another word for it, which the guides of the original code use
            object.__setattr__(self, "resume", "auto")
        limits = self.limits()
        Every.parse(self.save_every, "save_every")
        Every.parse(self.eval_every, "eval_every")
        if self.zero_stage is not None and self.engine not in ("auto", "deepspeed"):
            raise ConfigError(f"zero_stage: {self.zero_stage} belongs to the deepspeed engine, not to {self.engine}; drop one of the two")
        if self.offload != "none" and self.engine not in ("auto", "deepspeed"):
            raise ConfigError(f"offload: {self.offload} belongs to the deepspeed engine, not to {self.engine}; use --engine deepspeed")
        if self.deepspeed_config is not None and self.engine not in ("auto", "deepspeed"):
            raise ConfigError(
                f"deepspeed_config: {self.deepspeed_config} belongs to the deepspeed engine, not to {self.engine}; drop one of the two"
            )
        if self.overwrite and self.resume != "none":
            raise ConfigError(f"overwrite: a run cannot be deleted and resumed ({self.resume}) at once; drop --overwrite or --resume")
        # lengths that depend on the data are checked again when it is known
        if limits.unit != "epochs":
            self.learning_rate(Progress(), Size(samples=1, tokens=1, targets=1), 1)

    def limits(self) -> Budget:
        """When the run ends."""
        return Budget.parse(self.budget)

    def held_out_tokens_used(self) -> int:
        """Held-out tokens of each source in one evaluation; 0 for all."""
        return int(self.eval_tokens)

    def learning_rate(self, progress: Progress, size: Size, epoch_samples: int) -> float:
        """The rate of the step about to run: a pure function of progress, so a resumed run needs no saved schedule."""
        return learning_rate(self, self.limits(), progress, size, epoch_samples)

    def ramp(self, world: int) -> Sequence[int]:
        """Micro-batches per data rank of the first steps, where these take fewer than `accumulate`; `world` counts data ranks."""
        return ()

    def run_folder(self) -> Path:
        """`output_dir`, or a folder under `runs/` named by the model and the package."""
        if self.output_dir is not None:
            return self.output_dir
        model = re.sub(r"[^\w.-]+", "-", self.model.rstrip("/").rpartition("/")[2]) or "model"
        return Path("runs") / f"{model}_{type(self).__module__.partition('.')[0]}"

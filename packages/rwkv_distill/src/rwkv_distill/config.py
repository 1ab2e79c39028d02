"""Options of `rwkv-distill train`: the flags of the original guide over the options that every command shares."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from lm_core.config import Count, change, config, explicit, leaves, opt, section
from lm_core.errors import ConfigError
from lm_core.options import DataOptions, EngineOptions, ModelOptions, OptimOptions, OutputOptions, RunConfig
from lm_core.progress import Budget, Progress, Size
from lm_core.schedule import SHAPES
from rwkv_distill.files import translate
from rwkv_distill.student_config import StudentConfig

# a teacher of random weights, for tests and examples
MODELS = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
}
BATCHING = {"pad": "document", "concat": "stream", "pack": "best-fit"}
WARMUP_FLOOR = 0.01
# options that only some stages use: a choice elsewhere is refused, never ignored
STAGES: dict[str, tuple[int, ...]] = dict.fromkeys(("align_loss", "layer_local"), (1,))
STAGES |= dict.fromkeys(
    ("teacher_model_id", "kl_weight", "ce_weight", "temperature", "kl_direction", "kl_chunk", "kl_on", "teacher_cache"), (2,)
)
STAGES |= dict.fromkeys(("full_params", "freeze_mlp", "dropout", "mlp_lora_rank"), (2, 3))
KERNELS = {"": "auto", "auto": "auto", "cuda": "cuda", "cpu": "cpu", "torch": "reference", "fla": "auto"}
PROCESSES = 4


C = TypeVar("C", bound="TrainConfig")


@config
class TrainConfig(RunConfig):
    """Distillation of a Transformer into a student with RWKV time mixing."""

    model: str = change(ModelOptions, "model", help="Teacher: tiny (random weights), smollm2-135m, a folder, a .gguf file or a hub id.")
    gradient_checkpointing: bool = change(ModelOptions, "gradient_checkpointing", default=True, flags=("-g", "--grad-cp"))
    student: StudentConfig = section(StudentConfig)
    gate_free: bool = opt(False, "Same as --gate none.", flags=("-e",))

    data: list[str] = change(DataOptions, "data", flags=("-r", "--raw-data"))
    preprocessed_data: list[str] = opt(
        help="Token ids instead of text: saved datasets with input_ids, token shards, or .bin/.idx pairs; repeatable.",
        factory=list,
        flags=("-p",),
    )
    max_length: int = change(DataOptions, "max_length", flags=("-m",))
    packing: Literal["best-fit", "document", "stream"] = change(DataOptions, "packing", default="best-fit")
    batching: Literal["pad", "concat", "pack"] | None = opt(
        None, "Other words for --packing: pad is document, concat is stream, pack is best-fit."
    )
    need_to_pad: bool = opt(False, "Same as --batching concat.", flags=("-N",))
    padding_side: Literal["left", "right"] = opt("right", "Where rows that are too short are filled.")

    stage: Literal[1, 2, 3] = opt(
        1,
        "1 aligns each layer's output with the teacher's attention; 2 distils the teacher's next-token distribution; 3 trains on the text.",
        flags=("-s",),
    )
    ckpt_file: Path | None = opt(
        None, "Weights to start from: a .bin or .safetensors file, a checkpoint, a final/ folder or a run folder.", flags=("-k",)
    )
    teacher_model_id: str | None = opt(
        None, "Another model whose distribution is learned, with the same tokens (stage 2); default: --model.", flags=("-i",)
    )
    full_params: bool = opt(False, "Train embedding, final norm and head, too (stages 2 and 3).", flags=("-F",))
    freeze_mlp: bool = opt(False, "Leave the MLPs as they are (stages 2 and 3).", flags=("-z",))
    mlp_lora_rank: int = opt(
        0, "Above 0: train low-rank additions to the MLPs instead of their weights; final/ holds the sum (stages 2 and 3).", ge=0
    )
    align_loss: Literal["l2", "mse", "relative"] = opt("l2", "Distance between a mixer's output and the teacher's attention (stage 1).")
    layer_local: bool = opt(True, "Free every layer's activations before the next layer runs (stage 1; memory does not grow with depth).")
    calibrate: bool = opt(True, "Scale the output projections so that stage 1 starts at the least squared error; not with -k.")
    kl_weight: float = opt(1.0, "Weight of the divergence from the teacher (stage 2).", ge=0)
    ce_weight: float = opt(0.0, "Weight of the cross entropy of the text (stage 2).", ge=0)
    temperature: float = opt(1.0, "Divides the logits of both sides before they are compared (stage 2).", gt=0)
    kl_direction: Literal["forward", "reverse", "adaptive"] = opt(
        "forward", "Which divergence: KL(teacher|student), KL(student|teacher), or a mixture by where they differ (stage 2)."
    )
    teacher_cache: Path | None = opt(None, "Folder of cache-teacher, instead of the teacher (stage 2, temperature 1).")
    kl_on: Literal["all", "assistant"] = opt(
        "all", "Compare distributions everywhere, or only where a labelled token follows: in chats what the assistant says (stage 2)."
    )
    kl_chunk: int = opt(256, "Positions whose logits exist at a time (stage 2).", ge=1)
    dropout: float = opt(0.05, "Share of the mixers' output that is dropped (stages 2 and 3).", ge=0, lt=1)

    micro_batch_size: int = change(EngineOptions, "micro_batch_size", default=1, flags=("-b", "--micro-bsz"))
    accumulate: int = change(EngineOptions, "accumulate", default=4, flags=("-a", "--accumulate-grad-batches"))
    num_processes: int = change(
        EngineOptions,
        "num_processes",
        flags=("-G", "--gpus-per-node"),
        help="Processes on this machine, started by torchrun unless a launcher did; unless given, 4 or as many as it has GPUs; on a CPU 1.",
    )
    num_nodes: int = opt(1, "Machines; more than 1 needs a launcher that starts every machine (launchers/slurm.sh).", flags=("-n",), ge=1)
    zero_stage: Literal[0, 1, 2, 3] | None = change(EngineOptions, "zero_stage", flags=("-S", "--deepspeed-stage"))
    deepspeed_offload: bool = opt(False, "Keep optimizer state (with ZeRO 3 weights, too) in host memory; ignored on a CPU.", flags=("-d",))
    precision: Literal["fp32", "bf16", "fp16"] = change(
        EngineOptions, "precision", flags=("--dtype",), help="Arithmetic; bf16 on a GPU unless given. Weights and states stay float32."
    )

    nonfinite: Literal["stop", "drop"] = change(EngineOptions, "nonfinite", default="drop")
    wkv: Literal["auto", "cuda", "cpu", "torch", "fla", ""] | None = opt(
        None, "Other words for --kernels: torch is reference; fla is auto with flash-linear-attention's recurrences (GPU).", flags=("-W",)
    )

    lr: float = change(OptimOptions, "lr", default=6e-4, flags=("--lr-init",))
    lr_final: float = opt(1e-5, "Learning rate at the end.", flags=("-f",), ge=0)
    warmup: Count = change(
        OptimOptions, "warmup", default=50, flags=("-w", "--warmup-steps"), help="Warm-up: updates, or below 1 a fraction of the run."
    )
    # core's inverse-sqrt has no final rate to end at
    schedule: Literal["exp", "cosine", "linear", "constant"] = opt(
        "exp", "Shape of the learning rate between --lr and --lr-final.", flags=("--lr-schedule",)
    )
    betas: tuple[float, float] = change(OptimOptions, "betas", default=(0.9, 0.95))
    eps: float = change(OptimOptions, "eps", flags=("--adam-eps",))

    budget: str = change(OutputOptions, "budget", default="", help="Replaces -t and -X: for example 300 steps, or 10M tokens, 2 hours.")
    max_trained_tokens: Count = opt(100_000_000, "Stop after so many tokens; padding does not count.", flags=("-t",), ge=1)
    max_epochs: int = opt(1, "Stop after so many passes over the data.", flags=("-X",), ge=1)
    stop_loss: float | None = change(OutputOptions, "stop_loss", default=0.01, flags=("-T", "--terminate-loss"))
    save_interval: Count | None = opt(None, "Micro-batches between checkpoints, in whole updates; other words for --save-every.", ge=1)
    wandb_project: str = change(OutputOptions, "wandb_project", default="rwkv_distill", flags=("-P",))
    wandb_mode: Literal["online", "offline", "disabled"] | None = opt(None, "Other words for --wandb: disabled is off.")
    run_name: str | None = change(OutputOptions, "run_name", flags=("-D",))
    seed: int = change(OutputOptions, "seed", default=42)

    @classmethod
    def from_file(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """A file by topic, or of the original code, in the words of the options."""
        return translate(content)

    def check(self) -> None:
        chosen = explicit(self)
        for name, instead in (("min_lr_ratio", "--lr-final"), ("cooldown", "--schedule linear")):
            if name in chosen:
                raise ConfigError(f"{name}: rwkv-distill has its own final rate and takes no --{name.replace('_', '-')}; use {instead}")
        if self.batching is not None and self.need_to_pad and self.batching != "concat":
            raise ConfigError(f"need_to_pad: -N 1 means --batching concat, not {self.batching}; drop one of them")
        if "packing" in chosen and self.packing != self.row_packing():
            raise ConfigError(f"batching: {self.batching or 'concat'} is not --packing {self.packing}; drop one of them")
        if self.gate_free and self.student.gate not in (None, "none"):
            raise ConfigError(f"gate_free: -e 1 means --gate none, not {self.student.gate}; drop one of them")
        if self.wkv is not None and "kernels" in chosen and self.kernels != KERNELS[self.wkv]:
            raise ConfigError(f"wkv: -W {self.wkv} means --kernels {KERNELS[self.wkv]}, not {self.kernels}; drop one of them")
        if self.preprocessed_data and self.data and self.data != paths(self.preprocessed_data):
            raise ConfigError("preprocessed_data: give -p or -r, not both; token ids and text are not mixed in one run")
        for name, other in (("save_interval", "save_every"), ("wandb_mode", "wandb")):
            if getattr(self, name) is not None and other in chosen:
                raise ConfigError(f"{name}: is another word for --{other.replace('_', '-')}; drop one of them")
        if self.num_nodes > 1 and "WORLD_SIZE" not in os.environ:
            raise ConfigError(f"num_nodes: {self.num_nodes} machines need a launcher; use launchers/slurm.sh, or torchrun on each of them")
        defaults = {leaf.path: leaf.default for leaf in leaves(type(self))}
        # the guide gives -F 0 in every stage, so a default is no choice
        for name, stages in STAGES.items():
            if self.stage not in stages and getattr(self, name) != defaults[name]:
                where = " and ".join(map(str, stages))
                raise ConfigError(f"{name}: belongs to stage {where}, not to --stage {self.stage}; drop it, or add --stage {stages[0]}")
        if self.stage == 2 and self.kl_weight == 0 == self.ce_weight:
            raise ConfigError("kl_weight: 0 beside a ce_weight of 0 leaves nothing to learn from; give one of them a weight")
        if self.teacher_cache is not None and self.temperature != 1:
            raise ConfigError(
                f"temperature: a cache holds probabilities at 1, not {self.temperature}; drop --temperature or --teacher-cache"
            )
        if self.teacher_cache is not None and self.teacher_model_id is not None:
            raise ConfigError("teacher_cache: it stands for the teacher that wrote it; drop --teacher-model-id or --teacher-cache")
        if self.mlp_lora_rank and (self.engine not in ("auto", "replicated") or self.zero_stage or self.deepspeed_offload):
            raise ConfigError("mlp_lora_rank: additions are summed up by one process; use --engine replicated, and no ZeRO")
        if self.mlp_lora_rank and self.freeze_mlp:
            raise ConfigError("mlp_lora_rank: -z 1 leaves the MLPs as they are; drop one of them")
        if self.deepspeed_offload and self.zero_stage == 0 and self.device != "cpu":
            raise ConfigError("deepspeed_offload: -d 1 needs ZeRO stage 1 to 3, not -S 0; drop -S, or use -S 2")

    def chose_init(self) -> bool:
        """Whether somebody asked for initial values of the mixers, so that weights may lack them."""
        return any(path.rpartition(".")[2] == "init" for path in explicit(self))

    def row_packing(self) -> str:
        """--packing, or what its other spellings say."""
        word = "concat" if self.need_to_pad else self.batching
        if word is None and self.preprocessed_data and "packing" not in explicit(self):
            word = "pad"
        return self.packing if word is None else BATCHING[word]

    def limits(self) -> Budget:
        """--budget, else -t and -X."""
        return Budget.parse(self.budget) if self.budget else Budget({"tokens": self.max_trained_tokens, "epochs": self.max_epochs})

    def learning_rate(self, progress: Progress, size: Size, epoch_samples: int) -> float:
        """Between `lr` and `lr_final` over the steps that are left: see `rate`."""
        fraction = self.limits().fraction(progress, None, epoch_samples) if progress.steps else 0.0
        return rate(progress.steps, fraction, self.lr, self.lr_final, self.warmup, self.schedule)


@config
class CacheConfig(TrainConfig):
    """What a teacher says about the data of a run, on disk; the options are those of the run."""

    stage: Literal[1, 2, 3] = change(TrainConfig, "stage", default=2)
    top_k: int = opt(64, "Tokens kept per position: the likeliest ones.", ge=1)


def paths(values: list[str]) -> list[str]:
    """Data arguments, those that list several in one string taken apart; what exists as a path is one.

    >>> paths(["builtin:python-docs a.txt", "b.txt"])
    ['builtin:python-docs', 'a.txt', 'b.txt']
    """
    return [part for value in values for part in ([value] if Path(value).expanduser().exists() else value.split())]


def rate(steps: int, fraction: float, first: float, final: float, warmup: float, shape: str) -> float:
    """The rate of the update behind `steps` updates, which took `fraction` of the budget.

    With w steps of warm-up and an estimated total of s / fraction, the shape is at q = (s - w) / (total - 1 - w), and warm-up
    multiplies by 0.01 + 0.99 s / w. The last update of a run of equal steps has exactly the final rate; a warm-up that is longer
    than the run ends with it.

    >>> [round(rate(s, s / 4, 1.0, 0.1, 1, "linear"), 3) for s in range(4)]
    [0.01, 1.0, 0.55, 0.1]
    """
    total = steps / fraction if fraction > 0 else float("inf")
    length = warmup if warmup >= 1 else warmup * total if total < float("inf") else float("inf") if warmup else 0.0
    length = min(length, max(total - 1, 0.0))
    if steps < length:
        return first * (WARMUP_FLOOR + (1 - WARMUP_FLOOR) * (steps / length if length < float("inf") else 0.0))
    span = total - 1 - length
    at = 0.0 if steps <= length or span == float("inf") else min(1.0, (steps - length) / span) if span > 0 else 1.0
    # an exponential never reaches 0
    name = "linear" if shape == "exp" and final == 0 else shape
    return first * SHAPES[name](at, final / first, 0.0)


def processes(config: TrainConfig, gpus: int) -> int:
    """Processes of this machine, which has so many GPUs to use (0: it computes on its CPU). Raises ConfigError where they do not fit.

    >>> [processes(TrainConfig(model="tiny"), gpus) for gpus in (0, 1, 8)]
    [1, 1, 4]
    """
    if "num_processes" not in explicit(config):
        return max(1, min(PROCESSES, gpus))
    if 0 < gpus < config.num_processes:
        raise ConfigError(f"num_processes: {config.num_processes} processes need as many GPUs, and {gpus} can be seen; use -G {gpus}")
    return config.num_processes


def require_fla(cuda: bool, precision: str) -> None:
    """Raise ConfigError where --wkv fla cannot work."""
    if find_spec("fla") is None:
        raise ConfigError("wkv: -W fla needs flash-linear-attention; pip install flash-linear-attention, or use -W auto")
    if not cuda:
        raise ConfigError("wkv: -W fla needs a GPU, since its kernels are Triton's; use -W auto")
    if precision == "fp32":
        raise ConfigError("wkv: -W fla computes in half precision, not --dtype fp32; use --dtype bf16, or -W auto")


def settle(config: C) -> C:
    """`config` with what depends on the machine and with spellings of the guide resolved."""
    import logging

    import torch

    log = logging.getLogger(__name__)
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    changes: dict[str, object] = {"packing": config.row_packing(), "data": paths(config.preprocessed_data or config.data)}
    changes["preprocessed_data"] = paths(config.preprocessed_data)
    changes["eval_data"] = paths(config.eval_data)
    if config.save_interval is not None:
        changes |= {"save_every": str(-(-int(config.save_interval) // config.accumulate)), "save_interval": None}
    if config.wandb_mode is not None:
        changes |= {"wandb": {"disabled": "off"}.get(config.wandb_mode, config.wandb_mode), "wandb_mode": None}
    if cuda and "precision" not in explicit(config):
        changes["precision"] = "bf16"
    changes["num_processes"] = processes(config, torch.cuda.device_count() if cuda else 0)
    if config.wkv is not None:
        changes["kernels"] = KERNELS[config.wkv]
    if config.wkv == "fla":
        require_fla(cuda, str(changes.get("precision", config.precision)))
    if config.gate_free:
        changes["student"] = replace(config.student, gate="none")
    if config.deepspeed_offload and not cuda:
        log.warning("deepspeed_offload: there is no GPU to offload from; ignored")
    elif config.deepspeed_offload:
        # layer by layer while gradients are whole
        stage = config.zero_stage or (1 if config.stage == 1 else 3)
        changes |= {"zero_stage": stage, "offload": "all" if stage == 3 else "optimizer"}
    if config.lr_final > config.lr:
        log.warning("lr_final: %g is above --lr %g; the rate rises", config.lr_final, config.lr)
    if config.schedule == "exp" and config.lr_final == 0:
        log.warning("schedule: an exponential never reaches --lr-final 0; linear is used")
    return replace(config, **changes)  # type: ignore[arg-type]

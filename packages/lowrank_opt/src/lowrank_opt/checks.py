"""What cannot work together, and options that nobody would read: refused by name before anything is built. Imports no torch."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from lm_core.config import explicit
from lm_core.deepspeed_settings import engine_kind, split
from lm_core.errors import ConfigError
from lowrank_opt.models import HUB_MODELS, PRESETS
from lowrank_opt.optimizer_options import BY_ROWS, EIGHT_BIT, LOW_RANK, OF_LDADAM, PROJECTED, REDUCED, moment_bits

if TYPE_CHECKING:
    from lowrank_opt.config import TrainConfig

# other words for engines
DIST = {"none": "replicated", "ddp": "replicated", "fsdp": "sharded"}
# options that only some modes and optimizers use: an explicit one elsewhere is refused, never ignored
ONLY_FOR_MODE = {"num_training_tokens": "pretraining", "task": "finetuning", "num_labels": "finetuning"}
ONLY_FOR_SCHEDULE = {
    "cooldown": ("cosine", "linear", "constant", "exp", "inverse-sqrt"),
    "tmax": ("cosine_tmax",),
    "tmax_unit": ("cosine_tmax",),
    "restart_every": ("cosine_restarts",),
}


def check(config: TrainConfig) -> None:
    """Raise ConfigError for options that cannot work together."""
    if config.model in PRESETS and not config.random_init() and config.model_path is None:
        raise ConfigError(f"model: {config.model} has no trained weights; add --init random, --model-path FOLDER, or name a hub id")
    if config.model_path is not None and config.model not in {**PRESETS, **HUB_MODELS}:
        raise ConfigError(f"model_path: {config.model} is no named size; write --model {config.model_path} instead")
    if config.model_path is not None and config.init == "random":
        raise ConfigError(f"model_path: the weights in {config.model_path} would be ignored under --init random; drop one of them")
    if config.param_dtype == "bf16" and config.precision != "bf16":
        raise ConfigError(f"param_dtype: bf16 weights need bf16 arithmetic, not {config.precision}; add --precision bf16")
    if config.model.startswith("roberta") and not config.classifies():
        raise ConfigError(f"model: {config.model} predicts no next token; use --mode finetuning with a --task such as sst2")
    if config.num_labels is not None and not config.classifies():
        raise ConfigError(f"num_labels: {config.num_labels} labels belong to a --task such as sst2, not to next tokens; drop it")
    if config.galore.rank >= 1 and not config.galore.rank.is_integer():
        raise ConfigError(f"galore.rank: {config.galore.rank:g} is neither a whole number nor a fraction below 1; use one of them")
    if not re.fullmatch(r"true|false|gaussian|pissa|pissa_niter_\d+|olora|orthogonal|lora_ga", config.lora.init_lora_weights):
        raise ConfigError(
            f"lora.init_lora_weights: {config.lora.init_lora_weights!r} is unknown; use true, gaussian, pissa, pissa_niter_N, olora, "
            "orthogonal or lora_ga"
        )
    if "lora.lora_ga_batches" in explicit(config) and config.lora.init_lora_weights != "lora_ga":
        raise ConfigError(f"lora.lora_ga_batches: {config.lora.init_lora_weights} takes no gradient; drop it, or use lora_ga")
    check_relora(config)
    if config.dist is not None and config.engine not in ("auto", DIST[config.dist]):
        raise ConfigError(f"dist: {config.dist} means --engine {DIST[config.dist]}, not {config.engine}; drop one of them")
    check_streaming(config)
    check_length(config)
    check_batch(config)
    check_engine(config)
    check_clipping(config)
    if config.budget and config.max_steps is not None:
        raise ConfigError(f"max_steps: {config.max_steps} and --budget {config.budget!r} both set the length; drop one of them")


def check_relora(config: TrainConfig) -> None:
    """Refuse what cannot merge adapters on the way."""
    lora = config.lora
    if not lora.relora_every:
        if "lora.relora_warmup" in explicit(config):
            raise ConfigError(f"lora.relora_warmup: {lora.relora_warmup} updates follow no restart; add for example --relora-every 1000")
        return
    if config.optimizer != "lora" or moment_bits(config) == 8:
        raise ConfigError("lora.relora_every: restarts prune moments in 32 bits of the adapters themselves; use --optimizer lora")
    if lora.use_dora:
        raise ConfigError("lora.relora_every: DoRA's magnitudes are no part of what is merged; drop --use-dora")
    if split(config)[0]:
        raise ConfigError(
            f"lora.relora_every: weights are whole where adapters are merged, not under {split(config)[1]}; use --engine replicated"
        )


def check_streaming(config: TrainConfig) -> None:
    """Refuse what cannot be made of documents that come one by one."""
    if "shuffle_buffer" in explicit(config) and not (config.streaming and config.shuffle):
        raise ConfigError(f"shuffle_buffer: {config.shuffle_buffer} documents are shuffled under --streaming true --shuffle true; drop it")
    if not config.streaming:
        return
    if config.classifies():
        raise ConfigError(f"streaming: --task {config.task} reads all its texts first; drop --streaming")
    if config.packing not in ("document", "false"):
        raise ConfigError(f"packing: {config.packing} joins documents, and --streaming reads one per sample; use document")
    if config.mode == "finetuning" and any("[" not in source for source in config.data):
        raise ConfigError(f"streaming: {config.data[0]} has no known length, which epochs need; write {config.data[0]}[100k]")


def check_length(config: TrainConfig) -> None:
    """Refuse a budget of tokens that is less than one update."""
    tokens = config.limits().limits.get("tokens")
    one = config.max_length * max(config.micro_batch_size * processes(config) * config.accumulate, config.total_batch_size or 0)
    if tokens is not None and tokens < one and not config.test:
        option = "budget" if config.budget else "num_training_tokens"
        raise ConfigError(
            f"{option}: {tokens:,.0f} tokens are less than one update of {one:,} ({one // config.max_length} samples of "
            f"--max-length {config.max_length}); train longer, or lower --batch-size"
        )


def check_batch(config: TrainConfig) -> None:
    """Refuse a total batch that whole micro-batches cannot make up, and one that --accumulate contradicts."""
    if config.total_batch_size is None:
        return
    samples = config.micro_batch_size * processes(config)
    if config.total_batch_size % samples:
        raise ConfigError(
            f"total_batch_size: {config.total_batch_size} is no multiple of {samples} (--batch-size {config.micro_batch_size} on "
            f"{processes(config)} processes); use {samples * max(1, round(config.total_batch_size / samples))}"
        )
    if config.accumulate not in (1, config.total_batch_size // samples):
        raise ConfigError(
            f"total_batch_size: {config.total_batch_size} means --accumulate {config.total_batch_size // samples}, "
            f"not {config.accumulate}; drop one of them"
        )


def check_engine(config: TrainConfig) -> None:
    """Refuse engines that keep no whole gradient where the update needs one."""
    stage, said = split(config)
    if stage and config.per_layer:
        raise ConfigError(f"per_layer: {said} keeps no whole gradient; use --engine replicated")
    if engine_kind(config) == "sharded":
        check_rows(config, said)
    elif stage and config.optimizer in LOW_RANK:
        rows = "--engine sharded, or " if config.optimizer in BY_ROWS else ""
        whole = "--engine lowrank" if config.optimizer in REDUCED else "--engine replicated"
        raise ConfigError(
            f"optimizer: {said} flattens matrices, which {config.optimizer} needs as they are; use {rows}{whole} with --shard-optimizer true"
        )
    elif stage and moment_bits(config) == 8:
        raise ConfigError(f"optimizer: {said} would cut through the blocks of moments in 8 bits; use --engine sharded or replicated")
    if stage and config.verify_replicas_every:
        raise ConfigError(f"verify_replicas_every: {said} keeps no replicas to compare; drop it, or use --engine replicated")
    if config.shard_optimizer and stage:
        raise ConfigError(f"shard_optimizer: {said} splits it already; drop it, or use --engine replicated")
    if config.engine == "lowrank":
        check_reduction(config)
    if config.galore.weight_dtype == "int8" and (stage or processes(config) > 1):
        raise ConfigError(
            f"galore.weight_dtype: int8 weights are updated in one process, not {said if stage else processes(config)}; "
            "use --num-processes 1 and --engine replicated, or --weight-dtype param"
        )
    if config.resume_reset_optimizer and config.resume == "none":
        raise ConfigError("resume_reset_optimizer: nothing is resumed; add --resume auto, or a checkpoint folder")
    if config.resume_reset_optimizer and engine_kind(config) == "deepspeed":
        raise ConfigError("resume_reset_optimizer: DeepSpeed's checkpoints hold weights and state together; start a new run")


def check_rows(config: TrainConfig, said: str) -> None:
    """Refuse what needs more than some rows of a matrix."""
    if config.optimizer in LOW_RANK and config.optimizer not in BY_ROWS:
        raise ConfigError(
            f"optimizer: {said} leaves every process some rows of a matrix, which {config.optimizer} needs whole; use --engine replicated"
        )
    if config.optimizer in PROJECTED and config.galore.proj_type in ("left", "full"):
        raise ConfigError(
            f"galore.proj_type: {said} leaves every process some rows of a matrix, and {config.galore.proj_type} needs whole ones; "
            "use right, or --engine replicated"
        )
    if config.optimizer in PROJECTED and config.galore.compat != "none":
        raise ConfigError(f"galore.compat: {config.galore.compat} needs whole matrices, not {said}; drop it, or use --engine replicated")


def check_reduction(config: TrainConfig) -> None:
    """Refuse what cannot do with the sum of projected gradients."""
    if config.optimizer in LOW_RANK and config.optimizer not in REDUCED:
        raise ConfigError(
            f"engine: lowrank sums projected gradients, and {config.optimizer} needs whole ones; "
            f"use --engine replicated, or one of {', '.join(REDUCED)}"
        )
    if config.precision == "fp16":
        raise ConfigError("precision: fp16 learns of an overflow after gradients were projected; use bf16 or fp32 with --engine lowrank")
    if config.nonfinite != "stop":
        raise ConfigError(f"nonfinite: {config.nonfinite} cannot take back a basis that --engine lowrank has refreshed; use stop")


def check_clipping(config: TrainConfig) -> None:
    """Refuse what the place of the update does not allow."""
    if config.clip_mode != "auto" and config.grad_clip == 0:
        raise ConfigError(f"clip_mode: {config.clip_mode} clips nothing while --grad-clip is 0; add for example --grad-clip 1")
    if config.clip_mode == "global" and config.per_layer:
        raise ConfigError("clip_mode: per-layer updates are made before the global norm is known; use delayed or per_param")
    if config.clip_mode in ("delayed", "per_param") and not config.per_layer:
        raise ConfigError(f"clip_mode: {config.clip_mode} belongs to per-layer updates; add --per-layer true, or use global")
    if config.per_layer and config.precision == "fp16":
        raise ConfigError("per_layer: fp16 learns of an overflow after the updates were made; use --dtype bf16 or fp32")
    if config.per_layer and processes(config) > 1 and config.engine != "lowrank":
        instead = "--engine lowrank" if config.optimizer in REDUCED or config.optimizer not in LOW_RANK else "--num-processes 1"
        raise ConfigError(f"per_layer: updates inside backward run in one process, not {processes(config)}; use {instead} instead")
    if config.per_layer and config.nonfinite != "stop":
        raise ConfigError("per_layer: updates inside backward cannot be dropped; use --nonfinite stop")


def used_by(config: TrainConfig, path: str) -> tuple[str, ...] | None:
    """The optimizers that use the option at `path` of a section; None where the present one does for certain."""
    head, _, name = path.rpartition(".")
    if name == "state_bits":
        return None
    if name == "weight_dtype":
        return ("qgalore",)
    if name in ("target_modules", "exclude_modules"):
        return LOW_RANK
    if name in ("block_size", "min_8bit_size", "embedding_state_bits"):
        return None if moment_bits(config) == 8 else tuple(one for one in EIGHT_BIT if one != config.optimizer)
    if name == "apollo_norm_growth":
        return "apollo", "apollo-mini", "fira"
    lora = ("lora", "lora+galore", "lora+galore8bit")
    projected = (*PROJECTED, "ldadam") if name in OF_LDADAM else PROJECTED
    return {"galore": projected, "lora": lora, "apollo": ("apollo", "apollo-mini"), "ldadam": ("ldadam",)}.get(head)


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


def processes(config: TrainConfig) -> int:
    """How many processes the run has, or will have once it has started them."""
    return int(os.environ.get("WORLD_SIZE", config.num_processes))

"""What DeepSpeed is told: our options, and below them the file of `--deepspeed-config`. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lm_core.errors import ConfigError

if TYPE_CHECKING:
    from lm_core.options import RunConfig

_PLACES = ("offload_optimizer", "offload_param")
# sections of a DeepSpeed file that options of ours say already
_OURS = {
    "optimizer": "use the options of the optimizer (--lr, --betas, ...)",
    "scheduler": "use --schedule and --warmup",
    "fp16": "fp16 runs in the replicated and sharded engines only",
    "amp": "use --precision",
    "tensorboard": "use --tensorboard",
    "wandb": "use --wandb",
}


def settings(config: RunConfig, world: int) -> dict[str, Any]:
    """The configuration of the engine, on `world` processes.

    Values "auto" in the file are filled in. Raises ConfigError when the file cannot be read, holds a section that options of ours
    stand for, or contradicts an option; both values are named.
    """
    theirs = _read(config.deepspeed_config)
    zero = theirs.get("zero_optimization", {})
    zero = {key: value for key, value in zero.items() if key not in _PLACES or (value or {}).get("device", "none") != "none"}
    stage = _stage(config, zero)
    offload = [name for name in _PLACES if name in zero]
    if config.offload != "none":
        offload += _PLACES if config.offload == "all" else _PLACES[:1]
    if config.precision == "fp16":
        raise ConfigError("precision: fp16 runs in the replicated and sharded engines only; use bf16 with deepspeed")
    if "offload_param" in offload and stage != 3:
        raise ConfigError(f"offload: all needs ZeRO stage 3, not {stage}; use --offload optimizer, or --zero-stage 3")
    if stage == 1 and offload and config.precision == "bf16":
        # this combination keeps gradients of a dropped step on the host (deepspeed 0.19.8)
        stage = zero["stage"] = 2
    theirs = {**theirs, "zero_optimization": zero}
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {"stage": stage, **{name: {"device": "cpu"} for name in offload if name not in zero}},
    }
    # counted by the loop: DeepSpeed is told micro-batches only, but the file must agree
    counted = {"gradient_accumulation_steps": config.accumulate, "train_batch_size": config.micro_batch_size * config.accumulate * world}
    _agree(decided | counted, theirs, config.deepspeed_config)
    defaults: dict[str, Any] = {
        "zero_optimization": {"overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        defaults |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    theirs = {key: value for key, value in theirs.items() if key not in counted}
    return _over(_over(_over(defaults, theirs), decided), {"managed_gradient_accumulation": False})


def engine_kind(config: RunConfig) -> Literal["replicated", "sharded", "deepspeed"]:
    """The engine that runs. `auto` is replicated, unless a ZeRO stage, an offload or a DeepSpeed file asks for deepspeed; stage 0 splits nothing."""
    if config.engine in ("replicated", "sharded"):
        return config.engine
    asked = config.engine == "deepspeed" or config.zero_stage or config.offload != "none" or config.deepspeed_config is not None
    if not asked or (config.zero_stage == 0 and config.offload == "none"):
        return "replicated"
    if config.zero_stage == 0:
        raise ConfigError(f"offload: {config.offload} needs ZeRO stage 1 to 3, not 0; use --zero-stage 2")
    return "deepspeed"


def split(config: RunConfig) -> tuple[int, str]:
    """What the engine of `config` splits over processes, and how to name that in an error.

    0 is nothing, 1 optimizer state, 2 gradients too, 3 weights too, as in ZeRO. A method that needs a whole one refuses more in its
    options' `check`, so that nothing is loaded before.
    """
    kind = engine_kind(config)
    if kind == "deepspeed":
        stage = _stage(config, _read(config.deepspeed_config).get("zero_optimization", {}))
        return stage, f"zero_stage: {stage}"
    return (3, "engine: sharded") if kind == "sharded" else (0, "engine: replicated")


def _stage(config: RunConfig, zero: Mapping[str, Any]) -> int:
    return int(zero.get("stage", 2) if config.zero_stage is None else config.zero_stage)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"deepspeed_config: {path} cannot be read ({error.strerror}); give a JSON file of DeepSpeed") from error
    except ValueError as error:
        raise ConfigError(f"deepspeed_config: {path} is not JSON ({error}); give a JSON file of DeepSpeed") from error
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization", {}), dict):
        raise ConfigError(f"deepspeed_config: {path} holds no settings of DeepSpeed; give a JSON object whose zero_optimization is one too")
    for section, instead in _OURS.items():
        value = found.get(section)
        if isinstance(value, dict) and value.get("enabled", True) is not False:
            raise ConfigError(f"deepspeed_config: the section {section} of {path} would not be used; remove it, {instead}")
    return {key: value for key, value in _filled(found).items() if key not in _OURS}


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are left to us."""
    kept = {key: _filled(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value != "auto"}


def _agree(decided: Mapping[str, Any], theirs: Mapping[str, Any], path: Path | None, prefix: str = "") -> None:
    for key, value in decided.items():
        found = theirs.get(key, value)
        if isinstance(value, dict) and isinstance(found, dict):
            _agree(value, found, path, f"{prefix}{key}.")
        elif found != value:
            raise ConfigError(f"deepspeed_config: {path} says {prefix}{key} = {found}, the options {value}; change one of them")


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`lower` with `upper` on top, section by section."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged

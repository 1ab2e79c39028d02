"""The frozen backbone in fewer bytes: bfloat16, or four bits a weight; what is trained stays float32."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from beacon.modeling.weights import is_beacon
from beacon.sizes import PRESETS
from lm_core import dist
from lm_core.deepspeed_settings import engine_kind
from lm_core.errors import ConfigError
from lm_core.models import load_model

if TYPE_CHECKING:
    from beacon.options import TrainConfig


def load(config: TrainConfig, folder: str) -> Any:
    """The model to train beacons on, its frozen weights as `--dtype` and `--load-in-4-bit` say."""
    dtype = kind(config)
    # beacons that were trained before are float32 in their folder and stay so
    first = torch.float32 if stored(folder) is not None else dtype
    model = load_model(folder, presets=PRESETS, seed=config.seed, dtype=first, loading=_in_4_bit(config, folder, dtype))
    for name, parameter in model.named_parameters():
        if not is_beacon(name) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def stored(folder: str) -> dict[str, Any] | None:
    """The settings under the key `beacon` of a folder's config.json."""
    path = Path(folder) / "config.json"
    found: dict[str, Any] | None = json.loads(path.read_text()).get("beacon") if path.is_file() else None
    return found


def kind(config: TrainConfig) -> torch.dtype:
    """The type of frozen weights: of `auto`, bfloat16 where a GPU holds them beside float32 masters."""
    frozen = config.only_train_beacon and (config.enable_beacon or config.lora_tune)
    replicated = engine_kind(config) == "replicated"
    if config.dtype == "auto":
        return torch.bfloat16 if _gpu(config) and frozen and replicated else torch.float32
    if config.dtype == "bf16" and not frozen:
        raise ConfigError("dtype: bf16 is for frozen weights, and this run trains them all; use fp32, and --precision bf16")
    if config.dtype == "bf16" and not replicated:
        raise ConfigError(
            f"dtype: bf16 weights beside float32 masters need the replicated engine, not {engine_kind(config)}; use fp32, and --precision bf16"
        )
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def _gpu(config: TrainConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()


def _in_4_bit(config: TrainConfig, folder: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for transformers; none without `--load-in-4-bit`, and none on the meta device, which has no bits."""
    if not config.load_in_4_bit or torch.get_default_device().type == "meta":
        return {}
    if engine_kind(config) != "replicated" or dist.world() > 1:
        raise ConfigError(f"load_in_4_bit: one process holds the weights, not {dist.world()} of the {engine_kind(config)} engine; use 1")
    if folder in PRESETS:
        raise ConfigError(f"load_in_4_bit: the preset {folder} has random weights in no file; name a folder or a hub id")
    if any(find_spec(name) is None for name in ("bitsandbytes", "accelerate")):
        raise ConfigError("load_in_4_bit: bitsandbytes is not installed; run: pip install 'bitsandbytes>=0.48' accelerate")
    import logging

    from transformers import BitsAndBytesConfig

    # it complains that a library is absent from which it would take CPU kernels
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    own = [f"beacon_{name}_proj" for name in ("q", "k", "v", "o", "up", "down")]
    settings: Any = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head", *own]
    )
    return {"quantization_config": settings, "device_map": {"": "cuda" if _gpu(config) else "cpu"}}

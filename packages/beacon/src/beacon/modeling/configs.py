"""Configs of beacon models: those of the base, and the settings under the key `beacon`."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config


@strict
class BeaconLlamaConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    model_type = "beacon_llama"
    beacon: dict[str, Any] | None = None


@strict
class BeaconMistralConfig(MistralConfig):  # type: ignore[no-untyped-call]
    model_type = "beacon_mistral"
    beacon: dict[str, Any] | None = None


@strict
class BeaconPhi3Config(Phi3Config):  # type: ignore[no-untyped-call]
    model_type = "beacon_phi3"
    beacon: dict[str, Any] | None = None


@strict
class BeaconQwen2Config(Qwen2Config):  # type: ignore[no-untyped-call]
    model_type = "beacon_qwen2"
    beacon: dict[str, Any] | None = None


@strict
class BeaconQwen3Config(Qwen3Config):  # type: ignore[no-untyped-call]
    model_type = "beacon_qwen3"
    beacon: dict[str, Any] | None = None


CONFIGS: dict[str, Any] = {
    "llama": BeaconLlamaConfig, "mistral": BeaconMistralConfig, "phi3": BeaconPhi3Config, "qwen2": BeaconQwen2Config, "qwen3": BeaconQwen3Config,
}  # fmt: skip

"""Configs of beacon models: those of the base, and the settings under the key `beacon`."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class BeaconLlamaConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    model_type = "beacon_llama"
    beacon: dict[str, Any] | None = None


CONFIGS: dict[str, Any] = {"llama": BeaconLlamaConfig}

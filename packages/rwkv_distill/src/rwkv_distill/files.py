"""Configuration files in other words than the options: by topic, and as the original code writes them. Free of torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lm_core.errors import ConfigError

log = logging.getLogger(__name__)

# section -> its key -> the option
TOPICS: dict[str, dict[str, str]] = {
    "teacher": {"model_id": "model"},
    "loss": {"kl_weight": "kl_weight", "ce_weight": "ce_weight", "temperature": "temperature", "kl_direction": "kl_direction", "align": "align_loss"},
    "data": {"raw": "data", "preprocessed": "preprocessed_data", "text_field": "text_column", "batching": "batching", "kl_on": "kl_on"},
    "Llama": {"model_id": "model"},
    "RWKV": {"layers": "layers", "grad_cp": "gradient_checkpointing"},
}  # fmt: skip
# what the original code could do otherwise, and this package decides by itself
IGNORED = ("model_file", "is_llama_ffn", "is_rwkv_att_only", "init_with_llama", "is_all_labels_kl", "teach_mode")
_NOT_HERE = {"revision": None, "trust_remote_code": False}


def translate(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with every key an option. Raises ConfigError where one is given twice, or has no place.

    >>> translate({"Llama": {"model_id": "tiny"}, "enable_AKL": True, "data": {"raw": ["a", "b"], "weights": [0.3, 0.7]}})
    {'model': 'tiny', 'kl_direction': 'adaptive', 'data': ['a@0.3', 'b@0.7']}
    """
    found: dict[str, Any] = {}

    def put(name: str, value: Any, origin: str) -> None:
        if name in found:
            raise ConfigError(f"{origin}: {name} is given twice in this file; keep one")
        found[name] = value

    for key, value in content.items():
        if key in IGNORED:
            log.warning("%s: ignored; this package has no such choice", key)
        elif key == "enable_AKL":
            if value:
                put("kl_direction", "adaptive", key)
        elif key == "is_sft":
            if value:
                put("stage", 3, key)
        elif key == "train" and isinstance(value, Mapping | None):
            for name, inner in (value or {}).items():
                put(str(name), inner, f"train.{name}")
        elif key == "student" and isinstance(value, Mapping) and "calibrate" in value:
            put("calibrate", value["calibrate"], "student.calibrate")
            put("student", {name: inner for name, inner in value.items() if name != "calibrate"}, "student")
        elif key in TOPICS and isinstance(value, Mapping):
            _topic(key, value, put)
        else:
            put(key, value, str(key))
    return found


def _topic(topic: str, values: Mapping[str, Any], put: Callable[[str, Any, str], None]) -> None:
    for key, value in values.items():
        origin = f"{topic}.{key}"
        if topic == "teacher" and key in _NOT_HERE:
            if value != _NOT_HERE[key]:
                raise ConfigError(f"{origin}: {value} is not supported; download that teacher and name its folder")
        elif (topic in ("Llama", "RWKV") and key not in TOPICS[topic]) or key in IGNORED:
            log.warning("%s: ignored; this package has no such choice", origin)
        elif topic == "data" and key == "weights":
            continue
        elif key not in TOPICS[topic]:
            raise ConfigError(f"{origin}: is not an option; known: {', '.join(TOPICS[topic])}")
        elif value is not None:
            put(TOPICS[topic][key], _weighted(value, values.get("weights")) if origin == "data.raw" else value, origin)


def _weighted(sources: list[str], weights: list[float] | None) -> list[str]:
    if not weights:
        return sources
    if len(weights) != len(sources):
        raise ConfigError(f"data.weights: {len(weights)} weights for {len(sources)} sources of data.raw; give one each")
    return [f"{source}@{weight}" for source, weight in zip(sources, weights)]

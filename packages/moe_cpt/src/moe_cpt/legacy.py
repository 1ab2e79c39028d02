"""Checkpoints of the original LLaMA-MoE code, which keeps every expert in tensors of its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lm_core.errors import ConfigError, InputError
from moe_cpt.convert import copy_tokenizer
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.targets import require_free
from moe_cpt.tensors import ModelTensors, ModelWriter, read_config

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.)calculator\.experts\.weight_(gate|up|down)\.(\d+)")
_GATE = {
    "gate.gate_network.0.weight": "router.fc1.weight",
    "gate.gate_network.2.weight": "router.fc2.weight",
    "gate.gate_network.weight": "router.proj.weight",
    "gate.weight_noise.weight": "router.noise.weight",
}
# the original code keeps its learned factors elsewhere
_DROPPED = ("add_weight_norm",)


def import_legacy(source: Path, target: Path, *, overwrite: bool = False) -> LlamaMoEConfig:
    """Write the checkpoint in `source` in this package's layout; its config. Every tensor finds its place, or it is refused by name."""
    require_free("save_path", target, overwrite)
    config = legacy_config(read_config(source))
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        writer = ModelWriter(partial)
        for name, tensor in renamed(ModelTensors(source), config):
            writer.add(name, tensor)
        writer.close()
        config.save_pretrained(partial)
        copy_tokenizer(source, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def legacy_config(stored: Mapping[str, Any]) -> LlamaMoEConfig:
    """The config with this package's fields. Raises ConfigError for what it has not."""
    if stored.get("add_weight_norm"):
        raise ConfigError("model: add_weight_norm True of the checkpoint is not supported; only False is")
    kept = {
        name: value
        for name, value in stored.items()
        if name not in (*_DROPPED, "model_type", "architectures", "auto_map", "transformers_version")
    }
    equal = stored["intermediate_size"] // stored["num_experts"]
    if {size for layer in stored.get("size_experts") or [] for size in layer} <= {equal}:
        kept.pop("size_experts", None)
    try:
        return LlamaMoEConfig(**kept, architectures=["LlamaMoEForCausalLM"])
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def renamed(source: ModelTensors, config: LlamaMoEConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in this package's layout."""
    waiting: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name in source:
        if match := _EXPERT.fullmatch(name):
            prefix, projection, expert = match[1], match[2], int(match[3])
            parts = waiting.setdefault(prefix, {})
            parts[projection, expert] = source[name]
            if len(parts) == 3 * config.num_experts:
                yield from stacked(prefix, waiting.pop(prefix), config)
        elif ".mlp." in name:
            prefix, _, inner = name.partition(".mlp.")
            if inner not in _GATE:
                raise InputError(f"model: tensor {name} is not known; was the checkpoint written by another program?")
            yield f"{prefix}.mlp.{_GATE[inner]}", source[name]
        elif not name.endswith("rotary_emb.inv_freq"):
            yield name, source[name]
    if waiting:
        prefix, parts = next(iter(waiting.items()))
        raise InputError(f"model: {prefix}* has {len(parts)} of {3 * config.num_experts} expert tensors; the checkpoint is incomplete")


def stacked(prefix: str, parts: Mapping[tuple[str, int], Tensor], config: LlamaMoEConfig) -> Iterator[tuple[str, Tensor]]:
    """The experts of one layer, with zero neurons up to the stored size."""
    stored = config.stored_size
    gate_up = parts["gate", 0].new_zeros(config.num_experts, 2 * stored, config.hidden_size)
    wide = gate_up.new_zeros(config.num_experts, config.hidden_size, stored)
    for expert in range(config.num_experts):
        gate, up, down = (parts[name, expert] for name in ("gate", "up", "down"))
        gate_up[expert, : len(gate)], gate_up[expert, stored : stored + len(up)] = gate, up
        wide[expert, :, : len(gate)] = down
    yield prefix + "experts.gate_up_proj", gate_up
    yield prefix + "experts.down_proj", wide

"""A dense checkpoint and a split to a mixture of experts, tensor by tensor."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lm_core import counter
from lm_core.errors import ConfigError
from lm_core.lazy import callable_as_its_function
from lm_core.models import load_model
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.router_init import RouterOf, centroid, ridge, trained
from moe_cpt.split import FILE, Split
from moe_cpt.targets import require_free
from moe_cpt.tensors import FFN, ModelTensors, ModelWriter, read_config, require_swiglu
from moe_cpt.train_gate import read_gate

logger = logging.getLogger(__name__)

GateInit = Literal["normal", "zeros", "centroid", "ridge", "trained"]
_FFN_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*")


def convert(
    model_path: Path,
    split: Split,
    save_path: Path,
    *,
    num_selects: int = 4,
    score_scale_factor: float | list[float] | None = None,
    gate_network: Literal["mlp", "linear"] = "mlp",
    gate_init: GateInit = "normal",
    use_softmax: bool = True,
    multiply_gate_scores: bool = True,
    add_noise: bool = True,
    gate_type: str = "TopKBalancedNoisyGate",
    calculator_type: str = "UniversalCalculator",
    add_weight_norm: bool = False,
    moe_layers: str | list[int] | dict[str, int] = "all",
    dtype: torch.dtype | None = None,
    calibration: Sequence[Tensor] = (),
    trained_gate: Path | None = None,
    seed: int = 1227,
    overwrite: bool = False,
) -> LlamaMoEConfig:
    """Write the mixture of the dense model in `model_path` into `save_path`; its config.

    Tensors outside the converted feed-forward layers are copied bit for bit and keep their type, unless there is a `dtype`. At most one output file and two layers
    are in memory. `score_scale_factor` defaults to N / K; `calibration` are rows of token ids for a ridge router, which loads the
    dense model; `trained_gate` is a file of `moe-cpt train-gate`. An interrupted conversion leaves nothing under `save_path`.
    """
    source = ModelTensors(model_path)
    dense = read_config(model_path)
    require_swiglu(dense, str(model_path))
    split.require_model(source, dense, "the split")
    if gate_init == "ridge" and not calibration:
        raise ConfigError("calibration_data: a ridge router is fitted to text; give for example --calibration-data builtin:python-docs")
    if (gate_init == "trained") != (trained_gate is not None):
        raise ConfigError(f"select_file_path: {trained_gate} does not go with --gate_init {gate_init}; trained needs one")
    if gate_init == "zeros" and not add_noise and num_selects < split.num_experts:
        raise ConfigError("gate_init: zeros without noise sends every token to the same experts; use normal, or all experts")
    if gate_init == "zeros" and num_selects < split.num_experts:
        logger.warning("gate_init: zeros sends every token to the same experts until it is trained with noise, in evaluations, too")
    config = moe_config(
        dense,
        num_experts=split.num_experts,
        num_selects=num_selects,
        num_shared_experts=split.num_shared_experts,
        size_experts=uneven_sizes(split),
        score_scale_factor=score_scale_factor,
        gate_network=gate_network,
        gate_use_softmax=use_softmax,
        multiply_gate_scores=multiply_gate_scores,
        gate_add_noise=add_noise,
        gate_type=gate_type,
        calculator_type=calculator_type,
        add_weight_norm=add_weight_norm,
        moe_layers=moe_layers,
    )
    require_free("save_path", save_path, overwrite)
    partial = save_path.with_name(save_path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = ModelWriter(partial)
    if gate_init == "centroid":
        router = centroid(config, source, split)
    elif gate_init == "ridge":
        router = ridge(config, load_model(str(model_path)).train(False), split, calibration)
    elif trained_gate is not None:
        router = trained(config, read_gate(trained_gate, split, gate_network))
    else:
        router = initial_router(config, "zeros" if gate_init == "zeros" else "normal", seed)
    for name, tensor in converted(source, split, config, router):
        writer.add(name, tensor if dtype is None else tensor.to(dtype))
    writer.close()
    config.dtype = dtype or config.dtype
    config.save_pretrained(partial)
    split.save(partial / FILE)
    copy_tokenizer(model_path, partial)
    shutil.rmtree(save_path, ignore_errors=True)
    partial.rename(save_path)
    return config


def uneven_sizes(split: Split) -> list[list[int]] | None:
    """The sizes of all experts, unless each has an equal part of the neurons."""
    sizes, parts = split.sizes(), split.num_experts + split.num_shared_experts
    equal = split.intermediate_size % parts == 0 and {size for layer in sizes for size in layer} == {split.intermediate_size // parts}
    return None if equal else sizes


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, and how to generate."""
    for pattern in (*_TOKENIZER_FILES, "generation_config.json"):
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)


def moe_config(dense: Mapping[str, Any], *, score_scale_factor: float | list[float] | None = None, **changes: Any) -> LlamaMoEConfig:
    """The dense config with the fields of a mixture. Raises ConfigError for those that do not fit."""
    kept = {name: value for name, value in dense.items() if name not in ("model_type", "architectures", "transformers_version")}
    scale = changes["num_experts"] / changes["num_selects"] if score_scale_factor is None else score_scale_factor
    try:
        return LlamaMoEConfig(**kept, **changes, score_scale_factor=scale, architectures=["LlamaMoEForCausalLM"])
    except ValueError as error:
        raise ConfigError(str(error)) from None


def converted(source: ModelTensors, split: Split, config: LlamaMoEConfig, router: RouterOf) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the mixture, in the order in which the dense ones are stored."""
    waiting: dict[int, dict[str, Tensor]] = {}
    for name in source:
        match = _FFN_NAME.fullmatch(name)
        if match is None or int(match[1]) not in config.converted:
            yield name, source[name]
            continue
        layer = int(match[1])
        parts = waiting.setdefault(layer, {})
        parts[match[2]] = source[name]
        if len(parts) == len(FFN):
            prefix, dtype = f"model.layers.{layer}.mlp.", parts["gate_proj"].dtype
            for inner, tensor in expert_tensors(**waiting.pop(layer), split=split.layer(layer), stored=config.stored_size).items():
                yield prefix + inner, tensor
            if config.has_router:
                for inner, tensor in router(layer).items():
                    yield f"{prefix}router.{inner}", tensor.to(dtype)
            if config.add_weight_norm:
                yield prefix + "score_scale", torch.tensor([config.scale_of(layer)], dtype=dtype)


def expert_tensors(
    gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, *, split: tuple[list[Tensor], Tensor], stored: int
) -> dict[str, Tensor]:
    """The tensors of the experts of one layer; neurons beyond an expert's own are zero."""
    routed, shared = split
    hidden = gate_proj.shape[1]
    gate_up = gate_proj.new_zeros(len(routed), 2 * stored, hidden)
    down = gate_proj.new_zeros(len(routed), hidden, stored)
    for expert, neurons in enumerate(routed):
        size = len(neurons)
        gate_up[expert, :size], gate_up[expert, stored : stored + size] = gate_proj[neurons], up_proj[neurons]
        down[expert, :, :size] = down_proj[:, neurons]
    tensors = {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
    if len(shared):
        width = len(shared) // len(routed[0]) * stored
        wide, back = gate_proj.new_zeros(2 * width, hidden), gate_proj.new_zeros(hidden, width)
        wide[: len(shared)], wide[width : width + len(shared)] = gate_proj[shared], up_proj[shared]
        back[:, : len(shared)] = down_proj[:, shared]
        tensors |= {"shared_experts.gate_up_proj.weight": wide, "shared_experts.down_proj.weight": back}
    return tensors


def initial_router(config: LlamaMoEConfig, init: Literal["normal", "zeros"], seed: int) -> RouterOf:
    """Router weights of a layer: normal with the config's initializer_range, or zero. Noise weights are zero."""

    def weights(layer: int) -> dict[str, Tensor]:
        shapes = {"proj.weight": (config.num_experts, config.hidden_size)}
        if config.gate_network == "mlp":
            shapes = {"fc1.weight": (config.num_experts, config.hidden_size), "fc2.weight": (config.num_experts, config.num_experts)}
        std = 0.0 if init == "zeros" else config.initializer_range
        made = {}
        for number, (name, (rows, columns)) in enumerate(shapes.items()):
            drawn = counter.normal(counter.derive(seed, "init", layer, number), "init", 0, rows * columns)
            made[name] = std * drawn.view(rows, columns)
        if config.has_noise_weights:
            made["noise.weight"] = torch.zeros(config.num_experts, config.hidden_size)
        return made

    return weights


callable_as_its_function(__name__)

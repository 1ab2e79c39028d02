"""Score scale factors that make a mixture's layers as large as the dense layers they replace."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lm_core.errors import ConfigError, InputError
from lm_core.models import load_model, load_tokenizer
from moe_cpt.model import LlamaMoEForCausalLM, MoEBlock
from moe_cpt.options.conversion import ScaleConfig
from moe_cpt.split.features import token_rows, watching

Mode = Literal["ratio", "lsq", "rms", "unbiased"]


def scale_of(mode: Mode, uu: float, uf: float, ff: float, experts: int, selects: int) -> float:
    """The factor from sums over tokens: <u,u>, <u,f> and <f,f>, where u is the mixture's output at factor 1 and f the dense one.

    >>> scale_of("lsq", 2.0, 3.0, 8.0, 16, 4), scale_of("rms", 2.0, 3.0, 8.0, 16, 4), scale_of("ratio", 2.0, 3.0, 8.0, 16, 4)
    (1.5, 2.0, 4.0)
    """
    found = {"ratio": experts / selects, "lsq": uf / uu, "rms": math.sqrt(ff / uu), "unbiased": ff / uf if uf else math.inf}[mode]
    if not (math.isfinite(found) and found > 0):
        raise ConfigError(f"mode: {mode} gives the factor {found:g}, since mixture and dense layer hardly agree; use rms or ratio")
    return found


def calibrate(config: ScaleConfig) -> list[float]:
    """One factor per layer, the same for all unless `layerwise`."""
    mixture, dense = load_model(config.model_path).train(False), load_model(config.dense_path).train(False)
    if not isinstance(mixture, LlamaMoEForCausalLM):
        raise ConfigError(f"model_path: {config.model_path} is no mixture of experts; name a folder written by moe-cpt convert")
    if dense.config.model_type != "llama" or dense.config.num_hidden_layers != mixture.config.num_hidden_layers:
        raise ConfigError(f"dense_path: {config.dense_path} is not the model that {config.model_path} was made from; name that one")
    sums = layer_sums(mixture, dense, calibration_tokens(config))
    experts, selects = mixture.config.num_experts, mixture.config.num_selects
    if config.layerwise:
        # a dense layer has no factor, but a place in the list
        converted = mixture.config.converted
        return [
            scale_of(config.mode, uu, uf, ff, experts, selects) if layer in converted else 1.0
            for layer, (uu, uf, ff) in enumerate(sums.tolist())
        ]
    uu, uf, ff = sums.sum(0).tolist()
    return [scale_of(config.mode, uu, uf, ff, experts, selects)] * len(sums)


def calibration_tokens(config: ScaleConfig) -> list[Tensor]:
    """Rows of token ids of the held-out parts of `config.data`, `max_tokens` of them."""
    tokenizer = load_tokenizer(config.dense_path)
    return token_rows(config.data, tokenizer, text_column=config.text_column, length=config.max_length, tokens=int(config.max_tokens))


def layer_sums(mixture: LlamaMoEForCausalLM, dense: nn.Module, rows: list[Tensor]) -> Tensor:
    """<u,u>, <u,f> and <f,f> per layer (L x 3, float64; 0 for dense ones), each layer on the inputs that the dense one sees."""
    blocks = {block.layer_idx: block for block in mixture.blocks()}
    sums = torch.zeros(mixture.config.num_hidden_layers, 3, dtype=torch.float64)

    def watch(layer: int, tensors: Mapping[str, Tensor]) -> None:
        if layer not in blocks:
            return
        block, x, f = blocks[layer], tensors["inputs"][None], tensors["output"][None].double()
        u = routed_output(block, x).double()
        if block.config.num_shared_experts:
            f = f - block.config.shared_scale_factor * block.shared_experts(x).double()
        sums[layer] += torch.stack([(u * u).sum(), (u * f).sum(), (f * f).sum()])

    with watching(dense, watch):
        for row in rows:
            dense(row)
    return sums


def routed_output(block: MoEBlock, x: Tensor) -> Tensor:
    """What the routed experts give together at factor 1."""
    y: Tensor = block(x)[0]
    if block.config.num_shared_experts:
        y = y - block.config.shared_scale_factor * block.shared_experts(x)
    return y / block.scale()


def read_scales(path: Path, layers: int) -> list[float]:
    """The factors of a file, one per layer. Raises InputError when it is something else."""
    try:
        scales = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"score_scale_factor_file_path: {path} cannot be read ({error}); write it with moe-cpt calibrate-scale") from None
    if not isinstance(scales, list) or len(scales) != layers or not all(isinstance(scale, int | float) for scale in scales):
        count = len(scales) if isinstance(scales, list) else "no list of"
        raise InputError(f"score_scale_factor_file_path: {path} holds {count} numbers for {layers} layers; calibrate this model")
    return [float(scale) for scale in scales]

"""How much memory a training run needs, by part, before it starts.

Bytes of optimizer state are exact, tensor by tensor: `optimizer.state_bytes()` after one step gives the same
number. Gradients and workspace are those of one process; activations are a rough figure and say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from lm_core.errors import ConfigError
from lowrank_opt.base import choice
from lowrank_opt.groups import build_param_groups
from lowrank_opt.int4 import GROUP
from lowrank_opt.int8 import weight_bytes
from lowrank_opt.models import HUB_MODELS, PRESETS
from lowrank_opt.projector import low_shape, rank_of, resolve_method, side_of, squares_first

# What a low-rank parameter's state consists of: bits of the moments, and what is kept beside them.
Family = Literal["dense", "projected", "regenerated", "momentum"]


@dataclass(frozen=True)
class Kind:
    """An optimizer as far as memory is concerned."""

    family: Family
    state_bits: int = 32
    rank: int | None = None
    proj_dtype: str = "param"
    feeds_back: bool = False


KINDS: Mapping[str, Kind] = {
    "adamw": Kind("dense"),
    "adamw8bit": Kind("dense", 8),
    "galore": Kind("projected"),
    "galore8bit": Kind("projected", 8),
    "fira": Kind("projected"),
    "apollo": Kind("regenerated"),
    "apollo-mini": Kind("regenerated", rank=1),
    "qgalore": Kind("projected", 8, proj_dtype="int4"),
    "ldadam": Kind("projected", feeds_back=True),
    "muon": Kind("momentum"),
}
ALIASES = {"baseline": "adamw", "lora": "adamw", "lora+galore": "galore", "lora+galore8bit": "galore8bit"}


@dataclass(frozen=True)
class Memory:
    """Bytes by part. `low_rank_states` is the share of `moments` and `bases` that low-rank parameters have."""

    optimizer: str
    parameters: int
    trained: int
    weights: int
    adapters: int
    gradients: int
    moments: int
    bases: int
    low_rank_states: int
    workspace: int
    activations_rough: int

    @property
    def states(self) -> int:
        """Bytes of optimizer state: what `optimizer.state_bytes()` measures."""
        return self.moments + self.bases

    @property
    def total(self) -> int:
        """Weights (adapters included), gradients, states, workspace and activations."""
        return self.weights + self.gradients + self.states + self.workspace + self.activations_rough

    def as_dict(self) -> dict[str, Any]:
        """All rows, the sums, and bytes per parameter; JSON-able."""
        return {**asdict(self), "states": self.states, "total": self.total, "bytes_per_parameter": self.total / max(1, self.parameters)}


def quantised_bytes(rows: int, columns: int, block: int) -> int:
    """Two moments of 8 bits with a float32 maximum per block, blocks restarting at every row."""
    return 2 * (rows * columns + 4 * rows * math.ceil(columns / block))


def dense_bytes(numel: int, bits: int, block: int = 256, smallest: int = 4096) -> int:
    """State of a parameter without a rank."""
    return 8 * numel if bits == 32 or numel < smallest else quantised_bytes(1, numel, block)


def low_rank_bytes(
    shape: tuple[int, int], rank: int, family: Family, bits: int, proj_type: str, proj_bytes: float, block: int = 256, smallest: int = 4096
) -> tuple[int, int]:
    """Moments and basis of a low-rank parameter; `proj_bytes` of an entry of the basis, 0.5 for one of 4 bits."""
    if family == "momentum":
        return 4 * shape[0] * shape[1], 0
    side = side_of(shape, proj_type)
    low = low_shape(shape, side, rank)
    small = bits == 32 or low[0] * low[1] < smallest
    moments = 8 * low[0] * low[1] if small else quantised_bytes(*low, block)
    sides = {"left": shape[:1], "right": shape[1:], "full": shape}[side]
    if family == "regenerated":
        return moments, 0
    entries = [rank * size for size in sides]
    if proj_bytes == 0.5:
        return moments, sum(math.ceil(count / 2) + 4 * math.ceil(count / GROUP) for count in entries)
    return moments, int(proj_bytes) * sum(entries)


def workspace_bytes(
    shape: tuple[int, int], rank: int, side: str, method: str, oversample: int, exact_gradient: bool, power_iters: int = 2
) -> int:
    """Largest temporary of a refresh; 4 m n more where the gradient is not float32 and is copied."""
    rows, columns = shape
    projected, other = (rows, columns) if side == "left" else (columns, rows)
    smaller = min(shape)
    copy = 0 if exact_gradient else 4 * rows * columns
    chosen = resolve_method(method, rank, projected, torch.device("cpu"))
    if chosen == "svd":
        return copy + 4 * (rows * columns + smaller * (rows + columns)) + 12 * smaller**2
    if chosen == "gram":
        return copy + 12 * projected**2
    width = rank + oversample
    squared = squares_first(projected, other, width, 1 if chosen == "subspace" else power_iters)
    return copy + 4 * (projected + other) * width + (4 * projected**2 if squared else 0)


def model_of(model: nn.Module | str | Mapping[str, Any] | Any, num_labels: int = 2) -> nn.Module:
    """The model itself, or one without memory (on the meta device) from a preset name, config arguments or a config.

    roberta and gpt2 stand for classifiers, as they are fine-tuned; everything else for a causal model.
    """
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForCausalLM
    if isinstance(model, str):
        known = {**PRESETS, **HUB_MODELS}
        choice("model", model, list(known))
        if model in HUB_MODELS or known[model]["model_type"] == "roberta":
            auto = AutoModelForSequenceClassification
        model = known[model]
    config: Any = AutoConfig.for_model(**dict(model)) if isinstance(model, Mapping) else model
    if auto is AutoModelForSequenceClassification:
        config.num_labels = num_labels
    with torch.device("meta"):
        return auto.from_config(config)  # type: ignore[no-any-return]


def estimate_memory(
    model_or_config: nn.Module | str | Mapping[str, Any] | Any,
    optimizer: str,
    *,
    rank: int | float = 128,
    proj_type: str = "std",
    proj_dtype: str | None = None,
    error_feedback: bool = True,
    proj_method: str = "auto",
    oversample: int = 16,
    state_bits: int | None = None,
    embedding_state_bits: int = 32,
    block_size: int = 256,
    min_8bit_size: int = 4096,
    full_rank_policy: str = "identity",
    target_modules: str | list[str] = "auto",
    exclude_modules: list[str] | None = None,
    weight_dtype: str = "param",
    dtype: torch.dtype | None = None,
    per_layer: bool = False,
    accumulate: int = 1,
    tokens: int = 0,
    gradient_checkpointing: bool = False,
) -> Memory:
    """Bytes by part for training with `optimizer` (a key of KINDS, or a name of the command line).

    dtype: of the weights; default that of the model. tokens: positions per micro-batch, for the rough figure of
    activations; 0 leaves them out. Parameters that do not require a gradient are weights only, so an adapter
    model counts its adapters. proj_dtype: default int4 for qgalore, else that of the weight.
    weight_dtype: int8 for matrices in 8 bits.
    """
    name = ALIASES.get(optimizer, optimizer)
    choice("optimizer", name, list(KINDS))
    kind = KINDS[name]
    bits = state_bits or kind.state_bits
    model = model_of(model_or_config)
    weights = dict(model.named_parameters())
    bytes_of = {key: p.numel() * (dtype or p.dtype).itemsize for key, p in weights.items()}
    kept = dict(bytes_of)
    groups = build_param_groups(
        model,
        rank=None if kind.family == "dense" else kind.rank or rank,
        target_modules=target_modules,
        exclude_modules=exclude_modules or (),
    )
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    moments = bases = low_states = workspace = low_gradients = dense_gradients = 0
    for group in groups:
        for key, p in zip(group["param_names"], group["params"], strict=True):
            shape = p.shape[0], p.numel() // max(1, p.shape[0])
            if is_low_rank(group["rank"], shape, kind, full_rank_policy):
                low = rank_of(group["rank"], shape)
                proj_bytes = {"fp32": 4, "bf16": 2, "int4": 0.5}.get(proj_dtype or kind.proj_dtype, bytes_of[key] // max(1, p.numel()))
                found = low_rank_bytes(shape, low, kind.family, bits, proj_type, proj_bytes, block_size, min_8bit_size)
                if kind.feeds_back and error_feedback:
                    found = found[0] + 4 * p.numel(), found[1]
                moments, bases, low_states = moments + found[0], bases + found[1], low_states + sum(found)
                side = side_of(shape, proj_type)
                low_gradients += 4 * math.prod(low_shape(shape, side, low))
                if weight_dtype == "int8":
                    kept[key] = weight_bytes(p.numel())
                    # an update writes the weight out in float32
                    workspace = max(workspace, 4 * p.numel())
                if kind.family == "projected":
                    exact = bytes_of[key] == 4 * p.numel()
                    workspace = max(workspace, workspace_bytes(shape, low, side, proj_method, oversample, exact))
            else:
                moments += dense_bytes(p.numel(), embedding_state_bits if p in embeddings else bits, block_size, min_8bit_size)
                dense_gradients += bytes_of[key]
    trained = [key for key, p in weights.items() if p.requires_grad]
    gradients = sum(bytes_of[key] for key in trained)
    if per_layer:
        largest = max((bytes_of[key] for key in trained), default=0)
        gradients = largest + (low_gradients + dense_gradients if accumulate > 1 else 0)
    return Memory(
        optimizer=optimizer,
        parameters=sum(p.numel() for p in weights.values()),
        trained=sum(weights[key].numel() for key in trained),
        weights=sum(kept.values()),
        adapters=sum(size for key, size in bytes_of.items() if "lora_" in key),
        gradients=gradients,
        moments=moments,
        bases=bases,
        low_rank_states=low_states,
        workspace=workspace,
        activations_rough=activation_bytes(model, tokens, dtype, gradient_checkpointing) if tokens else 0,
    )


def is_low_rank(rank: int | float | None, shape: tuple[int, int], kind: Kind, full_rank_policy: str) -> bool:
    """Whether a parameter of a group keeps low-rank state; Muon's momentum has no rank."""
    if rank is None or kind.family == "dense":
        return False
    return kind.family == "momentum" or full_rank_policy == "rotate" or rank_of(rank, shape) < min(shape)


def activation_bytes(model: nn.Module, tokens: int, dtype: torch.dtype | None, checkpointing: bool) -> int:
    """Rough: inputs of every linear map and norm of a layer, twice the feed-forward width, and the hidden states."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ConfigError("tokens: activations can only be estimated for a model with a transformers config; use tokens=0")
    hidden = config.hidden_size
    ffn = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    per_layer = tokens * (8 * hidden + 3 * ffn)
    per_element = (dtype or next(model.parameters()).dtype).itemsize
    layers = config.num_hidden_layers
    kept = layers * tokens * hidden + per_layer if checkpointing else layers * per_layer
    return int(kept * per_element)

"""Every expert takes the neurons that matter most for its cluster of texts, by the scores of `moe-cpt score`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from lm_core.errors import ConfigError, InputError, reading
from moe_cpt.split import Part

Criterion = Literal["max", "min"]
Projection = Literal["up_proj", "gate_proj"]


def split(
    tensors: Mapping[str, Tensor],
    layers: int,
    width: int,
    *,
    num_experts: int,
    seed: int,
    score_file_path: Path,
    proj_type: Projection = "up_proj",
    expert_size: int | None = None,
    criterion: Criterion = "max",
    share_neurons: bool = False,
) -> list[Part]:
    """Layer by layer; `expert_size` defaults to an equal part of the neurons. Nothing is drawn, so `seed` plays no part."""
    size = require_size(width, num_experts, expert_size, share_neurons)
    return [
        Part(take(read_scores(score_file_path, layer, proj_type, num_experts, width), size, criterion, share_neurons))
        for layer in range(layers)
    ]


def take(score_NM: Tensor, size: int, criterion: Criterion, share: bool) -> Tensor:
    """Neurons of every expert, N x size, in order: its own best ones, or those it gets when each neuron goes to one expert only."""
    return best(score_NM, size, criterion) if share else assigned(score_NM, size, criterion)


def best(score_NM: Tensor, size: int, criterion: Criterion = "max") -> Tensor:
    """The `size` best neurons of every expert, ties to the lower neuron; experts may share neurons."""
    order = torch.sort(score_NM, dim=1, descending=criterion == "max", stable=True).indices
    return order[:, :size].sort(dim=1).values


def assigned(score_NM: Tensor, size: int, criterion: Criterion = "max") -> Tensor:
    """The best remaining pair of expert and neuron is given away until every expert has `size`; ties to the lower expert, then neuron."""
    experts, width = score_NM.shape
    order = torch.sort(score_NM.flatten(), descending=criterion == "max", stable=True).indices.tolist()
    taken = bytearray(width)
    found: list[list[int]] = [[] for _ in range(experts)]
    open_experts = experts
    for pair in order:
        expert, neuron = divmod(pair, width)
        if taken[neuron] or len(found[expert]) == size:
            continue
        taken[neuron] = 1
        found[expert].append(neuron)
        open_experts -= len(found[expert]) == size
        if not open_experts:
            break
    return torch.tensor(found).sort(dim=1).values


def require_size(width: int, num_experts: int, expert_size: int | None, share: bool) -> int:
    """Neurons per expert. Raises ConfigError when there are too few of them."""
    if expert_size is None:
        if width % num_experts:
            raise ConfigError(f"num_experts: {num_experts} experts do not divide the {width} neurons of a layer; give --expert_size")
        return width // num_experts
    most = width if share else width // num_experts
    if not 1 <= expert_size <= most:
        raise ConfigError(f"expert_size: {num_experts} experts of {expert_size} of {width} neurons; use at most {most}")
    return expert_size


def read_scores(path: Path, layer: int, projection: Projection, num_experts: int, width: int) -> Tensor:
    """Scores of one layer, clusters x neurons, float64. Raises InputError for a file of something else."""
    name = f"layers.{layer}.{projection}"
    if not path.is_file():
        raise InputError(f"score_file_path: {path} does not exist; write it with moe-cpt score")
    with reading(f"score_file_path: {path}", "write it with moe-cpt score"), safe_open(path, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118 - no mapping
            raise InputError(f"score_file_path: {path} holds no {name}; write it with moe-cpt score for this model")
        score: Tensor = file.get_tensor(name).double()
    if tuple(score.shape) != (num_experts, width):
        raise InputError(
            f"score_file_path: {path} has {score.shape[0]} clusters of {score.shape[-1]} neurons for {num_experts} experts "
            f"of a layer of {width}; cluster the text into {num_experts}, and score this model"
        )
    return score

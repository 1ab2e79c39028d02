"""Neurons that matter for many clusters of texts are shared; the others go to the clusters they matter most for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lm_core.errors import ConfigError
from moe_cpt.split import Part, require_divisible
from moe_cpt.split.gradient import Criterion, Projection, best, read_scores, take


def split(
    tensors: Mapping[str, Tensor],
    layers: int,
    width: int,
    *,
    num_experts: int,
    seed: int,
    score_file_path: Path,
    num_experts_residual: int = 2,
    proj_type: Projection = "up_proj",
    expert_size: int | None = None,
    criterion: Criterion = "max",
    share_neurons: bool = False,
) -> list[Part]:
    """`num_experts` routed experts beside `num_experts_residual` shared ones of the same size, layer by layer."""
    size = require_divisible(width, num_experts + num_experts_residual) if expert_size is None else expert_size
    most = width - num_experts_residual * size
    if not 1 <= size * (1 if share_neurons else num_experts) <= most:
        raise ConfigError(
            f"expert_size: {num_experts} + {num_experts_residual} experts of {size} neurons do not fit into {width}; use a smaller one"
        )
    parts = []
    for layer in range(layers):
        score_NM = read_scores(score_file_path, layer, proj_type, num_experts, width)
        shared = common(score_NM, num_experts_residual * size, size, criterion)
        rest = others(width, shared)
        parts.append(Part(rest[take(score_NM[:, rest], size, criterion, share_neurons)], shared))
    return parts


def common(score_NM: Tensor, count: int, size: int, criterion: Criterion) -> Tensor:
    """`count` neurons, first those that most experts have among their `size` best; ties to the lower neuron, in order.

    When no expert ranks a further neuron so high, ranks are taken anew among those that are left.
    """
    width = score_NM.shape[1]
    chosen = torch.empty(0, dtype=torch.int64)
    while len(chosen) < count:
        left = others(width, chosen)
        votes = torch.bincount(best(score_NM[:, left], size, criterion).flatten(), minlength=len(left))
        order = torch.sort(votes, descending=True, stable=True)
        ranked = left[order.indices[order.values > 0]]
        chosen = torch.cat([chosen, ranked[: count - len(chosen)]])
    return chosen.sort().values


def others(width: int, chosen: Tensor) -> Tensor:
    """The neurons that are not among `chosen`, in order."""
    return torch.ones(width, dtype=torch.bool).index_fill_(0, chosen, False).nonzero()[:, 0]

"""Neurons with similar weights become one expert (MoEfication, Zhang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moe_cpt.split import Part, require_divisible
from moe_cpt.split.kmeans import Metric, balanced_kmeans
from moe_cpt.tensors import ffn_name


def split(
    tensors: Mapping[str, Tensor],
    layers: int,
    width: int,
    *,
    num_experts: int,
    seed: int,
    proj_type: Literal["up_proj", "gate_proj"] = "up_proj",
    metric: Metric = "l2",
    max_iter: int = 500,
    n_init: int = 1,
) -> list[Part]:
    """Balanced k-means of the normalised rows of one projection, layer by layer."""
    require_divisible(width, num_experts)
    parts = []
    for layer in range(layers):
        rows = torch.nn.functional.normalize(tensors[ffn_name(layer, proj_type)].double(), dim=1)
        labels, cost = balanced_kmeans(rows.numpy(), num_experts, seed=seed + layer, metric=metric, max_iter=max_iter, n_init=n_init)
        parts.append(Part(by_label(torch.from_numpy(labels), num_experts), cost=cost))
    return parts


def by_label(labels: Tensor, num_experts: int) -> Tensor:
    """Indices by cluster, each cluster's in order: N x e."""
    return torch.argsort(labels, stable=True).view(num_experts, -1)

"""Neurons that are active on the same tokens become one expert; the most active ones are shared (no training)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_cpt.split import Part, require_divisible
from moe_cpt.split.clustering import by_label
from moe_cpt.split.features import read_features
from moe_cpt.split.kmeans import balanced_kmeans

# tokens that neurons are compared on
TOKENS = 8192


def split(
    tensors: Mapping[str, Tensor],
    layers: int,
    width: int,
    *,
    num_experts: int,
    seed: int,
    features: Path,
    num_shared_experts: int = 0,
    k_act: int = 10,
) -> list[Part]:
    """Balanced k-means of the normalised columns of |h|, from `moe-cpt features --what act`, layer by layer."""
    size = require_divisible(width, num_experts + num_shared_experts)
    return [
        layer_split(read_features(features, layer, "act", width), num_experts, num_shared_experts * size, k_act, seed + layer)
        for layer in range(layers)
    ]


def layer_split(h_TM: Tensor, num_experts: int, num_shared: int, k_act: int, seed: int) -> Part:
    """One layer: the `num_shared` neurons most often among a token's `k_act` largest |h| are shared, the others are clustered."""
    width = h_TM.shape[1]
    shared = torch.topk(mark_rate(h_TM, k_act), num_shared).indices.sort().values if num_shared else torch.empty(0, dtype=torch.int64)
    rest = torch.ones(width, dtype=torch.bool).index_fill_(0, shared, False).nonzero()[:, 0]
    at = torch.linspace(0, len(h_TM) - 1, min(TOKENS, len(h_TM))).round().long()
    columns = torch.nn.functional.normalize(h_TM[at][:, rest].abs().double().T, dim=1)
    labels, cost = balanced_kmeans(columns.numpy(), num_experts, seed=seed)
    return Part(rest[by_label(torch.from_numpy(labels), num_experts)], shared if num_shared else None, cost)


def mark_rate(h_TM: Tensor, k_act: int) -> Tensor:
    """Share of tokens that have each neuron among their `k_act` largest |h|; ties in the rate go to the lower neuron."""
    marks = torch.topk(h_TM.abs().float(), min(k_act, h_TM.shape[1]), dim=1).indices.flatten()
    count = torch.bincount(marks, minlength=h_TM.shape[1]).double()
    return count / len(h_TM) - torch.arange(len(count), dtype=torch.float64) * 1e-12

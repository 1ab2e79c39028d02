"""Neurons that are active together are neighbours in a graph; experts are parts of it that cut few edges (MoEfication)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_cpt.split import Part, require_divisible
from moe_cpt.split.clustering import by_label
from moe_cpt.split.features import read_features
from moe_cpt.split.kmeans import balanced_kmeans

Kernel = Literal["l1_norm", "l2_norm", "plain"]
# an exchange must gain more than rounding could
_GAIN = 1e-9


def split(
    tensors: Mapping[str, Tensor],
    layers: int,
    width: int,
    *,
    num_experts: int,
    seed: int,
    hidden_features_path: Path,
    proj_type: Literal["up_proj", "gate_proj"] = "up_proj",
    metric: Kernel = "l1_norm",
    threshold: float = 1.0,
    batch_size: int = 16,
) -> list[Part]:
    """A balanced partition of the co-activation graph of every layer; the cost is the weight of the edges between experts."""
    require_divisible(width, num_experts)
    parts = []
    for layer in range(layers):
        a_TM = read_features(hidden_features_path, layer, proj_type.removesuffix("_proj"), width)
        adjacency = coactivation(a_TM, metric, threshold, batch_size)
        labels = partition(adjacency.numpy(), num_experts, seed + layer)
        parts.append(Part(by_label(torch.from_numpy(labels), num_experts), cost=cut(adjacency.numpy(), labels)))
    return parts


def coactivation(a_TM: Tensor, metric: Kernel, threshold: float, batch: int) -> Tensor:
    """Sum over batches of tokens of min(k(a)^T k(a), threshold), with k the absolute value, the square or nothing; 0 on the diagonal."""
    total = torch.zeros(a_TM.shape[1], a_TM.shape[1])
    for rows in a_TM.split(batch):
        kernel = rows.float()
        kernel = kernel if metric == "plain" else kernel.abs() if metric == "l1_norm" else kernel.square()
        total += (kernel.T @ kernel).clamp_(max=threshold)
    return total.fill_diagonal_(0)


def partition(adjacency: NDArray[np.float32], parts: int, seed: int) -> NDArray[np.int64]:
    """Labels of parts of equal size: similar neighbourhoods first, then exchanges of two nodes as long as one gains weight inside parts.

    No exchange of two nodes improves the result (Kernighan and Lin, 1970).
    """
    weights = np.asarray(adjacency, dtype=np.float64)
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    labels, _ = balanced_kmeans(weights / np.maximum(norms, 1e-12), parts, seed=seed)
    # weight of the edges of a node into each part
    into = weights @ np.eye(parts)[labels]
    least = _GAIN * max(float(np.abs(weights).max()), 1e-300)
    moved = True
    while moved:
        moved = False
        for a in range(parts):
            for b in range(a + 1, parts):
                moved |= _exchange(weights, labels, into, a, b, least)
    return labels


def _exchange(weights: NDArray[np.float64], labels: NDArray[np.int64], into: NDArray[np.float64], a: int, b: int, least: float) -> bool:
    """Exchange the best pair of nodes of two parts until no pair gains; whether there was one. `labels` and `into` are changed."""
    exchanged = False
    while True:
        first, second = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
        gain = (into[first, b] - into[first, a])[:, None] + (into[second, a] - into[second, b])[None]
        gain -= 2 * weights[np.ix_(first, second)]
        row, column = np.unravel_index(gain.argmax(), gain.shape)
        if gain[row, column] <= least:
            return exchanged
        one, other = first[row], second[column]
        labels[one], labels[other] = b, a
        difference = weights[:, one] - weights[:, other]
        into[:, a] -= difference
        into[:, b] += difference
        exchanged = True


def cut(adjacency: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Weight of the edges between different parts."""
    return float(adjacency[labels[:, None] != labels[None]].sum(dtype=np.float64) / 2)

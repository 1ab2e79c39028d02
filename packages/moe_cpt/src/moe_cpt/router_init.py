"""Routers that know something of the experts before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.split import Split
from moe_cpt.split.features import watching
from moe_cpt.tensors import ffn_name

# R tokens, D hidden size, N experts

RIDGE = 0.1
RouterOf = Callable[[int], dict[str, Tensor]]


def as_router(config: LlamaMoEConfig, weight_ND: Tensor) -> dict[str, Tensor]:
    """The tensors of a router whose logits follow x W^T: exactly for a linear one, before tanh for the other. Noise weights are zero."""
    tensors = {"proj.weight": weight_ND}
    if config.gate_network == "mlp":
        tensors = {"fc1.weight": weight_ND, "fc2.weight": torch.eye(config.num_experts)}
    if config.has_noise_weights:
        tensors["noise.weight"] = torch.zeros(config.num_experts, config.hidden_size)
    return tensors


def centroid(config: LlamaMoEConfig, source: Mapping[str, Tensor], split: Split) -> RouterOf:
    """Row j is the mean of the normalised gate rows of expert j."""

    def weights(layer: int) -> dict[str, Tensor]:
        rows = torch.nn.functional.normalize(source[ffn_name(layer, "gate_proj")].float(), dim=1)
        return as_router(config, torch.stack([rows[neurons].mean(0) for neurons in split.layer(layer)[0]]))

    return weights


def ridge(config: LlamaMoEConfig, dense: Any, split: Split, rows: Sequence[Tensor]) -> RouterOf:
    """Row j predicts the logarithm of the norm of expert j's output from the layer's input, by ridge regression over `rows`.

    W^T = (X^T X + lambda mean(x^2) n I)^-1 X^T (Z - Zbar), Z_tj = log max(||E_j(x_t)||, 1e-12), Zbar the mean over a token's experts.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    xx = torch.zeros(layers, hidden, hidden, dtype=torch.float64)
    xz = torch.zeros(layers, hidden, config.num_experts, dtype=torch.float64)

    def watch(layer: int, tensors: Mapping[str, Tensor]) -> None:
        x_RD, down_DM = tensors["inputs"].float(), dense.model.layers[layer].mlp.down_proj.weight
        z_RN = expert_norms(tensors["act"], down_DM, split.layer(layer)[0]).clamp(min=1e-12).log()
        xx[layer] += x_RD.T @ x_RD
        xz[layer] += x_RD.T @ (z_RN - z_RN.mean(1, keepdim=True))

    with watching(dense, watch):
        for row in rows:
            dense.model(row)
    weights_LND = torch.stack([solved(left, right) for left, right in zip(xx, xz)]).transpose(1, 2)
    return lambda layer: as_router(config, weights_LND[layer].float())


def trained(config: LlamaMoEConfig, tensors: Mapping[str, Tensor]) -> RouterOf:
    """The routers of a file of `moe-cpt train-gate`; noise weights are zero."""

    def weights(layer: int) -> dict[str, Tensor]:
        prefix = f"layers.{layer}.router."
        made = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if config.has_noise_weights:
            made["noise.weight"] = torch.zeros(config.num_experts, config.hidden_size)
        return made

    return weights


def expert_norms(act_RM: Tensor, down_DM: Tensor, routed: Iterable[Tensor]) -> Tensor:
    """||E_j(x)|| of every token and expert, R x N."""
    return torch.stack([(act_RM[:, neurons] @ down_DM[:, neurons].T).norm(dim=1) for neurons in routed], dim=1).float()


def solved(xx_DD: Tensor, xz_DN: Tensor, strength: float = RIDGE) -> Tensor:
    """The ridge solution from its sums; n mean(x^2) is the mean of the diagonal of X^T X."""
    weight = strength * xx_DD.diagonal().mean()
    solution: Tensor = torch.linalg.solve(xx_DD + weight * torch.eye(len(xx_DD), dtype=xx_DD.dtype), xz_DN)
    return solution

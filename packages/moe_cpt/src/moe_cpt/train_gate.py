"""Routers trained to tell from a layer's input which experts' neurons will be most active (MoEfication): `moe-cpt train-gate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lm_core import counter
from lm_core.errors import ConfigError, InputError, reading
from moe_cpt.models import source_folder
from moe_cpt.options.conversion import TrainGateConfig
from moe_cpt.split import Split
from moe_cpt.split.features import read_features
from moe_cpt.targets import require_free
from moe_cpt.tensors import ModelTensors, read_config

# R tokens, D hidden size, M neurons, N experts
Criterion = Literal["plain", "positive", "l1_norm", "l2_norm"]
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda h: h.sum(1),
    "positive": lambda h: h.relu().sum(1),
    "l1_norm": lambda h: h.abs().sum(1),
    "l2_norm": lambda h: h.norm(dim=1),
}


def expert_scores(act_RM: Tensor, routed: Sequence[Tensor], criterion: Criterion) -> Tensor:
    """How active each expert's neurons are on each token, standardised per token over the experts: R x N."""
    z_RN = torch.stack([SCORES[criterion](act_RM[:, neurons]) for neurons in routed], dim=1)
    spread = z_RN.std(1, keepdim=True, correction=0)
    return (z_RN - z_RN.mean(1, keepdim=True)) / spread.clamp(min=1e-12)


def overlap(logits_RN: Tensor, target_RN: Tensor, selects: int) -> float:
    """Share of the `selects` highest targets that are among the `selects` highest logits."""
    chosen, wanted = (torch.zeros_like(values).scatter(1, values.topk(selects, dim=1).indices, 1.0) for values in (logits_RN, target_RN))
    return float((chosen * wanted).sum() / (selects * len(logits_RN)))


def fit(
    x_RD: Tensor,
    z_RN: Tensor,
    network: Literal["mlp", "linear"],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """Weights of a router whose softmax is closest to softmax(z) in cross entropy, by Adam with a linearly falling rate.

    While it is fitted, inputs are scaled to vectors of length 1 on average, so that one learning rate fits every layer and width.
    """
    hidden, experts = x_RD.shape[1], z_RN.shape[1]
    size = float(x_RD.square().sum(1).mean().sqrt().clamp(min=1e-12))
    x_RD, target_RN = x_RD / size, torch.softmax(z_RN, dim=1)
    shapes = {"proj.weight": (experts, hidden)}
    if network == "mlp":
        shapes = {"fc1.weight": (experts, hidden), "fc2.weight": (experts, experts)}
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        drawn = counter.normal(counter.derive(seed, "init", number), "init", 0, shape[0] * shape[1]).view(shape)
        weights[name] = nn.Parameter(drawn if name == "fc1.weight" else 0.1 * drawn)
    optimizer = torch.optim.Adam(weights.values())
    batches = -(-len(x_RD) // batch_size)
    for epoch in range(epochs):
        order = torch.argsort(counter.bits(counter.derive(seed, "order", epoch), "order", 0, len(x_RD)), stable=True)
        for number, rows in enumerate(order.split(batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - (epoch * batches + number) / (epochs * batches))
            loss = F.cross_entropy(logits(weights, x_RD[rows]), target_RN[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    first = next(iter(shapes))
    return {name: (weight.detach() / size if name == first else weight.detach()) for name, weight in weights.items()}


def logits(weights: dict[str, Any], x_RD: Tensor) -> Tensor:
    """Of a router with these weights, R x N."""
    if "proj.weight" in weights:
        return F.linear(x_RD, weights["proj.weight"])
    return F.linear(torch.tanh(F.linear(x_RD, weights["fc1.weight"])), weights["fc2.weight"])


def train_gate(config: TrainGateConfig) -> list[float]:
    """Fit and write the routers of all layers; the share of the most active experts that each one finds on held-out tokens."""
    require_free("save_path", config.save_path, config.overwrite)
    folder, split = source_folder(config.model_path), Split.load(config.split_file_path)
    dense = read_config(folder)
    split.require_model(ModelTensors(folder), dense, config.split_file_path)
    if config.num_selects > split.num_experts:
        raise ConfigError(f"num_selects: {config.num_selects} of {split.num_experts} experts; use 1 to {split.num_experts}")
    hidden = dense["hidden_size"]
    shares, tensors = list[float](), dict[str, Tensor]()
    for layer in range(len(split.indices)):
        x_RD = read_features(config.hidden_features_path, layer, "inputs", hidden).float()
        act_RM = read_features(config.hidden_features_path, layer, "act", split.intermediate_size).float()
        z_RN = expert_scores(act_RM, split.layer(layer)[0], config.select_criterion)
        kept = round(config.train_percent * len(x_RD))
        if not 0 < kept < len(x_RD):
            raise ConfigError(f"train_percent: {config.train_percent} of {len(x_RD)} tokens leaves none to fit or to judge; change it")
        weights = fit(
            x_RD[:kept],
            z_RN[:kept],
            config.gate_network,
            epochs=config.epochs,
            lr=config.lr,
            batch_size=config.batch_size,
            seed=config.seed + layer,
        )
        shares.append(overlap(logits(weights, x_RD[kept:]), z_RN[kept:], config.num_selects))
        tensors |= {f"layers.{layer}.router.{name}": weight for name, weight in weights.items()}
    config.save_path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, config.save_path, metadata={"network": config.gate_network, "model_hash": split.model_hash})
    return shares


def read_gate(path: Path, split: Split, network: str) -> dict[str, Tensor]:
    """Tensors of a file of `train_gate`. Raises InputError when it belongs to another model, split or kind of router."""
    if not path.is_file():
        raise InputError(f"select_file_path: {path} does not exist; write it with moe-cpt train-gate")
    with reading(f"select_file_path: {path}", "write it with moe-cpt train-gate"), safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if facts.get("network") != network:
        raise InputError(f"select_file_path: {path} holds {facts.get('network')} routers, not {network}; use --gate_network of that kind")
    if facts.get("model_hash") != split.model_hash:
        raise InputError(f"select_file_path: {path} was made for another model; train the gate for this split")
    rows = next(iter(tensors.values())).shape[0]
    if rows != split.num_experts:
        raise InputError(f"select_file_path: {path} routes to {rows} experts, the split has {split.num_experts}; train it for this split")
    return tensors

"""Partitions of the neurons of feed-forward layers into experts: one file per method, one file format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm_core.errors import InputError
from moe_cpt.tensors import model_hash, read_config

FORMAT = 1
FILE = "split.safetensors"


@dataclass(frozen=True)
class Split:
    """Which neurons each expert has.

    `indices`: per layer int64 N x e, filled up with -1 where experts differ in size; `shared`: per layer the neurons of all shared
    experts, or none. In a `partition` every neuron is in exactly one expert; otherwise some are in none, or in several.
    """

    method: str
    indices: list[Tensor]
    intermediate_size: int
    model_hash: str
    seed: int
    args: Mapping[str, Any] = field(default_factory=dict)
    shared: list[Tensor] = field(default_factory=list)
    partition: bool = True

    @property
    def num_experts(self) -> int:
        return len(self.indices[0])

    @property
    def num_shared_experts(self) -> int:
        """Shared experts, each as large as a routed one."""
        return len(self.shared[0]) // self.indices[0].shape[1] if self.shared else 0

    def layer(self, number: int) -> tuple[list[Tensor], Tensor]:
        """Neurons of each routed expert, and of the shared ones together (S * e, possibly none)."""
        routed = [neurons[neurons >= 0] for neurons in self.indices[number]]
        return routed, self.shared[number] if self.shared else torch.empty(0, dtype=torch.int64)

    def sizes(self) -> list[list[int]]:
        """Neurons of every routed expert, by layer."""
        return [(indices >= 0).sum(1).tolist() for indices in self.indices]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"layers.{layer}.indices": indices.to(torch.int32) for layer, indices in enumerate(self.indices)}
        tensors |= {f"layers.{layer}.shared": shared.to(torch.int32) for layer, shared in enumerate(self.shared)}
        facts = {
            "format": FORMAT,
            "method": self.method,
            "args": dict(self.args),
            "seed": self.seed,
            "num_layers": len(self.indices),
            "intermediate_size": self.intermediate_size,
            "model_hash": self.model_hash,
            "partition": self.partition,
        }
        save_file(tensors, path, metadata={"split": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> Split:
        """Raises InputError for a file that is no split, or no partition."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["split"])
                tensors = {name: file.get_tensor(name).long() for name in file.keys()}  # noqa: SIM118 - no mapping
        except Exception as error:  # safetensors has its own kinds
            raise InputError(f"split_file_path: {path} cannot be read ({error}); write it with moe-cpt split") from None
        if facts.get("format") != FORMAT:
            raise InputError(f"split_file_path: {path} is of format {facts.get('format')}, not {FORMAT}; write it again")
        layers = range(facts["num_layers"])
        split = cls(
            method=facts["method"],
            indices=[tensors[f"layers.{layer}.indices"] for layer in layers],
            intermediate_size=facts["intermediate_size"],
            model_hash=facts["model_hash"],
            seed=facts["seed"],
            args=facts["args"],
            shared=[tensors[f"layers.{layer}.shared"] for layer in layers] if "layers.0.shared" in tensors else [],
            partition=facts.get("partition", True),
        )
        require_valid(split, str(path))
        return split

    def require_model(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: object) -> None:
        """Raise InputError when the split was made for another model."""
        layers, width = config["num_hidden_layers"], config["intermediate_size"]
        if (len(self.indices), self.intermediate_size) != (layers, width):
            found = f"{len(self.indices)} layers of {self.intermediate_size} neurons, the model has {layers} of {width}"
            raise InputError(f"split_file_path: {path} is for {found}; split this model")
        if self.model_hash != model_hash(tensors, layers):
            raise InputError(f"split_file_path: {path} was made for other weights of the same shape; split this model")


def require_valid(split: Split, name: str) -> None:
    """Raise InputError for neurons that do not exist or occur twice in an expert, and in a partition for those not in exactly one."""
    width = split.intermediate_size
    for number in range(len(split.indices)):
        routed, shared = split.layer(number)
        outside = torch.cat([split.indices[number].flatten(), shared])
        outside = outside[(outside < -1) | (outside >= width)]
        if len(outside):
            raise InputError(f"split_file_path: {name}, layer {number}: neuron {int(outside[0])} is outside 0 to {width - 1}")
        for neurons in [torch.cat([*routed, shared])] if split.partition else [*routed, shared]:
            counts = torch.bincount(neurons, minlength=width)
            if (wrong := (counts != 1) if split.partition else (counts > 1)).any():
                neuron = int(wrong.nonzero()[0])
                what = "is missing" if counts[neuron] == 0 else f"occurs {int(counts[neuron])} times"
                raise InputError(f"split_file_path: {name}, layer {number}: neuron {neuron} {what}; write the split again")


def require_divisible(width: int, experts: int) -> int:
    """Neurons per expert. Raises InputError when they do not come out even."""
    if experts < 1 or width % experts:
        near = max(count for count in range(1, max(experts, 1) + 1) if width % count == 0)
        raise InputError(f"num_experts: {experts} experts do not divide the {width} neurons of a layer; use for example {near}")
    return width // experts


def split_ffn(model: str | Path | Mapping[str, Tensor], method: str, **options: Any) -> Split:
    """Split a model folder, or a state dict, by `method`; `options` are those of the method (num_experts, seed, ...).

    >>> state = {f"model.layers.0.mlp.{name}.weight": torch.ones(8, 4) for name in ("gate_proj", "up_proj")}
    >>> state["model.layers.0.mlp.down_proj.weight"] = torch.ones(4, 8)
    >>> [sorted(expert) for expert in split_ffn(state, "random", num_experts=1).indices[0].tolist()]
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    from moe_cpt.split import activation, clustering, gradient, graph, random, residual
    from moe_cpt.tensors import ModelTensors, ffn_name, require_swiglu

    if isinstance(model, Mapping):
        tensors: Mapping[str, Tensor] = model
        layers = sum(name.endswith("mlp.gate_proj.weight") for name in model)
    else:
        stored = read_config(Path(model))
        require_swiglu(stored, str(model))
        tensors, layers = ModelTensors(Path(model)), stored["num_hidden_layers"]
    name = ffn_name(0, "gate_proj")
    width = tensors.shape(name)[0] if isinstance(tensors, ModelTensors) else len(tensors[name])
    methods: dict[str, Callable[..., list[Part]]] = {
        "random": random.split,
        "clustering": clustering.split,
        "activation": activation.split,
        "graph": graph.split,
        "gradient": gradient.split,
        "residual": residual.split,
    }
    seed = options.pop("seed", 1227)
    parts = methods[method](tensors, layers, width, seed=seed, **options)
    facts = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    facts |= {"cost": [part.cost for part in parts]} if parts[0].cost is not None else {}
    shared = [part.shared for part in parts if part.shared is not None]
    whole = all(covers([part.routed.flatten(), *([] if part.shared is None else [part.shared])], width) for part in parts)
    return Split(method, [part.routed for part in parts], width, model_hash(tensors, layers), seed, facts, shared, whole)


@dataclass(frozen=True)
class Part:
    """The experts of one layer, and what making them cost where the method has a measure of it."""

    routed: Tensor
    shared: Tensor | None = None
    cost: float | None = None


def covers(experts: Sequence[Tensor], width: int) -> bool:
    """Whether every neuron is in exactly one of the experts."""
    neurons = torch.cat(list(experts))
    return len(neurons) == width and len(neurons.unique()) == width


def described(split: Split, number: int) -> str:
    """Sizes and coverage of one layer in a line, and for experts that share neurons how many each two have in common."""
    routed, shared = split.layer(number)
    sizes = sorted({len(neurons) for neurons in routed})
    counts = torch.bincount(torch.cat([*routed, shared]), minlength=split.intermediate_size)
    line = f"layer {number}: {len(routed)} experts of {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} neurons"
    cost = split.args.get("cost")
    line += f", {len(shared)} shared, cost {cost[number]:.5g}" if cost else f", {len(shared)} shared"
    if split.partition:
        return line
    member = torch.zeros(len(routed), split.intermediate_size)
    for row, neurons in zip(member, routed):
        row[neurons] = 1
    once, several, unused = int((counts == 1).sum()), int((counts > 1).sum()), int((counts == 0).sum())
    table = "\n".join("  " + " ".join(f"{int(value):5}" for value in row) for row in member @ member.T)
    return f"{line}; neurons in one expert {once}, in several {several}, in none {unused}\n{table}"

"""The tensors of a model folder, read and written one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm_core.errors import ConfigError, InputError

FFN = ("gate_proj", "up_proj", "down_proj")
SHARD_BYTES = 2 << 30


def ffn_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.{projection}.weight"


class ModelTensors(Mapping[str, Tensor]):
    """Names in the order of the files; a tensor is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("*.safetensors"))
        paths = [path for path in paths if path.name.startswith("model")] or sorted(folder.glob("pytorch_model*.bin"))
        if not paths:
            raise InputError(f"model_path: {folder} holds no model*.safetensors or pytorch_model*.bin; name the folder of a whole model")
        self._files: dict[str, Any] = {}
        for path in paths:
            opened: Any = (
                safe_open(path, framework="pt")
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            )
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        opened = self._files[name]
        found: Tensor = opened[name] if isinstance(opened, Mapping) else opened.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def first_rows(self, name: str, count: int) -> Tensor:
        """The first `count` rows of a tensor, without reading the others."""
        opened = self._files[name]
        rows: Tensor = opened[name][:count] if isinstance(opened, Mapping) else opened.get_slice(name)[:count]
        return rows

    def shape(self, name: str) -> tuple[int, ...]:
        opened = self._files[name]
        return tuple(opened[name].shape if isinstance(opened, Mapping) else opened.get_slice(name).get_shape())


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def require_swiglu(config: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError unless the model is a dense LLaMA with unbiased SwiGLU feed-forward layers."""
    kind, activation = config.get("model_type"), config.get("hidden_act", "silu")
    if kind != "llama":
        raise ConfigError(f"model_path: {name} is a {kind} model, but only dense llama models can be split; name one of those")
    if activation != "silu" or config.get("mlp_bias"):
        found = "biases in its feed-forward layers" if config.get("mlp_bias") else f"activation {activation}"
        raise ConfigError(f"model_path: {name} has {found}, but experts are made of unbiased SwiGLU layers; name another model")


def model_hash(tensors: Mapping[str, Tensor], num_layers: int) -> str:
    """SHA-256 over names, shapes and first 64 bytes of all feed-forward tensors."""
    seen = hashlib.sha256()
    for layer in range(num_layers):
        for projection in FFN:
            name = ffn_name(layer, projection)
            if name not in tensors:
                raise InputError(f"model_path: {name} is missing; name the folder of a whole dense llama model")
            shape = tensors.shape(name) if isinstance(tensors, ModelTensors) else tuple(tensors[name].shape)
            # 64 elements are more than enough
            rows = -(-64 // shape[1])
            first = tensors.first_rows(name, rows) if isinstance(tensors, ModelTensors) else tensors[name][:rows]
            head = first.detach().contiguous().view(torch.uint8).flatten()[:64]
            seen.update(f"{name}{list(shape)}".encode() + bytes(head.tolist()))
    return seen.hexdigest()


class ModelWriter:
    """Writes `model*.safetensors` and their index into `folder`, holding one file's tensors at a time."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self._limit = folder, shard_bytes
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and sum(held.nbytes for held in self._held.values()) + tensor.nbytes > self._limit:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.nbytes

    def close(self) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        places = {tensor: name for name, tensors in zip(names, self._shards) for tensor in tensors}
        index = {"metadata": {"total_size": self._bytes}, "weight_map": places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        save_file(self._held, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held = {}

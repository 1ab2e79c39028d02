"""What a student remembers of a text, in a file: generation goes on in another process as if it had not stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from lm_core.errors import InputError
from rwkv_distill.hf.modeling_rwkv_distill import RwkvDistillForCausalLM, RwkvState

_SAMPLED = 64  # values of each tensor that the fingerprint looks at


def fingerprint(model: RwkvDistillForCausalLM) -> str:
    """Changes with the student's shape, and with its weights as far as a sample of each tensor shows."""
    seen = hashlib.blake2b(json.dumps([model.config.teacher, model.config.student], sort_keys=True, default=str).encode(), digest_size=12)
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        seen.update(f"{name} {tuple(tensor.shape)}".encode() + flat[:: max(1, flat.numel() // _SAMPLED)].double().cpu().numpy().tobytes())
    return seen.hexdigest()


def save(path: Path, model: RwkvDistillForCausalLM, state: RwkvState, waiting: list[int]) -> None:
    """Write the state of one text; `waiting` are its last tokens that the student has not read yet."""
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(state.layers):
        if layer is not None:
            tensors[f"{index}.input"], tensors[f"{index}.matrix"] = layer
    if state.attention is not None:
        kept: Any
        for index, kept in enumerate(state.attention.layers):
            tensors[f"softmax.{index}.keys"], tensors[f"softmax.{index}.values"] = kept.keys, kept.values
    for name in ("positions", "mask"):
        if (value := getattr(state, name)) is not None:
            tensors[name] = value
    about = {"fingerprint": fingerprint(model), "seen": str(state.seen), "waiting": json.dumps(waiting)}
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path, metadata=about)


def load(path: Path, model: RwkvDistillForCausalLM) -> tuple[RwkvState, list[int]]:
    """The state in a file and the tokens that wait. Raises InputError when it is none, or another student's."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is not iterable
    except (OSError, SafetensorError) as error:
        raise InputError(f"state_in: {path} cannot be read ({error}); name a file that --state-out wrote") from error
    if about.get("fingerprint") != fingerprint(model):
        raise InputError(f"state_in: {path} is the state of another student; generate with the one that wrote it")
    softmax = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("softmax.")})
    state = RwkvState(model.config.num_hidden_layers, DynamicCache() if softmax else None)
    for index in softmax:
        assert state.attention is not None
        state.attention.update(tensors[f"softmax.{index}.keys"], tensors[f"softmax.{index}.values"], index)
    for index in range(model.config.num_hidden_layers):
        if f"{index}.matrix" in tensors:
            state.layers[index] = tensors[f"{index}.input"], tensors[f"{index}.matrix"]
    state.positions, state.mask, state.seen = tensors.get("positions"), tensors.get("mask"), int(about["seen"])
    waiting: list[int] = json.loads(about["waiting"])
    return state, waiting

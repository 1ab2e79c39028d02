"""Beacon models on disk: the folder a model argument means, adapter folders, and what belongs to which base."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from beacon.attach import attach_beacon
from beacon.config import BeaconConfig
from beacon.modeling.weights import is_beacon
from lm_core.errors import InputError
from lm_core.models import load_model

log = logging.getLogger(__name__)
ADAPTER, WEIGHTS = "beacon_adapter.json", "beacon_adapter.safetensors"


def model_folder(name: str) -> str:
    """The folder that a model argument means: of a run its `final/`, else its newest checkpoint; anything else is returned as it is."""
    path = Path(name)
    if (path / "final" / "config.json").is_file():
        return str(path / "final")
    steps = {int(found.name.rpartition("-")[2]): found for found in path.glob("checkpoints/checkpoint-*") if found.name[-1].isdigit()}
    # complete ones: state.json is written last
    whole = [step for step, found in steps.items() if (found / "state.json").is_file() and (found / "config.json").is_file()]
    return str(steps[max(whole)]) if whole else name


def tokenizer_name(name: str) -> str:
    """Where the tokenizer of a model argument lies: checkpoints have that of their run, which may have begun at another run's checkpoint."""
    folder = Path(model_folder(name))
    state = folder / "state.json"
    if state.is_file():
        config = json.loads(state.read_text())["config"]
        return str(config["tokenizer"] or tokenizer_name(config["model"]))
    return str(folder) if folder.is_dir() else name


def load_beacon(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with beacons, ready to read. Raises InputError when `name` has none."""
    folder = model_folder(name)
    log.info("model: %s", folder)
    model: Any = load_model(folder, dtype=dtype)
    if not hasattr(model, "beacon_state_dict"):
        raise InputError(f"model: {name} has no beacons; train it first: beacon train --model {name} --train-data builtin:python-docs")
    return model.eval()


def save_adapter(folder: Path, model: Any, weights: dict[str, Tensor], base: str) -> None:
    """The beacon weights alone, with the settings and the name and fingerprint of their base."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().contiguous() for name, tensor in weights.items() if is_beacon(name)}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    path = Path(base).expanduser()
    about = {
        "format_version": 1,
        "base": str(path.resolve()) if path.is_dir() else base,
        "base_fingerprint": fingerprint({name: tensor for name, tensor in weights.items() if not is_beacon(name)}),
        "beacon": model.config.beacon,
    }
    (folder / ADAPTER).write_text(json.dumps(about, indent=1) + "\n")


def load_adapter(folder: Path, base_model: Any = None, dtype: torch.dtype | None = None) -> Any:
    """The adapter in `folder` on its base, which is loaded by its name unless it is given. Raises InputError for another base."""
    about = json.loads((folder / ADAPTER).read_text())
    base = base_model if base_model is not None else load_model(about["base"], dtype=dtype or torch.float32)
    found = fingerprint(base.state_dict())
    if found != about["base_fingerprint"]:
        raise InputError(f"model: {folder} was trained on other weights than those of {about['base']}; give its base with base_model")
    model = attach_beacon(base, BeaconConfig.from_dict(about["beacon"]))
    model.load_beacon_state_dict({name: tensor.to(base.dtype) for name, tensor in load_file(folder / WEIGHTS).items()})
    return model


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Changes when a tensor changes its name, its shape or its first values (rounded to 8 bits of mantissa, so that bf16 copies agree)."""
    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        first = tensor.detach().flatten()[:64].to("cpu", torch.bfloat16).view(torch.int16)
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(first.numpy().tobytes())
    return total.hexdigest()

"""Splits of the original LLaMA-MoE code: a folder with one file per layer, each a list of labels or of index lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_core.errors import InputError
from moe_cpt.split import Split, covers, require_valid
from moe_cpt.tensors import ModelTensors, model_hash

_LAYER = re.compile(r"layers\.(\d+)\.")


def read_legacy(folder: Path, tensors: ModelTensors, layers: int, width: int) -> Split:
    """The split in `folder`, for the model it was made from. Raises InputError for anything else than one list per layer."""
    files = {int(match[1]): path for path in sorted(folder.iterdir()) if (match := _LAYER.search(path.name))}
    if sorted(files) != list(range(layers)):
        raise InputError(
            f"split_file_path: {folder} has lists for layers {sorted(files)}, the model has {layers} layers; give one for each"
        )
    experts = [_experts(files[layer], width) for layer in range(layers)]
    indices = [_padded(layer) for layer in experts]
    whole = all(covers([neurons.flatten() for neurons in layer], width) for layer in experts)
    split = Split("legacy", indices, width, model_hash(tensors, layers), 0, partition=whole)
    require_valid(split, str(folder))
    return split


def _experts(path: Path, width: int) -> list[Tensor]:
    """The neurons of every expert of a layer, from labels (one per neuron) or from lists of neurons."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
        lists = [torch.as_tensor(part, dtype=torch.int64) for part in found]
    except Exception as error:  # unpickling raises anything
        raise InputError(f"split_file_path: {path} is no list of labels or of index lists ({str(error).splitlines()[0]})") from None
    if lists and all(part.ndim == 1 for part in lists):
        return lists
    labels = torch.stack(lists) if lists else torch.empty(0, dtype=torch.int64)
    if labels.shape != (width,) or int(labels.min()) < 0:
        raise InputError(f"split_file_path: {path} holds {len(lists)} labels for {width} neurons; name the split of this model")
    return [(labels == expert).nonzero()[:, 0] for expert in range(int(labels.max()) + 1)]


def _padded(experts: list[Tensor]) -> Tensor:
    size = max(len(neurons) for neurons in experts)
    return torch.stack([torch.nn.functional.pad(neurons, (0, size - len(neurons)), value=-1) for neurons in experts])

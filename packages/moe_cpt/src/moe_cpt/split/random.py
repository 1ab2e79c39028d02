"""A random partition: the baseline of every other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_core import counter
from moe_cpt.split import Part, require_divisible


def split(tensors: Mapping[str, Tensor], layers: int, width: int, *, num_experts: int, seed: int) -> list[Part]:
    """A permutation of the neurons per layer, drawn from (seed, layer), cut into equal parts."""
    size = require_divisible(width, num_experts)
    return [Part(permutation(width, seed, layer).view(num_experts, size)) for layer in range(layers)]


def permutation(width: int, seed: int, layer: int) -> Tensor:
    return torch.argsort(counter.bits(counter.derive(seed, "split", layer), "split", 0, width), stable=True)

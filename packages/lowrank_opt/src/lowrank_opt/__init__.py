"""Training in little memory by low rank: optimizers, memory estimates and the `lowrank-opt` command.

Names are loaded when first used, so importing the package (and the command's --help) stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "AdamW": "adamw",
    "AdamW8bit": "adamw",
    "ApolloAdamW": "apollo",
    "FiraAdamW": "fira",
    "GaLoreAdamW": "galore",
    "GaLoreAdamW8bit": "galore",
    "MuonWithAdamW": "muon",
    "UnsupportedDistributedError": "base",
    "attach_per_layer": "layerwise",
    "build_param_groups": "groups",
    "estimate_memory": "memory",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lowrank_opt.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

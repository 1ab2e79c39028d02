"""Dense LLaMA models into mixtures of experts, their continued pre-training, and the `moe-cpt` command.

Names are loaded when first used, so importing the package (and the command's --help) stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "LlamaMoEConfig": "hf.configuration_llama_moe",
    "LlamaMoEForCausalLM": "model",
    "MoEBlock": "model",
    "Split": "split",
    "convert": "convert",
    "moe_ffn": "experts",
    "split_ffn": "split",
    "update_weights": "weights",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"moe_cpt.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

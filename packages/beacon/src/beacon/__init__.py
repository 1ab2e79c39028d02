"""Language models that read long contexts through compressed memory, and the `beacon` command.

Names are loaded when first used, so importing the package (and the command's --help) stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from beacon import auto

_HOME = {
    "BeaconCache": "cache",
    "BeaconConfig": "config",
    "Plan": "plan",
    "attach_beacon": "attach",
    "build_plan": "plan",
}

__all__ = sorted(_HOME)

# from here on transformers' Auto classes know beacon models, whenever transformers is imported
auto.announce()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"beacon.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

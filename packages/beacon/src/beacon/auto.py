"""Beacon models in transformers' Auto classes, without importing transformers.

`AutoConfig` and `AutoModelForCausalLM` must know our classes after `import beacon`, and `beacon --help` must not wait seconds for
transformers. So the registration runs right after transformers' own registries are imported, which may be later or already done.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

_CONFIGS, _MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
_KINDS = ("llama", "mistral", "phi3", "qwen2", "qwen3")
_STOCK_CONFIGS = tuple(f"transformers.models.{kind}.configuration_{kind}" for kind in _KINDS)
_STOCK_MODELS = ("transformers.modeling_utils", *(f"transformers.models.{kind}.modeling_{kind}" for kind in _KINDS))
# what is registered once these are loaded, and none of the others is still in the middle of its import
_WATCHED = (_CONFIGS, _MODELS, *_STOCK_CONFIGS, *_STOCK_MODELS)
_done: set[str] = set()


def announce() -> None:
    """Register what can be registered now, the rest as soon as transformers is imported."""
    _register()
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    if "busy" in _done:
        # our own modules import watched ones
        return
    _done.add("busy")
    try:
        _register_complete()
    finally:
        _done.discard("busy")


def _register_complete() -> None:
    # configs document themselves by the tables of `_MODELS`, so those must not be half there either
    if _CONFIGS not in _done and _complete(_CONFIGS) and not any(map(_importing, (_MODELS, *_STOCK_CONFIGS))):
        _done.add(_CONFIGS)
        from transformers.models.auto.configuration_auto import AutoConfig

        from beacon.modeling.configs import CONFIGS

        for config in CONFIGS.values():
            AutoConfig.register(config.model_type, config, exist_ok=True)
    if _MODELS not in _done and _CONFIGS in _done and _complete(_MODELS) and not any(map(_importing, (*_STOCK_CONFIGS, *_STOCK_MODELS))):
        _done.add(_MODELS)
        from transformers.models.auto.modeling_auto import AutoModelForCausalLM

        from beacon.modeling.families import FAMILIES

        for family in FAMILIES.values():
            AutoModelForCausalLM.register(family.config, family.model, exist_ok=True)


def _importing(module: str) -> bool:
    """Whether the module is in the middle of its import."""
    return module in sys.modules and bool(getattr(sys.modules[module].__spec__, "_initializing", False))


def _complete(module: str) -> bool:
    return module in sys.modules and not _importing(module)


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets modules be imported as always, then looks whether everything is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _WATCHED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        # the import system clears this mark only after we return
        if module.__spec__ is not None:
            module.__spec__._initializing = False  # type: ignore[attr-defined]
        _register()

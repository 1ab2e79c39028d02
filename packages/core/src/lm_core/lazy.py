"""A package's public names, loaded when first used, so that importing it (and its command's --help) stays free of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def public_names(package: str, home: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` (PEP 562) of `package`, whose public name is found in its module `home[name]`.

    >>> __all__, __getattr__, __dir__ = public_names("lm_core", {"Report": "train"})
    >>> __all__
    ['Report']
    """
    names = sorted(home)

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return names, load, names.copy


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **named)


def callable_as_its_function(module: str) -> None:
    """Make a module whose public function has its name callable as that function.

    An import of the module puts it in the function's place in the package, whichever was asked for first.
    """
    sys.modules[module].__class__ = _Callable

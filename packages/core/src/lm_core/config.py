"""Options as frozen dataclasses: one line declares type, default, sentence, limits, flag, YAML key and document entry.

    @config
    class OptimConfig:
        lr: float = opt(3e-4, "Peak learning rate.", flags=("-l", "--learning-rate"), gt=0)

Layers of values (files, then the command line) are read by `build`, which reports every mistake at once.
Imports no torch, so that `--help` is quick.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import logging
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from lm_core.errors import ConfigError
from lm_core.values import LENGTH_LIMITS, NUMBER_LIMITS, Count, Switch, describe, read, scalar_types, show
from lm_core.yaml12 import dump, load, parse

__all__ = [
    "Count",
    "Leaf",
    "Mistakes",
    "Switch",
    "build",
    "change",
    "config",
    "explicit",
    "find",
    "leaves",
    "load",
    "merge",
    "opt",
    "parse",
    "section",
    "to_dict",
    "to_yaml",
    "wrong_values",
]

C = TypeVar("C")
logger = logging.getLogger(__name__)
_KEEP: Any = object()


class Mistakes(ConfigError):
    """Everything that is wrong with a configuration, one line each."""

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(dict.fromkeys(_printable(line) for line in mistakes))
        lines = "\n".join(f"  {line}" for line in self.mistakes)
        super().__init__(self.mistakes[0] if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes in the options\n{lines}")

    def __reduce__(self) -> Any:
        return type(self), (self.mistakes,)


class Leaf(NamedTuple):
    """One option of a configuration class."""

    path: str  # "lr", or "optim.lr" inside a section
    type: Any  # float, Literal[...], list[str], ...
    default: Any  # dataclasses.MISSING when the option is required
    help: str
    flags: tuple[str, ...]  # further spellings, each with its dashes
    limits: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """The flag that people write: flat, with hyphens."""
        return "--" + self.path.rpartition(".")[2].replace("_", "-")

    @property
    def allowed(self) -> str:
        """What the option accepts, in words."""
        return describe(self.type, self.limits)

    @property
    def shown_default(self) -> str:
        """The default as people write it, for help and documents: "default: 0.0003", "required", or nothing."""
        if self.default is MISSING:
            return "required"
        if self.default is None or self.default in ("", [], {}, ()):
            return ""
        values = self.default if isinstance(self.default, list | tuple) else [self.default]
        words = [
            {True: "true", False: "false"}[value]
            if isinstance(value, bool)
            else f"{value:.10g}"
            if isinstance(value, float)
            else str(value)
            for value in values
        ]
        return f"default: {(',' if isinstance(self.default, tuple) else ' ').join(words)}"


def opt(
    default: Any = MISSING, help: str = "", *, flags: tuple[str, ...] = (), factory: Callable[[], Any] | None = None, **limits: Any
) -> Any:
    """One option: its default (required without one), its sentence, further spellings, and limits.

    Limits are gt, ge, lt, le and multiple_of for numbers, min_length and max_length for text and
    lists, pattern for text; limits of numbers hold for each element of a list.
    """
    return _field(default if factory is None else factory, {"help": help, "flags": flags, "limits": limits}, made=factory is not None)


def section(cls: type[C], **changed_defaults: Any) -> C:
    """A nested configuration, some of its defaults changed; its keys nest in YAML, its flags are flat."""
    return cast(C, _field(lambda: cls(**changed_defaults), {"changed": changed_defaults}, made=True))


def change(base: type, name: str, *, default: Any = _KEEP, help: str | None = None, flags: tuple[str, ...] = (), **limits: Any) -> Any:
    """The option `name` of `base` with another default or sentence, with further spellings, with changed limits.

    Whatever is not given stays as it is in `base`. Spellings are added to those of `base`; a limit of None is taken away.
    """
    old = base.__dataclass_fields__[name]  # type: ignore[attr-defined]
    metadata = {
        "help": old.metadata["help"] if help is None else help,
        "flags": tuple(dict.fromkeys((*old.metadata["flags"], *flags))),
        "limits": {key: limit for key, limit in {**old.metadata["limits"], **limits}.items() if limit is not None},
    }
    if default is not _KEEP:
        return _field(default, metadata)
    return _field(old.default, metadata) if old.default_factory is MISSING else _field(old.default_factory, metadata, made=True)


def _field(default: Any, metadata: dict[str, Any], made: bool = False) -> Any:
    """A dataclass field; `made` says that `default` is a function. A list or mapping is copied for each configuration."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default_factory=default, metadata=metadata) if made else dataclasses.field(default=default, metadata=metadata)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[C]) -> type[C]:
    """Make `cls` a frozen, keyword-only dataclass whose values are checked whenever one is made.

    Several bases may be joined; an option declared again in a subclass replaces the inherited one. A
    method `check(self) -> None` may raise ConfigError for options that do not fit together; those of all
    bases are called. Raises TypeError here, at import, when two options claim one flag or a declaration is wrong.
    """
    annotated = inspect.get_annotations(cls, locals=sys._getframe(1).f_locals, eval_str=True)
    own = {name: kind for name, kind in annotated.items() if getattr(kind, "__origin__", None) is not typing.ClassVar}
    inherited = [base for base in cls.__mro__[1:] if "_own_types" in vars(base)]
    # dataclasses let the last base win even if it merely inherited an option; Python's own order, the MRO, is what a reader expects
    for name in dict.fromkeys(name for base in reversed(inherited) for name in base._own_types):  # type: ignore[attr-defined]
        owner = next(base for base in inherited if name in base._own_types)  # type: ignore[attr-defined]
        taken = next(base for base in inherited if name in base.__dataclass_fields__)  # type: ignore[attr-defined]
        field = owner.__dataclass_fields__[name]  # type: ignore[attr-defined]
        if name not in own and taken.__dataclass_fields__[name] is not field:  # type: ignore[attr-defined]
            own[name] = owner._own_types[name]  # type: ignore[attr-defined]
            setattr(cls, name, change(owner, name) if "help" in field.metadata else copy.copy(field))
    cls.__annotations__ = dict(own)
    made: Any = cls
    made._own_types = own
    # readers see options in the order in which bases are listed
    order = [name for base in cls.__bases__ for name in getattr(base, "_types", ())]
    made._types = dict.fromkeys(order) | {name: kind for base in [*reversed(inherited), made] for name, kind in base._own_types.items()}
    made.__post_init__ = _check
    made = dataclass(frozen=True, kw_only=True)(made)
    _check_declaration(made)
    return cast("type[C]", made)


def leaves(cls: type) -> Iterator[Leaf]:
    """Every option of a configuration class, depth first: the one walk that flags, documents and tests share."""
    return _leaves(cls, "", {})


def _leaves(cls: type, prefix: str, changed: Mapping[str, Any]) -> Iterator[Leaf]:
    for name, kind in _types(cls).items():
        path, field = prefix + name, cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
        about = field.metadata
        if is_dataclass(kind):
            yield from _leaves(cast(type, kind), path + ".", about["changed"])
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        yield Leaf(path, kind, changed.get(name, default), about["help"], about["flags"], about["limits"])


def build(cls: type[C], *layers: Mapping[str, Any], given: Sequence[Mapping[str, Any]] = ()) -> C:
    """A `cls` from mappings of which later ones win, and from those in `given`, which win over all (the command line).

    Keys may be nested or dotted, with hyphens or underscores, a further spelling of an option (which logs
    one notice), or the flat name of an option in a section. Raises `Mistakes`, which names everything that
    is wrong, with the nearest name for unknown keys.

    >>> from lm_core.options import OptimOptions
    >>> made = build(OptimOptions, {"lr": "3e-4", "warmup": "1k"}, {"learning-rate": 1e-3})
    >>> made.lr, made.warmup
    (0.001, 1000)
    """
    values, mistakes = _read(cls, [*layers, *given])
    missing = [leaf for leaf in leaves(cls) if leaf.default is MISSING and leaf.path not in values]
    mistakes += [f"{leaf.path}: is required; give {leaf.allowed} with {leaf.flag} or in a configuration file" for leaf in missing]
    if mistakes:
        raise Mistakes(mistakes)
    return _construct(cls, "", values, frozenset(_merge(cls, given)[0]))


def wrong_values(cls: type, *layers: Mapping[str, Any]) -> list[str]:
    """What is wrong with keys and values, each for itself: neither what is missing nor what does not fit together."""
    return _read(cls, layers)[1]


def find(cls: type, key: str) -> Any:
    """The type of the option or section that `key` means in `cls` (spelled as `build` allows), or None."""
    name = key.strip().replace("-", "_")
    names, sections = _names(cls)
    return sections.get(name) or next((leaf.type for leaf in leaves(cls) if name in names and leaf.path == names[name].path), None)


def merge(cls: type, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all layers, as they were written, by the dotted paths of `cls`, later layers winning; Mistakes for unknown keys."""
    values, mistakes = _merge(cls, layers)
    if mistakes:
        raise Mistakes(mistakes)
    return values


def explicit(config: Any) -> frozenset[str]:
    """Paths of the options that somebody chose: named on the command line, or different from the default.

    A resolved `config.yaml` names every option, so a value in a file that equals the default is no choice.
    """
    chosen = {leaf.path for leaf in leaves(type(config)) if _at(config, leaf.path) != leaf.default}
    return frozenset(chosen) | cast("frozenset[str]", vars(config).get("_given", frozenset()))


def to_dict(config: Any) -> dict[str, Any]:
    """The options as nested mappings of JSON types; `build` reads them back."""
    return {name: _plain(getattr(config, name)) for name in _types(type(config))}


def to_yaml(config: Any) -> str:
    """The options as YAML; `build(cls, parse(to_yaml(config)))` equals `config`."""
    return dump(to_dict(config))


def _printable(text: str) -> str:
    """Control characters and halves of surrogate pairs escaped, so that no value garbles a terminal or cannot be printed."""
    return text if text.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _types(cls: type) -> dict[str, Any]:
    return cast("dict[str, Any]", cls._types)  # type: ignore[attr-defined]


def _at(config: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), config)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _check(self: Any) -> None:
    """Runs whenever a configuration is made: reads each value by its type, then asks the `check` of every base."""
    mistakes: list[str] = []
    for field in dataclasses.fields(self):
        kind, value = _types(type(self))[field.name], getattr(self, field.name)
        if is_dataclass(kind):
            if not isinstance(value, cast(type, kind)):
                mistakes.append(f"{field.name}: {show(value)} is not a section; give a {cast(type, kind).__name__}")
            continue
        value, wrong = read(kind, field.metadata["limits"], value, field.name)
        mistakes += map(str, wrong)
        object.__setattr__(self, field.name, value)
    for base in [] if mistakes else reversed(type(self).__mro__):
        if "check" in vars(base):
            try:
                vars(base)["check"](self)
            except Mistakes as error:
                mistakes += error.mistakes
            except ConfigError as error:
                mistakes.append(str(error))
    if mistakes:
        raise Mistakes(mistakes)


def _construct(cls: type[C], prefix: str, values: Mapping[str, Any], given: frozenset[str]) -> C:
    arguments: dict[str, Any] = {}
    mistakes: list[str] = []
    for field in dataclasses.fields(cast(Any, cls)):
        path, kind = prefix + field.name, _types(cls)[field.name]
        if is_dataclass(kind):
            changed = {f"{path}.{name}": value for name, value in field.metadata["changed"].items()}
            try:
                arguments[field.name] = _construct(cast(type, kind), path + ".", {**changed, **values}, given)
            except Mistakes as error:
                mistakes += error.mistakes
        elif path in values:
            arguments[field.name] = values[path]
    if mistakes:
        raise Mistakes(mistakes)
    made = cls(**arguments)
    object.__setattr__(made, "_given", frozenset(path.removeprefix(prefix) for path in given if path.startswith(prefix)))
    return made


def _read(cls: type, layers: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    values, mistakes = _merge(cls, layers)
    for leaf in leaves(cls):
        if leaf.path in values:
            values[leaf.path], wrong = read(leaf.type, leaf.limits, values[leaf.path], leaf.path)
            mistakes += map(str, wrong)
    return values, mistakes


def _merge(cls: type, layers: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    aliases: dict[str, str] = {}
    for layer in layers:
        found, wrong, spelled = _flatten(cls, layer)
        values.update(found)
        mistakes += wrong
        aliases.update(spelled)
    for alias, path in aliases.items():
        logger.info("%s: read as %s", alias, path)
    return values, mistakes


def _flatten(cls: type, layer: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """The values of one layer by path, what is wrong with its keys, and the aliases it uses."""
    names, sections = _names(cls)
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    aliases: dict[str, str] = {}

    def walk(prefix: str, mapping: Mapping[Any, Any]) -> None:
        for key, value in mapping.items():
            name = prefix + (key.strip().replace("-", "_") if isinstance(key, str) else show(key))
            if name in sections:
                inner = to_dict(value) if isinstance(value, sections[name]) else {} if value is None else value
                if isinstance(inner, Mapping):
                    walk(name + ".", inner)
                else:
                    mistakes.append(f"{name}: {show(value)} is not a section; write its options below it")
            elif name not in names:
                mistakes.append(f"{name}: is not an option; {_nearest(name, prefix, names)}")
            elif names[name].path in values:
                mistakes.append(f"{name}: {names[name].path} is given twice; keep one")
            else:
                values[names[name].path] = value
                if names[name].alias:
                    aliases[name] = names[name].path

    walk("", layer)
    return values, mistakes, aliases


class _Name(NamedTuple):
    path: str
    alias: bool


@functools.cache
def _names(cls: type) -> tuple[dict[str, _Name], dict[str, type]]:
    """Every key that means an option of `cls` (path, flat name, alias; each from any section that holds it), and its sections."""
    names: dict[str, _Name] = {}
    for leaf in leaves(cls):
        parts = leaf.path.split(".")
        spellings = [flag.lstrip("-").replace("-", "_") for flag in leaf.flags if flag.startswith("--")]
        for depth in range(len(parts)):
            above = "".join(f"{part}." for part in parts[:depth])
            names.update({above + spelling: _Name(leaf.path, True) for spelling in spellings})
            names[above + parts[-1]] = _Name(leaf.path, False)
        names[leaf.path] = _Name(leaf.path, False)
    return names, dict(_sections(cls, ""))


def _sections(cls: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, kind in _types(cls).items():
        if is_dataclass(kind):
            yield prefix + name, cast(type, kind)
            yield from _sections(cast(type, kind), f"{prefix}{name}.")


def _nearest(name: str, prefix: str, names: Mapping[str, _Name]) -> str:
    known = [known for known in names if known.startswith(prefix)]
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"did you mean {names[near[0]].path}?"
    paths = sorted({names[key].path for key in known})
    return f"known: {', '.join(paths)}" if len(paths) <= 12 else "--help lists them all"


def _check_declaration(cls: type) -> None:
    """Mistakes that only a programmer can make, found at import."""
    for field in dataclasses.fields(cls):
        kind = _types(cls)[field.name]
        if is_dataclass(kind):
            if strange := set(field.metadata.get("changed", ["section"])) - {leaf.path for leaf in leaves(cast(type, kind))}:
                raise TypeError(f"{cls.__name__}.{field.name}: declare it with section(...) and its own options, not {sorted(strange)}")
        elif "help" not in field.metadata:
            raise TypeError(f"{cls.__name__}.{field.name}: declare it with opt(...)")
    claimed: dict[str, str] = {}
    for leaf in leaves(cls):
        singles = [*scalar_types(leaf.type)]
        if unknown := [
            kind
            for kind in singles
            if kind not in (bool, int, float, str, Path, Any, Count) and typing.get_origin(kind) is not typing.Literal
        ]:
            raise TypeError(f"{cls.__name__}.{leaf.path}: options of type {unknown[0]} are not supported")
        fitting = {name for name in NUMBER_LIMITS if {int, float, Count} & {kind for kind in singles if kind in (int, float, Count)}}
        fitting |= {"pattern"} if str in singles else set()
        fitting |= set(LENGTH_LIMITS) if singles != [leaf.type] or leaf.type is str else set()
        if wrong := set(leaf.limits) - fitting:
            raise TypeError(f"{cls.__name__}.{leaf.path}: {sorted(wrong)} cannot limit {leaf.type}")
        if leaf.default is not MISSING and read(leaf.type, leaf.limits, leaf.default, "") != (leaf.default, []):
            raise TypeError(f"{cls.__name__}.{leaf.path}: the default {leaf.default!r} is not {leaf.allowed}")
        spellings = [leaf.flag, *leaf.flags, *([f"--no-{leaf.flag[2:]}"] if leaf.type is bool else [])]
        for flag in dict.fromkeys(flag.replace("_", "-") for flag in spellings):
            if not re.fullmatch(r"-[A-Za-z]|--[a-zA-Z][\w.-]*", flag):
                raise TypeError(f"{cls.__name__}.{leaf.path}: {flag} is not a flag")
            if claimed.setdefault(flag, leaf.path) != leaf.path:
                raise TypeError(f"{cls.__name__}: {leaf.path} and {claimed[flag]} both claim {flag}")

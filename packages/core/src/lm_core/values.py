"""What an option's type may be, how its value is read from text or YAML, and how both are described to people.

Text reads the same from a flag, an environment or a quoted YAML scalar, so a value never depends on where it was written.
"""

from __future__ import annotations

import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError


class _Counted:
    """Marks `Count`, so that its reader and description differ from those of a plain number."""


Count = Annotated[int | float, _Counted]
"""A length or an amount: 10_000, 100M, 1.5B, 200*10^9, 1e9; an int, or a float when fractional (0.25)."""

Switch = bool
"""On or off; every bool option reads 0, 1, true, false, on, off, yes and no in any case."""

NUMBER_LIMITS = {"gt": "above {}", "ge": "of at least {}", "lt": "below {}", "le": "of at most {}", "multiple_of": "divisible by {}"}
LENGTH_LIMITS = {"min_length": "at least {}", "max_length": "at most {}"}
_SWITCH = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_FACTOR = re.compile(r"([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?)(?:(?:\^|\*\*)(\d{1,2}))?([kmbt]?)", re.IGNORECASE)
_PLAIN = re.compile(r"[-+]?[\d_.]+(?:[eE][-+]?\d+)?")


class Mistake(NamedTuple):
    """One wrong value: where, what it was, and what would be right."""

    path: str
    value: Any
    allowed: str
    nearest: str = ""

    def __str__(self) -> str:
        meant = f"; did you mean {self.nearest}?" if self.nearest else ""
        return f"{self.path}: {show(self.value)} is wrong; give {self.allowed}{meant}"


def read(kind: Any, limits: Mapping[str, Any], value: Any, path: str) -> tuple[Any, list[Mistake]]:
    """`value` as a `kind` within `limits`, or every mistake in it (lists and mappings may hold several).

    >>> read(int, {"ge": 1}, "1e3", "steps")
    (1000, [])
    >>> print(read(int, {"ge": 1}, 0, "steps")[1][0])
    steps: 0 is wrong; give a whole number of at least 1
    """
    try:
        return _adapter(kind, tuple(limits.items())).validate_python(value), []
    except ValidationError as error:
        located = [_locate(kind, limits, value, path, entry) for entry in error.errors(include_url=False)]
        return None, [mistake for n, mistake in enumerate(located) if mistake not in located[:n]]
    except RecursionError:
        return None, [Mistake(path, "a value nested too deeply", describe(kind, limits))]


def describe(kind: Any, limits: Mapping[str, Any] = types.MappingProxyType({})) -> str:
    """What an option accepts, as the end of a sentence that starts with "give".

    >>> describe(float, {"gt": 0, "le": 1})
    'a number above 0 and of at most 1'
    >>> describe(Literal[1, 2] | None)
    '1, 2 or null'
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    within = " and ".join(text.format(limits[name]) for name, text in NUMBER_LIMITS.items() if name in limits)
    number = f" {within}" if within else ""
    if kind is Count:
        return f"a number such as 10_000, 100M or 200*10^9{', ' if within else ''}{within}"
    if origin is Literal:
        return _or([str(arg) for arg in args])
    if origin in (Union, types.UnionType):
        words = [
            word
            for arg in args
            for word in ([str(one) for one in choices(arg)] or ["null" if arg is type(None) else describe(arg, limits)])
        ]
        return _or([*dict.fromkeys(words)])
    if origin in (list, tuple, dict):
        return _describe_many(origin, args, limits)
    if kind is str and "pattern" in limits:
        return f"text that matches {limits['pattern']}"
    names = {
        bool: "true or false",
        int: "a whole number" + number,
        float: "a number" + number,
        str: "text",
        Path: "a path",
        Any: "any value",
    }
    return str(names.get(kind, getattr(kind, "__name__", kind)))


def bounds(limits: Mapping[str, Any]) -> str:
    """The limits alone, for a place where the type is plain: "above 0 and at most 1"."""
    lengths = {name: f"{text} entries" for name, text in LENGTH_LIMITS.items()}
    texts = {**NUMBER_LIMITS, **lengths, "pattern": "matching {}"}
    return " and ".join(text.format(limits[name]).removeprefix("of ") for name, text in texts.items() if name in limits)


def metavar(kind: Any) -> str:
    """What stands for the value in `--help`: [a|b] for choices, else the type in capitals.

    >>> metavar(Literal["a", "b"] | None), metavar(float | Literal["auto"])
    ('[a|b]', 'NUMBER|[auto]')
    """
    kind = without_none(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is not Count and origin in (Union, types.UnionType):
        return "|".join(metavar(arg) for arg in args)
    if options := choices(kind):
        return f"[{'|'.join(map(str, options))}]"
    if origin is list or (origin is tuple and Ellipsis in args):
        return f"{metavar(args[0])}..."
    if origin is tuple:
        return ",".join("ABCDEFGH"[: len(args)])
    if origin is dict:
        return "KEY=VALUE,..."
    return {Count: "COUNT", bool: "BOOL", int: "INT", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def is_switch_word(text: str) -> bool:
    """Whether `text` is one of the spellings of on and off."""
    return text.strip().lower() in _SWITCH


def show(value: Any) -> str:
    """`value` as YAML would write it, cut to one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(str(value) if isinstance(value, Path) else value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, also inside `| None` and containers; empty for any other type."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return tuple(choice for arg in typing.get_args(kind) for choice in choices(arg))


def without_none(kind: Any) -> Any:
    """`X` for `X | None`, and `kind` itself otherwise."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind
    return Union[tuple(arg for arg in typing.get_args(kind) if arg is not type(None))]  # noqa: UP007 - built from a tuple


def takes_text(kind: Any) -> bool:
    """Whether any text is a valid value, so that no spelling may be given another meaning."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return any(takes_text(arg) for arg in typing.get_args(kind))
    return kind in (str, Path, Any)


def read_count(value: Any) -> int | float:
    """An int, or a float when fractional, from a number or text such as 10_000, 100M, 1.5B, 200*10^9, 1e9.

    Raises ValueError for anything else. The arithmetic is exact: 0.3M is 300000.

    >>> read_count("200*10^9"), read_count("1.5B"), read_count("0.25")
    (200000000000, 1500000000, 0.25)
    """
    if type(value) is int:
        return _read_int(value)
    total = Decimal(1)
    try:
        for part in _number_text(value).split("*"):
            match = _FACTOR.fullmatch(part.strip())
            if match is None:
                raise ValueError("not a count")
            number, power, suffix = match.groups()
            total *= Decimal(number.replace("_", "")) ** int(power or 1) * _SCALE[suffix.lower()]
    except ArithmeticError:
        raise ValueError("not a count") from None
    if abs(total) >= 10**27:  # beyond the 28 digits that Decimal keeps
        raise ValueError("too large for a count")
    return int(total) if total == total.to_integral_value() else float(total)


def _number_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number")
    # 2**9 and 2^9 mean the same, and only the latter survives splitting at the signs of multiplication
    return str(value).strip().replace("**", "^")


def _read_int(value: Any) -> int:
    if type(value) is int:
        if value.bit_length() > 1024:  # Python refuses to write much larger numbers
            raise ValueError("too large for a number")
        return value
    text = _number_text(value)
    try:
        return _read_int(int(text))
    except ValueError:
        number = read_count(value) if _PLAIN.fullmatch(text) else 0.5  # 1e9 and 1000.0 are whole numbers, too
    if isinstance(number, float):
        raise ValueError("not a whole number")
    return number


def _read_float(value: Any) -> float:
    return float(_number_text(value))


def _read_switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, int | str) or str(value).strip().lower() not in _SWITCH:
        raise ValueError("not a switch")
    return _SWITCH[str(value).strip().lower()]


def _read_text(value: Any) -> str:
    # `save_every: 1000` and `init: true` are a number and a truth value to YAML, and text to who wrote them, as on a command line
    if not isinstance(value, int | float | str):
        raise ValueError("not text")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text.encode()  # bytes of a command line that are not UTF-8 could not be written to any file later
    return text


def _read_path(value: Any) -> Path:
    if isinstance(value, Path):
        return value
    if isinstance(value, bool):
        raise ValueError("not a path")
    text = _read_text(value)
    # an empty text is an unset variable of some script, and Path("") would be the current folder
    if "\0" in text or not text:
        raise ValueError("not a path")
    return Path(text)


def _read_choice(value: Any, args: tuple[Any, ...]) -> Any:
    """The choice that equals `value` in type, too (1 is not true), or else the one that is written the same."""
    text = str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float | str) else None
    for arg in args:
        if type(arg) is type(value) and arg == value:
            return arg
    for arg in args:
        if text == (str(arg).lower() if isinstance(arg, bool) else str(arg)):
            return arg
    raise ValueError("not a choice")


def _read_list(value: Any, items: tuple[Any, ...]) -> Any:
    """One value stands for a list of one; text is cut at commas where the items cannot contain any."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        value = [] if value == "" else [value]
    if not isinstance(value, list | tuple):
        raise ValueError("not a list")
    if any(takes_text(item) or typing.get_origin(item) in (list, tuple, dict) for item in items):
        return list(value)
    return [part for item in value if item != "" for part in (item.split(",") if isinstance(item, str) else [item])]


def _read_mapping(value: Any) -> Any:
    """A mapping, or text such as a=0.3,b=0.7, or a list of such texts."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    pairs = [pair.partition("=") for text in value for pair in (text.split(",") if isinstance(text, str) else [""]) if text != ""]
    if any(not sign for _, sign, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError("not a mapping")
    return {name.strip(): text for name, _, text in pairs}


def _read_null(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("none", "null") else value


@functools.cache
def _adapter(kind: Any, limits: tuple[tuple[str, Any], ...]) -> TypeAdapter[Any]:
    return TypeAdapter(_checked(kind, dict(limits)))


def _checked(kind: Any, limits: Mapping[str, Any]) -> Any:
    """`kind` with its readers and limits in pydantic's terms; limits of numbers and patterns hold for each element of a container."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    number = {name: limits[name] for name in NUMBER_LIMITS if name in limits}
    length = {name: limits[name] for name in LENGTH_LIMITS if name in limits}
    inner = {name: limit for name, limit in limits.items() if name not in LENGTH_LIMITS}
    if kind is Count:
        return Annotated[int | float, Field(**number), BeforeValidator(read_count)]
    if origin is Literal:
        return Annotated[kind, BeforeValidator(lambda value: _read_choice(value, args))]
    if origin in (Union, types.UnionType):
        members = [_checked(arg, limits) for arg in args if arg is not type(None)]
        first = members[0] if len(members) == 1 else Annotated[Union[tuple(members)], Field(union_mode="left_to_right")]  # noqa: UP007
        if type(None) not in args:
            return first
        null = (lambda value: value) if takes_text(kind) else (lambda value: value if value in choices(kind) else _read_null(value))
        return Annotated[first | None, BeforeValidator(null)]
    if origin in (list, tuple):
        items = tuple(arg for arg in args if arg is not Ellipsis)
        whole = origin[tuple(_checked(arg, inner) if arg is not Ellipsis else arg for arg in args)]
        return Annotated[whole, Field(**length), BeforeValidator(lambda value: _read_list(value, items))]
    if origin is dict:
        return Annotated[dict[str, _checked(args[1], inner)], Field(**length), BeforeValidator(_read_mapping)]  # type: ignore[misc]
    readers = {bool: _read_switch, int: _read_int, float: _read_float, str: _read_text, Path: _read_path}
    fields = {
        int: number,
        float: {**number, "allow_inf_nan": False},
        str: {**length, **{k: v for k, v in limits.items() if k == "pattern"}},
    }
    return Annotated[kind, Field(**fields.get(kind, {})), BeforeValidator(readers[kind])] if kind in readers else kind


def _locate(kind: Any, limits: Mapping[str, Any], value: Any, path: str, entry: Any) -> Mistake:
    """Follow pydantic's location into lists and mappings, so that the message names the element that is wrong."""
    for step in entry["loc"]:
        kind = without_none(kind)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if entry["type"] == "missing":  # an element of a tuple that is not there
            break
        if origin in (list, tuple) and isinstance(step, int):
            kind, path = (args[0] if origin is list or args[-1] is Ellipsis else args[step]), f"{path}[{step}]"
        elif origin is dict and isinstance(step, str):
            kind, path = args[1], f"{path}.{step}"
        else:
            break
        limits = {name: limit for name, limit in limits.items() if name not in LENGTH_LIMITS}
        value = entry["input"]
    near = difflib.get_close_matches(value, map(str, choices(kind)), 1) if isinstance(value, str) else []
    return Mistake(path, value, describe(kind, limits), *near)


def _describe_many(origin: Any, args: tuple[Any, ...], limits: Mapping[str, Any]) -> str:
    inner = {name: limit for name, limit in limits.items() if name not in LENGTH_LIMITS}
    length = " and ".join(text.format(limits[name]) for name, text in LENGTH_LIMITS.items() if name in limits)
    size = f" of {length} entries" if length else ""
    if origin is dict:
        return f"a mapping{size} of names to values, each {describe(args[1], inner)}"
    if origin is tuple and Ellipsis not in args:
        letters = ",".join("ABCDEFGH"[: len(args)])
        return f"{len(args)} values {letters}, each {_or([*dict.fromkeys(describe(arg, inner) for arg in args)])}"
    return f"a list{size}, each {describe(args[0], inner)}"


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def scalar_types(kind: Any) -> Iterator[Any]:
    """The types of single values inside `kind`: the elements of containers and the members of unions."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is not Count and origin in (Union, types.UnionType, list, tuple, dict):
        for arg in args[1:] if origin is dict else args:
            yield from scalar_types(arg)
    elif kind not in (type(None), Ellipsis):
        yield kind

"""Values of every kind for options: those that a type accepts, and garbage."""

from __future__ import annotations

import types
import typing
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

from lm_core.config import Count
from lm_core.values import choices, without_none

TEXT = st.text(max_size=12) | st.sampled_from(
    [
        "off",
        "yes",
        "null",
        "~",
        "1e3",
        "0x10",
        "010",
        "1:30",
        "2026-11-21",
        "- a",
        "a: b",
        "#",
        "=",
        "<<",
        "'",
        "\n",
        " x ",
        "\x85",
        "1_000",
    ]
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 10**26) | st.floats(0, 1) | st.sampled_from([1e9, 2.5, 1e-300])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def valid(kind: Any, limits: typing.Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that an option of this type accepts."""
    if kind is not Count and type(None) in typing.get_args(kind):
        return st.none() | valid(without_none(kind), limits)
    if found := typing.get_origin(kind) is Literal and choices(kind):
        return st.sampled_from(found)
    low, high = limits.get("ge", limits.get("gt", -1e300)), limits.get("le", limits.get("lt", 1e300))
    within = lambda value: (value > low or "gt" not in limits) and (value < high or "lt" not in limits)  # noqa: E731
    if kind is Count:
        return COUNTS.filter(within)
    if kind == int | float:
        return (st.integers(1, 10**9) | st.floats(0.001, 0.999)).filter(within)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(valid(arg, limits) for arg in args))
    if origin is list:
        return st.lists(valid(args[0], limits), max_size=limits.get("max_length", 3))
    if origin is tuple:
        return (
            st.lists(valid(args[0], limits), max_size=3).map(tuple)
            if Ellipsis in args
            else st.tuples(*(valid(arg, limits) for arg in args))
        )
    if origin is dict:
        return st.dictionaries(TEXT, valid(args[1], limits), max_size=3)
    return {
        bool: st.booleans(),
        int: st.integers(int(max(low, -(10**30))), int(min(high, 10**30))).filter(within),
        float: st.floats(low, high, allow_nan=False).filter(within),
        str: TEXT.filter(lambda text: "pattern" not in limits or "!" not in text),
        Path: (TEXT.filter(lambda text: text and "\0" not in text)).map(Path),
        Any: JSON,
    }[kind]


GARBAGE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=3)
    | st.complex_numbers()
    | st.booleans().map(lambda _: 10**5000)
    | st.just("\ud800")
    | st.just(object())
    | st.just(Decimal("1e5"))
    | st.sampled_from(["9" * 5000, "1e999999999", "10^99*10^99^99", "0**0", "none", "1,2,,3", "a=1,a=2"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.frozensets(st.integers(), max_size=2)
    ),
    max_leaves=6,
)


def hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

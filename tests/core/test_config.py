"""lm_core.config: declarations, layers of values, mistakes, and the round trip through YAML."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.config import (
    Count,
    Mistakes,
    Switch,
    build,
    change,
    config,
    explicit,
    leaves,
    load,
    merge,
    opt,
    parse,
    section,
    to_dict,
    to_yaml,
)
from lm_core.errors import ConfigError
from lm_core.options import RunConfig
from lm_core.values import read, read_count
from tests.fuzz import GARBAGE, TEXT, hashable, valid


@config
class Optim:
    lr: float = opt(3e-4, "Peak learning rate.", flags=("-l", "--learning-rate"), gt=0)
    betas: tuple[float, float] = opt((0.9, 0.999), "Decay rates.", ge=0, lt=1)
    warmup: Count = opt(0, "Warm-up.", ge=0)

    def check(self) -> None:
        if self.warmup > 10**6:
            raise ConfigError(f"warmup: {self.warmup} is longer than any run; use less than 1M")


@config
class Teacher:
    teacher: str = opt(help="Teacher model.")
    depth: int = opt(2, "Layers.", ge=1)


@config
class Options:
    optim: Optim = section(Optim, lr=1e-3)
    teacher_model: Teacher = section(Teacher)
    name: str = opt("x", "Name.", pattern="^[^!]*$", max_length=20)
    mode: Literal["off", "on", "null", "1e3"] = opt("off", "Mode.")
    stage: Literal[0, 1, 2, 3] | None = opt(None, "Stage.")
    rank: int | float = opt(4, "A whole number, or a fraction of the width.", gt=0)
    limit: int | None = opt(None, "Limit.", ge=-5, le=5)
    note: str | None = opt(None, "Note.")
    folder: Path | None = opt(None, "Folder.")
    fast: bool = opt(False, "Fast.")
    slow: Switch | None = opt(None, "Slow, or decided later.")
    ratios: list[int] = opt([2], "Ratios.", ge=1, max_length=4)
    names: tuple[str, ...] = opt((), "Names.")
    weights: dict[str, float] = opt({}, "Weights.", ge=0)
    modules: dict[str, list[str]] = opt({}, "Modules by model.")
    extra: Any = opt(None, "Anything.")


GIVEN = {"teacher_model": {"teacher": "t"}}


def values(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    """Flat mappings of valid values that name every required option of `cls` and any of the others."""
    found = list(leaves(cls))
    required = {leaf.path: valid(leaf.type, leaf.limits) for leaf in found if leaf.default is dataclasses.MISSING}
    optional = {
        leaf.path: valid(leaf.type, leaf.limits)
        for leaf in found
        if leaf.default is not dataclasses.MISSING and leaf.path != "optim.warmup"
    }
    return st.fixed_dictionaries(required, optional=optional)


# RunConfig itself checks its parts against each other, which arbitrary values do not survive
@pytest.mark.parametrize("cls", [Options, *RunConfig.__bases__])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_yaml_and_json_reproduce_any_configuration(cls: type, data: st.DataObject) -> None:
    made = build(cls, data.draw(values(cls)))
    assert build(cls, parse(to_yaml(made))) == made
    assert build(cls, parse(json.dumps(to_dict(made)), as_json=True)) == made
    assert build(cls, to_dict(made)) == made == pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == dataclasses.replace(made)


@settings(max_examples=60, deadline=None)
@given(values(Options))
def test_what_differs_from_the_defaults_is_explicit_also_when_read_back(flat: dict[str, Any]) -> None:
    made = build(Options, flat)
    defaults = {leaf.path: leaf.default for leaf in leaves(Options)}
    again = build(Options, parse(to_yaml(made)))
    assert (
        explicit(again)
        == explicit(made)
        == {path for path in defaults if path == "teacher_model.teacher" or get(made, path) != defaults[path]}
    )


def get(made: Any, path: str) -> Any:
    for name in path.split("."):
        made = getattr(made, name)
    return made


@pytest.mark.parametrize("cls", [Options, RunConfig])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_garbage_is_refused_as_a_configuration_error(cls: type, data: st.DataObject) -> None:
    paths = [leaf.path for leaf in leaves(cls)] + ["optim", "teacher_model", "learning-rate", "nothing"]
    layer = data.draw(st.dictionaries(st.sampled_from(paths) | GARBAGE.filter(hashable), GARBAGE, max_size=4))
    try:
        made = build(cls, {"model": "m"} if cls is RunConfig else GIVEN, layer)
    except ConfigError as error:
        assert str(error).replace("\n", "").isprintable()  # noqa: PT017
    else:
        # what is accepted is in range, and survives being written
        assert all(
            read(leaf.type, leaf.limits, get(made, leaf.path), leaf.path) == (get(made, leaf.path), [])
            for leaf in leaves(cls)
            if leaf.type is not Any
        )
        to_yaml(made) if "extra" not in layer else None


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!<>|#'\"\\,?%@`\t\n 01.e~"), max_size=30) | st.text(max_size=20), st.booleans())
def test_any_text_is_a_mapping_or_a_configuration_error(text: str, as_json: bool) -> None:
    try:
        assert isinstance(parse(text, as_json=as_json), dict)
    except ConfigError as error:
        assert str(error).startswith("configuration: ")  # noqa: PT017


@pytest.mark.parametrize(
    "text",
    ["- 1", "3", "text", "a: 1\na: 2", "a: &x [*x]", "? [1, 2]\n: 3", "!!python/object:os.system {}", "!!int x: 1", "a: !!bool maybe", "a: !!timestamp x", "a: !!float ''", "a: " + "9" * 5000, "[" * 3000, "{a: " * 3000],
)  # fmt: skip
def test_malformed_yaml_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: "):
        parse(text, "here")


def test_malformed_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\n")
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    for name, why in [
        ("latin.yaml", "not UTF-8"),
        ("a.json", "a is given twice"),
        ("none.yaml", "No such file"),
        ("", "Is a directory"),
        ("\0", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=why):
            load(f"{tmp_path}/{name}")
    with pytest.raises(ConfigError, match="line 2"):
        parse("a: 1\nb: [")


def test_yaml_is_version_1_2(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "﻿lr: 3e-4\nwandb: off\nbit: true\noct: 010\nhex: 0x10\ntime: 1:30\nday: 2026-11-21\nbig: 1e9\nnothing: ~\nversion: 1.10.2\nneg: -7\ndot: .5\n",
        encoding="utf-8",
    )
    assert load(tmp_path / "a.yaml") == {
        "lr": 3e-4,
        "wandb": "off",
        "bit": True,
        "oct": "010",
        "hex": 16,
        "time": "1:30",
        "day": "2026-11-21",
        "big": 1e9,
        "nothing": None,
        "version": "1.10.2",
        "neg": -7,
        "dot": 0.5,
    }
    (tmp_path / "b.yaml").write_text("base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n")
    assert load(tmp_path / "b.yaml")["more"] == {"a": 1, "b": 3}
    (tmp_path / "c.yaml").write_text("")
    assert load(tmp_path / "c.yaml") == {}


@settings(deadline=None)
@given(st.dictionaries(TEXT, TEXT, max_size=4))
def test_written_yaml_is_read_alike_by_readers_of_version_1_1(texts: dict[str, str]) -> None:
    made = build(Options, GIVEN, {"extra": texts})
    assert yaml.safe_load(to_yaml(made))["extra"] == texts


@pytest.mark.parametrize(
    ("text", "number"),
    [("10_000", 10_000), ("100M", 10**8), ("1.5B", 1_500_000_000), ("200*10^9", 2 * 10**11), ("200 * 10**9", 2 * 10**11), ("1e9", 10**9), ("2k", 2000), ("3t", 3 * 10**12), ("2^10", 1024), ("0.3M", 300_000), ("0.25", 0.25), ("1e-3", 0.001), (0.1, 0.1), (1e9, 10**9), (7, 7), ("-1", -1), (" 5 ", 5), (".5k", 500)],
)  # fmt: skip
def test_counts(text: Any, number: float) -> None:
    assert read_count(text) == number
    assert type(read_count(text)) is type(number)


@pytest.mark.parametrize(
    "text", ["", "M", "1.5.2", "10 000", "1e", "ten", "1MM", "5%", True, None, "nan", "inf", [1], "1**", "*3", "1e99", "1k^2"]
)
def test_what_is_not_a_count(text: Any) -> None:
    with pytest.raises(ValueError, match=r"count|number"):
        read_count(text)


@given(st.integers(0, 10**14), st.sampled_from(["", "k", "m", "b", "K", "M", "B", "T", "t"]))
def test_counts_are_exact(digits: int, suffix: str) -> None:
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[suffix.lower()]
    assert read_count(f"{digits}{suffix}") == digits * scale
    assert read_count(f"{digits:_}*{scale}") == digits * scale
    assert read_count(f"{Decimal(digits) / 1000}{suffix}") == Decimal(digits) * scale / 1000 or suffix == ""


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "1e3", 1000), (int, "10_000", 10_000), (int, 1e9, 10**9), (int, "-3", -3), (int, " 7 ", 7), (int, "007", 7),
        (float, "3e-4", 3e-4), (float, 1, 1.0), (float, "1_0.5", 10.5),
        (str, 1000, "1000"), (str, 0.1, "0.1"), (str, "", ""), (str, True, "true"), (bool | str, "x", "x"), (bool | str, "on", True),
        (bool, "ON", True), (bool, 0, False), (bool, "no", False), (bool, "1", True),
        (Literal["4", "8"], 4, "4"), (Literal["true", "false"], True, "true"), (Literal[4, "none"], "4", 4), (Literal[1, "none"] | None, "none", "none"), (Literal[1] | None, "none", None),
        (int | None, "null", None), (int | str, "5", 5), (int | str, "5x", "5x"), (int | float, "0.5", 0.5), (str | None, "none", "none"), (Path | None, "null", Path("null")),
        (list[int], "2,4,8", [2, 4, 8]), (list[int], 5, [5]), (list[int], "", []), (list[int], ["2,4", 8], [2, 4, 8]), (list[str], "a,b", ["a,b"]), (list[Literal["a", "b"]], "a,b", ["a", "b"]), (list[int] | None, "none", None), (list[int] | None, "1,2", [1, 2]),
        (tuple[float, float], "0.9,0.95", (0.9, 0.95)), (tuple[float, float], [1, 2], (1.0, 2.0)), (tuple[int, ...], "1,2,3", (1, 2, 3)), (tuple[int, int] | None, "1,2", (1, 2)),
        (dict[str, float], "a=1,b=0.5", {"a": 1.0, "b": 0.5}), (dict[str, float], {"a": "1"}, {"a": 1.0}), (dict[str, list[int]], {"a": "1,2"}, {"a": [1, 2]}),
        (Count | None, "1k", 1000), (list[Count], "1k,2m", [1000, 2 * 10**6]),
    ],
)  # fmt: skip
def test_text_and_yaml_read_alike(kind: Any, value: Any, expected: Any) -> None:
    found, mistakes = read(kind, {}, value, "x")
    assert (found, type(found), mistakes) == (expected, type(expected), [])


@pytest.mark.parametrize(
    ("kind", "limits", "value", "message"),
    [
        (int, {}, "1.5", "x: '1.5' is wrong; give a whole number"),
        (int, {}, True, "x: true is wrong; give a whole number"),
        (int, {}, None, "x: null is wrong; give a whole number"),
        (int, {"ge": 1, "le": 8}, 9, "x: 9 is wrong; give a whole number of at least 1 and of at most 8"),
        (int, {"multiple_of": 16}, "24", "x: '24' is wrong; give a whole number divisible by 16"),
        (float, {}, "nan", "x: 'nan' is wrong; give a number"),
        (float, {}, float("inf"), "x: inf is wrong; give a number"),
        (float, {"gt": 0}, 0, "x: 0 is wrong; give a number above 0"),
        (Count, {"ge": 0}, "many", "x: 'many' is wrong; give a number such as 10_000, 100M or 200*10^9, of at least 0"),
        (bool, {}, 2, "x: 2 is wrong; give true or false"),
        (str, {}, None, "x: null is wrong; give text"),
        (Path, {}, True, "x: true is wrong; give a path"),
        (str, {}, ["a"], "x: ['a'] is wrong; give text"),
        (str, {"pattern": "^a"}, "b", "x: 'b' is wrong; give text that matches ^a"),
        (str, {}, "\udcff", "x: '\\udcff' is wrong; give text"),
        (Path, {}, "", "x: '' is wrong; give a path"),
        (Literal["cosine", "linear"], {}, "cosin", "x: 'cosin' is wrong; give cosine or linear; did you mean cosine?"),
        (Literal[0, 1, 2, 3] | None, {}, True, "x: true is wrong; give 0, 1, 2, 3 or null"),
        (int | None, {"ge": 1}, 0, "x: 0 is wrong; give a whole number of at least 1 or null"),
        (int | str, {}, None, "x: null is wrong; give a whole number or text"),
        (list[int], {"ge": 1}, [1, 0, "a"], "x[1]: 0 is wrong; give a whole number of at least 1"),
        (list[int], {"max_length": 2}, "1,2,3", "x: '1,2,3' is wrong; give a list of at most 2 entries, each a whole number"),
        (list[str], {}, {"a": 1}, "x: {'a': 1} is wrong; give a list, each text"),
        (tuple[float, float], {}, "1", "x: '1' is wrong; give 2 values A,B, each a number"),
        (tuple[float, float], {}, [1, 2, 3], "x: [1, 2, 3] is wrong; give 2 values A,B, each a number"),
        (tuple[float, float], {"lt": 1}, "0.5,2", "x[1]: 2.0 is wrong; give a number below 1"),
        (dict[str, float], {}, "a", "x: 'a' is wrong; give a mapping of names to values, each a number"),
        (dict[str, float], {}, {"a": "b"}, "x.a: 'b' is wrong; give a number"),
        (dict[str, list[int]], {}, {"a": [1, "b"]}, "x.a[1]: 'b' is wrong; give a whole number"),
    ],
)  # fmt: skip
def test_mistakes_name_path_value_and_way_out(kind: Any, limits: dict[str, Any], value: Any, message: str) -> None:
    found, mistakes = read(kind, limits, value, "x")
    assert found is None
    assert message in [str(mistake) for mistake in mistakes]


def test_keys_may_be_spelled_in_every_way() -> None:
    for lr in [
        {"optim": {"lr": 1}},
        {"optim.lr": 1},
        {"lr": 1},
        {"learning-rate": 1},
        {"learning_rate": 1},
        {"optim": {"learning-rate": 1}},
        {"optim.learning_rate": 1},
    ]:
        assert build(Options, GIVEN, lr).optim.lr == 1
    assert (
        build(Options, {"teacher-model": {"teacher": "t"}})
        == build(Options, {"teacher": "t"})
        == build(Options, {"teacher-model.teacher": "t", "optim": None})
    )
    assert build(Options, GIVEN, {"optim": Optim(lr=2)}).optim == Optim(lr=2)


def test_later_layers_win_whatever_their_spelling() -> None:
    layers = [{"learning-rate": 1, "rank": 2}, {"optim": {"lr": 2}}, {"lr": 3, "name": "a"}]
    assert merge(Options, *layers) == {"optim.lr": 3, "rank": 2, "name": "a"}
    made = build(Options, GIVEN, *layers, given=[{"optim.lr": 4}, {"learning_rate": 5}])
    assert (made.optim.lr, made.rank, made.name) == (5, 2, "a")


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(Mistakes) as caught:
        build(
            Options,
            {"optm": {"lr": 1}, "optim": {"lrr": 1, "lr": -1, "learning_rate": 2}, "stage": 7, "teacher-model": 3, 5: 6, "fast": "maybe"},
        )
    assert set(caught.value.mistakes) == {
        "optm: is not an option; did you mean optim.lr?",
        "optim.lrr: is not an option; did you mean optim.lr?",
        "optim.learning_rate: optim.lr is given twice; keep one",
        "optim.lr: -1 is wrong; give a number above 0",
        "teacher_model: 3 is not a section; write its options below it",
        "5: is not an option; --help lists them all",
        "stage: 7 is wrong; give 0, 1, 2, 3 or null",
        "fast: 'maybe' is wrong; give true or false",
        "teacher_model.teacher: is required; give text with --teacher or in a configuration file",
    }


def test_mistakes_travel_between_processes() -> None:
    error = Mistakes(["a: is wrong", "b: is wrong\n\ud800"])
    again = pickle.loads(pickle.dumps(error))
    assert (again.mistakes, str(again)) == (error.mistakes, str(error)) == (("a: is wrong", r"b: is wrong\n\ud800"), str(error))


def test_aliases_are_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lm_core"):
        build(Options, GIVEN, {"learning-rate": 1}, {"learning-rate": 2}, {"optim.lr": 3})
    assert [record.getMessage() for record in caplog.records] == ["learning_rate: read as optim.lr"]


def test_named_on_the_command_line_is_explicit_even_if_equal_to_the_default() -> None:
    made = build(Options, GIVEN, {"rank": 4}, given=[{"name": "x"}, {"learning-rate": 1e-3}])
    assert explicit(made) == {"teacher_model.teacher", "name", "optim.lr"}
    assert explicit(made.optim) == {"lr"}
    assert explicit(pickle.loads(pickle.dumps(made))) == explicit(made)
    assert made == build(Options, GIVEN)
    assert "_given" not in repr(made) + to_yaml(made)


def test_values_are_checked_and_read_however_a_configuration_is_made() -> None:
    made = Optim(lr="1e-2", betas=[0.1, 0.2], warmup="1k")  # type: ignore[arg-type]
    assert made == Optim(lr=1e-2, betas=(0.1, 0.2), warmup=1000)
    with pytest.raises(Mistakes, match=r"lr: 0 is wrong(.|\n)*betas\[0\]: 1.0 is wrong"):
        Optim(lr=0, betas=(1, 0))
    with pytest.raises(Mistakes, match="optim: 3 is not a section; give a Optim"):
        Options(optim=3, teacher_model=Teacher(teacher="t"))  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.lr = 3  # type: ignore[misc]


def test_defaults_of_lists_are_not_shared() -> None:
    one, two = build(Options, GIVEN), build(Options, GIVEN)
    one.ratios.append(3)
    assert two.ratios == build(Options, GIVEN).ratios == [2]


# inheritance


@config
class Base:
    size: int = opt(1, "Size.", ge=1)
    rate: float = opt(0.5, "Rate.", flags=("-r", "--old-rate"), gt=0, lt=1)

    def check(self) -> None:
        if self.size == 13:
            raise ConfigError("size: 13 brings bad luck; use 14")


@config
class Plain(Base):
    more: int = opt(2, "More.")


@config
class Bigger(Base):
    size: int = change(Base, "size", default=8, ge=None, le=100)
    rate: float = change(Base, "rate", help="Other rate.", flags=("--new-rate", "-r"))

    def check(self) -> None:
        if self.rate > 0.9:
            raise ConfigError(f"rate: {self.rate} is too fast; use at most 0.9")


@config
class Joined(Plain, Bigger):
    """Python's order of bases: Joined, Plain, Bigger, Base."""


def test_options_follow_the_order_of_bases_as_attributes_do() -> None:
    # plain dataclasses would take Plain's inherited `size`, although Joined.size is Bigger's everywhere else in Python
    assert Joined() == Joined(size=8, rate=0.5, more=2)
    assert [leaf.path for leaf in leaves(Joined)] == ["size", "rate", "more"]
    assert [leaf.path for leaf in leaves(RunConfig)][:3] == ["model", "tokenizer", "gradient_checkpointing"]


@config
class Outer:
    part: Base = section(Base)


@config
class Tuned(Outer):
    part: Base = section(Base, size=5)


@config
class Aside(Outer):
    pass


@config
class Both(Aside, Tuned):
    pass


def test_sections_follow_the_order_of_bases_too() -> None:
    assert Both().part == build(Both).part == Base(size=5)
    assert build(Both, {"rate": 0.25}).part == Base(size=5, rate=0.25)
    assert {leaf.path: leaf.default for leaf in leaves(Both)} == {"part.size": 5, "part.rate": 0.5}
    assert explicit(Both()) == frozenset()


class Method(Base):
    """A plain subclass, for methods only."""

    def double(self) -> int:
        return 2 * self.size


def test_a_plain_subclass_may_add_methods() -> None:
    assert build(Method, {"size": "4"}).double() == 8


def test_change_keeps_what_it_is_not_told() -> None:
    size, rate = leaves(Bigger)
    assert (size.default, size.help, size.limits) == (8, "Size.", {"le": 100})
    assert (rate.default, rate.help, rate.flags, rate.limits) == (
        0.5,
        "Other rate.",
        ("-r", "--old-rate", "--new-rate"),
        {"gt": 0, "lt": 1},
    )


def test_checks_of_all_bases_are_called() -> None:
    with pytest.raises(Mistakes) as caught:
        Joined(size=13, rate=0.95)
    assert caught.value.mistakes == ("size: 13 brings bad luck; use 14", "rate: 0.95 is too fast; use at most 0.9")
    with pytest.raises(Mistakes, match="longer than any run"):
        build(Options, GIVEN, {"warmup": "2M"})


def test_wrong_declarations_fail_at_import() -> None:
    with pytest.raises(TypeError, match="other and size both claim -s"):

        @config
        class _Twice:
            size: int = opt(1, "Size.", flags=("-s",))
            other: int = opt(1, "Other.", flags=("-s",))

    with pytest.raises(TypeError, match=r"part\.size and size both claim --size"):

        @config
        class _Flat:
            size: int = opt(1, "Size.")
            part: Base = section(Base)

    with pytest.raises(TypeError, match="both claim --no-fast"):

        @config
        class _Negated:
            fast: bool = opt(True, "Fast.")
            slow: bool = opt(True, "Slow.", flags=("--no_fast",))

    for kind, limits, message in [
        (set, {}, "not supported"),
        (int, {"pattern": "x"}, "cannot limit"),
        (str, {"gt": 1}, "cannot limit"),
        (int, {"bigger": 1}, "cannot limit"),
        (bool, {"ge": 0}, "cannot limit"),
        (int, {"max_length": 1}, "cannot limit"),
    ]:
        with pytest.raises(TypeError, match=message):
            config(type("_Wrong", (), {"__annotations__": {"x": kind}, "x": opt(None, "X.", **limits), "__module__": __name__}))
    with pytest.raises(TypeError, match=r"declare it with opt"):
        config(type("_Bare", (), {"__annotations__": {"x": int}, "x": 3, "__module__": __name__}))
    with pytest.raises(TypeError, match=r"declare it with section\(...\) and its own options"):
        config(type("_Part", (), {"__annotations__": {"x": Base}, "x": section(Base, sise=1), "__module__": __name__}))
    for kind, default in [(int, None), (int, "1k"), (Path, "x"), (Literal["a"], "b"), (list[int], ["1"])]:
        with pytest.raises(TypeError, match=r"the default .* is not"):
            config(type("_Default", (), {"__annotations__": {"x": kind}, "x": opt(default, "X."), "__module__": __name__}))
    with pytest.raises(TypeError, match=r"part\.size: the default 0 is not a whole number of at least 1"):
        config(type("_Changed", (), {"__annotations__": {"part": Base}, "part": section(Base, size=0), "__module__": __name__}))
    with pytest.raises(TypeError, match="is not a flag"):
        config(type("_Flag", (), {"__annotations__": {"x": int}, "x": opt(1, "X.", flags=("old",)), "__module__": __name__}))

"""Whatever is typed into a command or lies in a data file ends in a configuration, in rows, or in one clear error: never in a traceback."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_core.config import Leaf, build, leaves, merge
from lm_core.data.sources import read
from lm_core.errors import ConfigError, InputError, UserError
from lm_core.options import RunConfig
from lm_core.reference import commands
from tests.fuzz import GARBAGE, valid
from tests.repo import readers

CLASSES: dict[str, Any] = {name: cls for name, cls in commands() if list(leaves(cls))}
# and those that no command takes, such as the settings that a model keeps; bases and sections are drawn with what they belong to
PARTS = {kind for cls in CLASSES.values() for kind in (*cls.__mro__, *cls._types.values()) if isinstance(kind, type)}
CLASSES |= {f"{cls.__module__}.{cls.__name__}": cls for cls in readers.classes() if cls not in PARTS and list(leaves(cls))}

EDGES = st.sampled_from(
    [0, -1, 1, 0.5, 1e-300, 1e300, float("inf"), float("nan"), 2**63, 10**30, "", " ", "-", "0", "a=1", "/dev/null", "."]
)


def anything(leaf: Leaf) -> st.SearchStrategy[Any]:
    return valid(leaf.type, leaf.limits) | EDGES | GARBAGE


# the same values every time, so that CI judges the change and not the draw
@pytest.mark.parametrize("command", CLASSES)
@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_options_make_a_configuration_or_one_error(command: str, data: st.DataObject) -> None:
    cls = CLASSES[command]
    options = list(leaves(cls))
    chosen = data.draw(st.lists(st.sampled_from(options), max_size=5, unique_by=lambda leaf: leaf.path))
    required = {leaf.path: data.draw(valid(leaf.type, leaf.limits)) for leaf in options if leaf.default is dataclasses.MISSING}
    configuration_or_one_error(cls, required | {leaf.path: data.draw(anything(leaf)) for leaf in chosen})


def configuration_or_one_error(cls: Any, layer: dict[str, Any]) -> None:
    try:
        further = cls.further_layers(merge(cls, layer)) if hasattr(cls, "further_layers") else []
        made = build(cls, *further, given=[layer])
        if isinstance(made, RunConfig):
            made.limits()
            made.run_folder()
    except ConfigError as error:
        assert str(error).replace("\n", "").isprintable()  # noqa: PT017


# too long for a number, for a file's name, and of no type that an option has; a draw meets them too seldom
AWKWARD = (10**5000, "9" * 5000, [10**5000], {"a": 10**5000}, "\ud800", float("nan"))


@pytest.mark.parametrize("command", CLASSES)
@settings(max_examples=1, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_option_takes_an_awkward_value_or_refuses_it(command: str, data: st.DataObject) -> None:
    cls = CLASSES[command]
    options = list(leaves(cls))
    required = {leaf.path: data.draw(valid(leaf.type, leaf.limits)) for leaf in options if leaf.default is dataclasses.MISSING}
    for leaf in options:
        for value in AWKWARD:
            configuration_or_one_error(cls, required | {leaf.path: value})


LINES = st.lists(
    st.sampled_from(
        [
            b'{"text": "a"}',
            b'{"text": 1}',
            b"{}",
            b"[1]",
            b"null",
            b"1e999",
            b"{",
            b'"\\ud800"',
            b'a,"b',
            b"text,b",
            b"1,2",
            b"\xff\xfe",
            b"\0",
        ]
    )
    | st.binary(max_size=12),
    max_size=5,
).map(b"\n".join)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=LINES | st.binary(max_size=60).map(lambda tail: b"PAR1" + tail + b"PAR1") | st.just(json.dumps([[]] * 3).encode()))
def test_files_give_rows_or_one_error(suffix: str, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path: Path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        assert all(isinstance(row.fields, dict) for row in read(path))
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017


def safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = st.dictionaries(st.sampled_from(["act", "layers.0.up_proj", "centres", "gate", "x"]), st.just(TENSOR), max_size=1).flatmap(
    lambda tensors: st.sampled_from([{}, {"__metadata__": {"split": "{}", "gate": "{}", "beacon": "[]"}}]).map(lambda more: tensors | more)
)
FILES = (
    LINES
    | st.builds(safetensors, HEADERS.map(lambda header: json.dumps(header).encode()), st.binary(max_size=8) | st.just(bytes(8)))
    | st.binary(max_size=40).map(lambda tail: b"MMIDIDX\0\0" + struct.pack("<QB", 1, 4) + tail)
    | st.sampled_from(
        [b"[]", b"[[1]]", b"[1, null]", b'{"messages": 1}', b'[{"role": 1}]', b'{"step": 1}', b"[" * 5000, b'"1.0 x" "y z"', b"- a"]
    )
)


@pytest.mark.parametrize("reader", readers.FUZZED)
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=FILES)
def test_other_files_are_read_or_refused_by_one_error(reader: str, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.getbasetemp() / reader
    folder.mkdir(exist_ok=True)
    (folder / "fuzz").write_bytes(content)
    try:
        readers.FUZZED[reader](folder / "fuzz")
    except UserError as error:
        assert str(error).replace("\n", "").isprintable()  # noqa: PT017


def test_no_reader_goes_without_this() -> None:
    """A new function that opens a user's file belongs to readers.FUZZED, or to ELSEWHERE with the reason."""
    assert sorted({*readers.FUZZED, *(name for names in readers.ELSEWHERE.values() for name in names)}) == sorted(set(readers.found()))

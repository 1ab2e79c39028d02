"""From data arguments to rows: splits, names, weights and packing as the options say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_core.data import build_data
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError

BYTES = byte_tokenizer()
PACKINGS = pytest.mark.parametrize("packing", ["stream", "best-fit", "document"])


def corpus(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts(rows) -> str:
    return "".join(BYTES.decode(rows[k]["input_ids"].tolist()) for k in range(len(rows)))


@PACKINGS
def test_python_docs_train_and_held_out_share_no_document(options, packing: str) -> None:
    from pydoc_data.topics import topics

    data = build_data(options(data=["builtin:python-docs"], packing=packing, max_length=100_000, shuffle=False), BYTES)
    train, valid = data.train["python-docs"], data.valid["python-docs"]
    held = set(texts(valid).split("<eos>")) - {""}
    kept = set(texts(train).split("<eos>")) - {""}
    assert held
    # a stream leaves out the tokens behind its last whole sample
    assert held | kept == set(topics.values()) or packing == "stream"
    assert not held & kept
    # about a twentieth
    assert 0.01 < valid.source.tokens / (train.source.tokens + valid.source.tokens) < 0.2


@pytest.mark.parametrize("max_length", [2, 64, 1 << 20])
@PACKINGS
def test_held_out_rows_are_never_missing(options, packing: str, max_length: int) -> None:
    data = build_data(options(data=["builtin:python-docs"], packing=packing, max_length=max_length), BYTES)
    assert len(data.valid["python-docs"]) > 0
    assert len(data.train["python-docs"]) > 0


def test_hold_out_does_not_move_the_split_of_built_in_sources(options) -> None:
    splits = [build_data(options(data=["synthetic:copy"], hold_out=fraction), BYTES) for fraction in (0.05, 0.5, 0.0)]
    assert len({data.train["copy"].fingerprint for data in splits}) == 1
    assert splits[0].valid["copy"].fingerprint == splits[1].valid["copy"].fingerprint
    assert splits[2].valid == {}


def test_other_sources_hold_out_their_fraction(options, tmp_path: Path) -> None:
    path = corpus(tmp_path / "x.jsonl", [f"document {n}" for n in range(400)])
    halves = build_data(options(data=[path], hold_out=0.5, packing="document"), BYTES)
    assert len(halves.train["x"]) + len(halves.valid["x"]) == 400
    assert 150 < len(halves.valid["x"]) < 250
    whole = build_data(options(data=[path], hold_out=0.0, packing="document"), BYTES)
    assert (len(whole.train["x"]), whole.valid) == (400, {})


def test_separate_held_out_data_leave_the_training_data_whole(options, tmp_path: Path) -> None:
    path = corpus(tmp_path / "x.jsonl", [f"document {n}" for n in range(40)])
    data = build_data(options(data=[path], eval_data=["builtin:python-docs", path, "synthetic:copy[7]"], packing="document"), BYTES)
    assert len(data.train["x"]) == 40
    docs = build_data(options(data=["builtin:python-docs"], packing="document"), BYTES)
    assert {name: len(rows) for name, rows in data.valid.items()} == {"python-docs": len(docs.valid["python-docs"]), "x": 40, "copy": 7}


def test_a_count_takes_so_many_training_documents(options) -> None:
    data = build_data(options(data=["builtin:python-docs[8]"], packing="document"), BYTES)
    assert len(data.train["python-docs"]) == 8
    assert len(data.valid["python-docs"]) == len(
        build_data(options(data=["builtin:python-docs"], packing="document"), BYTES).valid["python-docs"]
    )


def test_names_that_occur_again_get_a_number(options, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = corpus(tmp_path / "x.jsonl", ["one"] * 9), corpus(tmp_path / "other" / "x.jsonl", ["two"] * 9)
    assert list(build_data(options(data=[first, second, first]), BYTES).train) == ["x", "x-2", "x-3"]


def test_weights_are_those_given_or_the_sizes(options) -> None:
    plain = build_data(options(data=["synthetic:copy", "builtin:python-docs"]), BYTES)
    assert plain.weights == {name: len(rows) for name, rows in plain.train.items()}
    assert build_data(options(data=["synthetic:copy@0.3", "builtin:python-docs@2"]), BYTES).weights == {"copy": 0.3, "python-docs": 2.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": []}, "give --data"),
        ({"data": ["synthetic:copy@1", "synthetic:recall"]}, "recall has no weight, but copy has"),
        ({"data": ["synthetic:copy@0"]}, "all weights are 0"),
        ({"data": ["synthetic:copy"], "eval_data": ["synthetic:recall@1"]}, "take no weight"),
    ],
)
def test_arguments_that_contradict_are_refused(options, values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_data(options(**values), BYTES)


def test_too_little_text_to_hold_any_out_is_refused(options, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only 2 tokens, too few to hold any out"):
        build_data(options(data=[corpus(tmp_path / "x.jsonl", ["a"])]), BYTES)


def test_a_single_text_file_holds_out_its_end(options, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("0123456789" * 10)
    data = build_data(options(data=[str(tmp_path / "x.txt")], hold_out=0.2, max_length=10), BYTES)
    assert len(data.train["x"]) == 8
    assert texts(data.valid["x"]) == "123456789" + "0123456789" + "<eos>"


def test_padding_uses_the_tokenizers_pad_or_end_token(options) -> None:
    rows = build_data(options(data=["synthetic:recall"], packing="best-fit", max_length=200), BYTES).train["recall"]
    assert rows.collate([{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1, 2]}])["input_ids"].tolist() == [
        [1, 256],
        [1, 2],
    ]

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lm_core.data import synthetic
from lm_core.data.sources import Argument, parse, resolve
from lm_core.errors import ConfigError, InputError


def rows(path: Path | str) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in resolve(Argument(str(path))).rows()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("builtin:python-docs", Argument("builtin:python-docs")),
        ("builtin:python-docs[8]", Argument("builtin:python-docs", samples=8)),
        ("synthetic:copy@0.3", Argument("synthetic:copy", weight=0.3)),
        ("allenai/c4:en[10k]@2", Argument("allenai/c4:en", samples=10_000, weight=2.0)),
        ("user@host/x.txt", Argument("user@host/x.txt")),
    ],
)
def test_arguments_are_taken_apart(text: str, expected: Argument) -> None:
    assert parse(text) == expected


def test_an_existing_path_is_never_taken_apart(tmp_path: Path) -> None:
    path = tmp_path / "odd[3]@2"
    path.touch()
    assert parse(str(path)) == Argument(str(path))


@pytest.mark.parametrize("text", ["x[0]", "x[many]", "x[1.5]", "x@much", "x@-1", "x@nan", "", "  ", "[3]"])
def test_arguments_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="data: "):
        parse(text)


@pytest.mark.parametrize(
    ("source", "name"),
    [("builtin:stdlib", "stdlib"), ("synthetic:markov", "markov"), ("a/b/corpus.jsonl.gz", "corpus"), ("allenai/c4:en", "c4")],
)
def test_sources_are_named_by_their_last_part(source: str, name: str) -> None:
    assert Argument(source).name == name


def test_a_file_is_named_without_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl.gz").touch()
    assert Argument(str(tmp_path / "corpus.jsonl.gz")).name == "corpus"
    assert Argument(str(tmp_path)).name == tmp_path.name


def test_python_docs_are_the_topics_of_pydoc() -> None:
    from pydoc_data.topics import topics

    found = rows("builtin:python-docs")
    assert {row["title"]: row["text"] for row in found} == topics
    assert [row["title"] for row in found] == sorted(topics)


def test_the_standard_library_comes_in_a_fixed_order_and_without_tests() -> None:
    corpus = resolve(Argument("builtin:stdlib"))
    titles = [row.fields["title"] for row in corpus.rows()]
    assert titles == [row.fields["title"] for row in resolve(Argument("builtin:stdlib")).rows()]
    assert "argparse.py" in titles
    assert "json/decoder.py" in titles
    assert not [title for title in titles if "test" in title.split("/")[:-1]]
    assert len(titles) > 300


@pytest.mark.parametrize("name", synthetic.CORPORA)
def test_synthetic_corpora_are_deterministic_and_do_not_repeat(name: str) -> None:
    first, second = list(synthetic.CORPORA[name]()), list(synthetic.CORPORA[name]())
    assert first == second
    assert len(set(first)) == len(first) == synthetic.DOCUMENTS


def test_copies_and_recalled_values_are_right() -> None:
    for line in next(synthetic.copy()).splitlines():
        assert len(set(line.split("|"))) == 1
    pairs, answers = next(synthetic.recall()).splitlines()
    values = dict(pair.split("=") for pair in pairs.split())
    assert dict(answer.split(">") for answer in answers.split()) == values
    assert len(values) == 8


ENTRIES = [{"text": "one\ntwo"}, {"text": "three, four"}, {"text": "naïve"}]


def test_every_kind_of_file_gives_its_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(entry) + "\n" for entry in ENTRIES)
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "c.json").write_text(json.dumps(ENTRIES))
    (tmp_path / "d.json").write_text(lines)
    with open(tmp_path / "e.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["text"])
        table.writeheader()
        table.writerows(ENTRIES)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ENTRIES), tmp_path / "f.parquet")
    datasets.Dataset.from_list(ENTRIES).save_to_disk(str(tmp_path / "g"))
    for name in ["a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.csv", "f.parquet", "g"]:
        assert rows(tmp_path / name) == ENTRIES, name
    (tmp_path / "h.txt").write_text("one\ntwo")
    assert rows(tmp_path / "h.txt") == ENTRIES[:1]


def test_a_folder_gives_the_rows_of_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ["b.txt", "a.txt", "sub/c.txt", "notes.md"]:
        (tmp_path / name).write_text(name)
    assert rows(tmp_path) == [{"text": "a.txt"}, {"text": "b.txt"}, {"text": "sub/c.txt"}]


def test_a_long_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_core.data import sources

    monkeypatch.setattr(sources, "_TEXT_PIECE", 10)
    path = tmp_path / "long.txt"
    path.write_text("12345\n67890\nabc\ndefghijklmnop\nq")
    found = list(resolve(Argument(str(path))).rows())
    assert [row.fields["text"] for row in found] == ["12345\n67890\n", "abc\ndefghijklmnop\n", "q"]
    assert [row.where for row in found] == [f"{path}:1", f"{path}:3", f"{path}:5"]


def test_a_saved_dataset_holds_out_its_validation_split(tmp_path: Path) -> None:
    import datasets

    parts = {"train": datasets.Dataset.from_list(ENTRIES[:2]), "validation": datasets.Dataset.from_list(ENTRIES[2:])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    corpus = resolve(Argument(str(tmp_path / "both")))
    assert [dict(row.fields) for row in corpus.rows()] == ENTRIES[:2]
    assert corpus.valid is not None
    assert [dict(row.fields) for row in corpus.valid.rows()] == ENTRIES[2:]


def test_hub_datasets_are_streamed_up_to_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def stream(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return ({"text": f"{split} {n}"} for n in range(10**9))

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", stream)
    corpus = resolve(parse("owner/name:en[3]"))
    assert [row.fields["text"] for row in corpus.rows()] == ["train 0", "train 1", "train 2"]
    assert corpus.valid is not None
    assert next(corpus.valid.rows()).fields["text"] == "validation 0"
    assert asked == [("owner/name", "en", "train", True), ("owner/name", "en", "validation", True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r":2 is not valid JSON \(.*\); correct or remove the line"),
        (b'{"text": "a"}\n\n[1]\n', ":3 is a list, not an object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "is not UTF-8 text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=f"bad.jsonl.*{message}"):
        rows(tmp_path / "bad.jsonl")


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[{]")
    (tmp_path / "bad.csv").write_text("text,other\na,b\nc\n")
    (tmp_path / "bad.parquet").write_text("not parquet")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (tmp_path / "bad.docx").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    expected = {
        "bad.json": "not valid JSON", "bad.csv": "bad.csv:3 has not the 2 cells", "bad.parquet": "not a readable parquet file",
        "bad.jsonl.gz": "cannot be read", "bad.docx": "unknown kind; use .txt", "empty": "holds no .txt", "saved": "cannot be loaded",
        "missing.txt": "does not exist", "missing/folder/": "does not exist",
    }  # fmt: skip
    for name, message in expected.items():
        with pytest.raises(InputError, match=message):
            rows(f"{tmp_path}/{name}")


def test_what_is_not_built_in_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose builtin:python-docs or builtin:stdlib"):
        rows("builtin:nothing")
    with pytest.raises(ConfigError, match="choose synthetic:markov"):
        rows("synthetic:nothing")


def test_a_hub_name_without_a_network_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"'nobody/nothing' is no file or folder here.*use a local file.*builtin:python-docs"):
        rows("nobody/nothing")

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from lm_core.data import tokenize
from lm_core.data.shards import Document, ShardWriter, Source
from lm_core.data.sources import Argument, Row, parse, resolve
from lm_core.data.tokenize import TextEncoder, open_corpus, write_rows
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import InputError

BYTES = byte_tokenizer()
TEXTS = [f"text {n} " * (n % 7) for n in range(300)]


def jsonl(path: Path, entries: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def opened(argument: str, **options) -> Source:
    return open_corpus(resolve(parse(argument)), BYTES, **options)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_documents_end_with_the_end_token_and_empty_rows_are_left_out(tmp_path: Path) -> None:
    source = opened(jsonl(tmp_path / "x.jsonl", [{"text": "ab"}, {"text": ""}, {"text": None}, {"text": "é"}]))
    assert [ids.tolist() for ids in source] == [[97, 98, 258], [195, 169, 258]]


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    assert opened(jsonl(tmp_path / "x.jsonl", [{"content": "ab"}]), text_column="content")[0].tolist() == [97, 98, 258]


def test_rows_of_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    source = opened(jsonl(tmp_path / "x.jsonl", [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [], "labels": []}]))
    assert [ids.tolist() for ids in source] == [[5, 6, 7]]
    assert source.labels(0, 0, 3).tolist() == [-100, -100, 7]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"text": "a"}, {"body": "b"}], r"x.jsonl:2 has no field 'text' \(found: body\); name the field with --text-column"),
        ([{"text": "a"}, {"text": 3}], "x.jsonl:2: text is a int, not a text"),
        ([{"input_ids": [1]}, {"input_ids": [1, 259]}], "x.jsonl:2: input_ids: 259 is outside the vocabulary of 259"),
        ([{"input_ids": [1.5]}], "x.jsonl:1: input_ids is not a list of whole numbers"),
        ([{"input_ids": [[1], [2, 3]]}], "x.jsonl:1: input_ids is not a list of whole numbers"),
        ([{"input_ids": [1], "labels": [1, 2]}], "x.jsonl:1: labels: 2 labels for 1 input_ids"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "x.jsonl:2: labels: some rows have them"),
        ([{"text": ""}], "holds no document with text"),
        ([], "holds no document with text"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, entries: Sequence[object], message: str) -> None:
    with pytest.raises(InputError, match=f"^data: .*{message}"):
        opened(jsonl(tmp_path / "x.jsonl", entries))


def test_a_corpus_is_tokenised_once_until_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "ab"}])
    first = opened(path).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "write_rows", None)
        assert opened(path).fingerprint == first
    jsonl(tmp_path / "x.jsonl", [{"text": "ac"}])
    os.utime(path, ns=(1, 1))
    assert opened(path).fingerprint != first


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    rows = [Row("x", number, {"text": text}) for number, text in enumerate(TEXTS)]
    for workers in (1, 2):
        with ShardWriter(tmp_path / str(workers), vocab_size=len(BYTES), shard_tokens=1500) as writer:
            assert write_rows(writer, rows, TextEncoder(BYTES, "text"), workers=workers) == TEXTS.count("")
            writer.close()
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")
    assert len(list((tmp_path / "1").glob("*.bin"))) > 2


def test_an_interrupted_corpus_goes_on_and_ends_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": text} for text in TEXTS])
    writer, encode, calls = ShardWriter.__init__, TextEncoder.__call__, []
    monkeypatch.setattr(ShardWriter, "__init__", lambda self, folder, **options: writer(self, folder, **options, shard_tokens=1500))

    def stop_at_third(self: TextEncoder, rows: Sequence[Row]) -> list[Document | None]:
        calls.append(rows[0].number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "__call__", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            opened(path)
        opened(path)
    assert calls == [1, 65, 129, 129, 193, 257]
    monkeypatch.setenv("LM_CORE_CACHE", str(tmp_path / "other"))
    opened(path)
    (one,), (two,) = (
        [folder for folder in (cache / "shards").iterdir() if not folder.name.startswith(".")] for cache in (own_cache, tmp_path / "other")
    )
    assert folder_bytes(one) == folder_bytes(two)


def test_the_documented_way_to_write_shards_works(tmp_path: Path) -> None:
    document = Path(__file__).parents[3] / "docs" / "data-format.md"
    (code,) = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    exec(code, {"folder": tmp_path, "tokenizer": BYTES, "texts": ["ab", "c"]})
    assert [ids.tolist() for ids in opened(str(tmp_path))] == [[97, 98], [99]]


class _Ids:
    """An encoder of a package: labels for the second half of every row."""

    def __call__(self, rows: Sequence[Row]) -> list[Document | None]:
        return [Document([1, 2, 3, 4], [-100, -100, 3, 4], row.number) for row in rows]


def test_a_package_can_bring_its_own_encoder(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, vocab_size=10, labels=True) as writer:
        write_rows(writer, [Row("x", 1, {})], _Ids())
        writer.close()
    assert Source.open(tmp_path).labels(0, 0, 4).tolist() == [-100, -100, 3, 4]


def test_shards_are_a_source_for_the_tokenizer_that_made_them(tmp_path: Path) -> None:
    from lm_core.data.vocab import fingerprint, train_bpe

    def write(name: str, vocab_size: int, **meta: str) -> str:
        with ShardWriter(tmp_path / name, vocab_size=vocab_size) as writer:
            writer.add(Document([1, 2], None, 0))
            writer.close(**meta)
        return str(tmp_path / name)

    assert opened(write("own", 259, tokenizer_sha256=fingerprint(BYTES)))[0].tolist() == [1, 2]
    assert opened(write("unsigned", 200))[0].tolist() == [1, 2]
    with pytest.raises(InputError, match="another tokenizer"):
        opened(write("other", 259, tokenizer_sha256=fingerprint(train_bpe(["text"], 260))))
    with pytest.raises(InputError, match="made for 300 ids, the tokenizer 259"):
        opened(write("large", 300))


def test_built_in_text_is_tokenised_whole() -> None:
    from pydoc_data.topics import topics

    source = open_corpus(resolve(Argument("builtin:python-docs")), BYTES)
    assert source.tokens == sum(len(text.encode()) + 1 for text in topics.values())

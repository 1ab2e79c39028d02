from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_core.data.shards import Document, ShardWriter, Source
from lm_core.errors import ConfigError, InputError

DOCUMENTS = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=9), min_size=1, max_size=20)


def write(folder: Path, documents: list[list[int]], *, vocab_size: int = 300, shard_tokens: int = 10) -> Source:
    with ShardWriter(folder, vocab_size=vocab_size, shard_tokens=shard_tokens) as writer:
        for number, ids in enumerate(documents):
            writer.add(Document(ids, None, number))
            writer.mark(1)
        writer.close()
    return Source.open(folder)


@given(DOCUMENTS)
def test_documents_come_back_from_any_number_of_shards(tmp_path_factory, documents: list[list[int]]) -> None:
    source = write(tmp_path_factory.mktemp("shards"), documents)
    assert [ids.tolist() for ids in source] == documents
    assert (len(source), source.tokens) == (len(documents), sum(map(len, documents)))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_the_fewest_bytes_that_hold_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    source = write(tmp_path, [[0, vocab_size - 1]], vocab_size=vocab_size)
    assert (source[0].dtype, source[0].tolist()) == (np.dtype(dtype), [0, vocab_size - 1])


def test_ids_take_the_type_that_is_asked_for_where_it_holds_them(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, vocab_size=300, dtype="uint32") as writer:
        writer.add(Document(np.array([0, 299]), None, 0))
        writer.close(tokenizer_sha256="", source="")
    assert Source.open(tmp_path)[0].dtype == np.uint32
    with pytest.raises(ConfigError, match="dtype: uint16 holds 65536 ids, not the 65537"):
        ShardWriter(tmp_path / "b", vocab_size=65537, dtype="uint16")


def test_a_writer_goes_on_behind_the_last_complete_shard(tmp_path: Path) -> None:
    documents = [[n] * 4 for n in range(12)]
    whole = write(tmp_path / "whole", documents)
    with ShardWriter(tmp_path / "parts", vocab_size=300, shard_tokens=10) as writer:
        for number, ids in enumerate(documents[:8]):
            writer.add(Document(ids, None, number))
            writer.mark(1)
    with ShardWriter(tmp_path / "parts", vocab_size=300, shard_tokens=10) as writer:
        assert (writer.rows, writer.documents, writer.tokens) == (6, 6, 24)
        for number, ids in list(enumerate(documents))[writer.rows :]:
            writer.add(Document(ids, None, number))
            writer.mark(1)
        writer.close()
    assert Source.open(tmp_path / "parts").fingerprint == whole.fingerprint
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([1, 300], None, "input_ids: 300 is outside the vocabulary of 300"),
        ([-1], None, "input_ids: -1 is outside"),
        ([1, 2], [1], "labels: 1 labels for 2 input_ids"),
        ([1, 2], [1, 300], "labels: 300 is outside"),
        ([1, 2], [1, -99], "labels: -99 is outside"),
    ],
)
def test_tokens_that_fit_nothing_are_named(tmp_path: Path, ids, labels, message: str) -> None:
    with ShardWriter(tmp_path, vocab_size=300, labels=labels is not None) as writer, pytest.raises(InputError, match=message):
        writer.add(Document(ids, labels, 0))


def test_labels_in_some_rows_only_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, vocab_size=300, labels=True) as writer, pytest.raises(InputError, match="some rows have them"):
        writer.add(Document([1], None, 0))


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    write(tmp_path / "good", [[1, 2, 3], [4, 5]])
    for name, message in [("00000.bin", "00000.bin has"), ("00000.idx", "00000.idx has"), ("00000.key", "00000.key has")]:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        (tmp_path / name / name).write_bytes((tmp_path / name / name).read_bytes()[:-1])
        with pytest.raises(InputError, match=message):
            Source.open(tmp_path / name)[0]
    (tmp_path / "good" / "meta.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        Source.open(tmp_path / "good")


@pytest.mark.parametrize("kind", ["bin", "labels"])
def test_a_flipped_bit_is_named_where_an_id_leaves_the_vocabulary(tmp_path: Path, kind: str) -> None:
    with ShardWriter(tmp_path, vocab_size=300, labels=True) as writer:
        writer.add(Document([1, 2, 3], [-100, 2, 3], 0))
        writer.close()
    source = Source.open(tmp_path)
    assert (list(source[0]), list(source.labels(0, 0, 3))) == ([1, 2, 3], [-100, 2, 3])
    path = tmp_path / f"00000.{kind}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"00000.{kind} holds"):
        Source.open(tmp_path).read(0, 1, 3) if kind == "bin" else Source.open(tmp_path).labels(0, 1, 3)


def test_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[1]])
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(InputError, match="format 1"):
        Source.open(tmp_path)


def test_a_source_pickles_as_its_path(make_source) -> None:
    source = make_source([2000, 3000])
    source[1]
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    assert pickle.loads(pickled)[1].tolist() == source[1].tolist()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=40), st.floats(0.01, 0.5))
def test_split_is_by_hash_and_neither_part_is_empty(tmp_path_factory, keys: list[int], fraction: float) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, vocab_size=100) as writer:
        for number, key in enumerate(keys):
            writer.add(Document([number], None, key))
        writer.close()
    rest, held = Source.open(folder).split(fraction)
    parts = [[int(ids[0]) for ids in part] for part in (rest, held)]
    assert sorted(parts[0] + parts[1]) == list(range(len(keys)))
    assert all(parts)
    by_hash = [number for number, key in enumerate(keys) if float(key) >= (1 - fraction) * 2.0**64]
    assert parts[1] == by_hash or not by_hash or len(by_hash) == len(keys)


def test_a_single_document_holds_out_its_last_tokens(make_source) -> None:
    rest, held = make_source([100]).split(0.05)
    assert rest[0].tolist() == list(range(95))
    assert held[0].tolist() == list(range(95, 100))


def test_take_draws_the_same_documents_in_their_order(make_source) -> None:
    source = make_source([1] * 50)
    taken = [int(ids[0]) for ids in source.take(20)]
    assert taken == sorted(set(taken))
    assert len(taken) == 20
    assert taken != list(range(20))
    assert {int(ids[0]) for ids in source.take(5)} <= set(taken)
    assert len(source.take(51)) == 50

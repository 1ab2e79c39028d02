from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_core.data.pack import BestFit, OneDocument, Stream, best_fit, collate

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)
SIZES = st.integers(2, 24)


def tokens(rows) -> list[int]:
    return [int(token) for k in range(len(rows)) for token in rows[k]["input_ids"]]


@given(LENGTHS, SIZES, st.integers(0, 5))
def test_stream_covers_every_token_once_but_less_than_a_sample(make_source, lengths: list[int], size: int, epoch: int) -> None:
    source = make_source(lengths)
    rows = Stream(source, size, shuffle=True, seed=3).epoch(epoch)
    seen = tokens(rows)
    assert len(set(seen)) == len(seen) == sum(map(rows.length, range(len(rows))))
    assert set(seen) <= set(range(source.tokens))
    assert source.tokens - len(seen) < size
    assert {len(rows[k]["input_ids"]) for k in range(len(rows))} in ({size}, {source.tokens})
    whole = Stream(source, size, keep_tail=True, shuffle=True, seed=3).epoch(epoch)
    assert sorted(tokens(whole)) == list(range(source.tokens))


@given(LENGTHS, SIZES)
def test_unshuffled_stream_is_the_text_in_order(make_source, lengths: list[int], size: int) -> None:
    source = make_source(lengths, shard_tokens=50)
    assert tokens(Stream(source, size, keep_tail=True)) == list(range(source.tokens))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 11), st.integers(0, 3))
def test_isolated_documents_of_a_stream_start_at_position_0_and_are_not_predicted_from_others(
    make_source, lengths: list[int], size: int, epoch: int
) -> None:
    source = make_source(lengths)
    plain, isolated = (Stream(source, size, shuffle=True, seed=1, isolate=isolate).epoch(epoch) for isolate in (False, True))
    assert plain.fingerprint != isolated.fingerprint
    for k in range(len(plain)):
        before, after = plain[k], isolated[k]
        assert before["input_ids"].tolist() == after["input_ids"].tolist()
        # a token and the one before it are of one document, or the token is at position 0 and no target
        first = after["position_ids"] == 0
        assert first[0]
        assert (np.diff(after["position_ids"])[~first[1:]] == 1).all()
        assert after["labels"].tolist() == np.where(first, -100, before["labels"]).tolist()
        assert first.sum() <= len(lengths)


def test_each_pass_joins_documents_in_another_order_and_keeps_them_whole(make_source) -> None:
    source = make_source([5, 9, 4, 7, 6])
    rows = Stream(source, 31, shuffle=True)
    orders = [tokens(rows.epoch(number)) for number in range(3)]
    assert len(set(map(tuple, orders))) == 3
    documents = [list(document) for document in source]
    for order in orders:
        for document in documents:
            at = order.index(int(document[0]))
            assert order[at : at + len(document)] == [int(token) for token in document]


@given(LENGTHS, SIZES)
def test_best_fit_covers_every_token_once_and_isolates_documents(make_source, lengths: list[int], size: int) -> None:
    source = make_source(lengths)
    rows = BestFit(source, size)
    assert sorted(tokens(rows)) == list(range(source.tokens))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for k in range(len(rows)):
        row = rows[k]
        assert len(row["input_ids"]) == rows.length(k) <= size
        starts = np.flatnonzero(row["position_ids"] == 0)
        assert row["labels"][starts].tolist() == [-100] * len(starts)
        assert (row["labels"] != -100).sum() == len(row["labels"]) - len(starts)
        assert row["document_ids"].tolist() == (np.cumsum(row["position_ids"] == 0) - 1).tolist()
        for piece in np.split(row["input_ids"], starts[1:]):
            assert len(set(document_of[piece])) == 1
            assert np.diff(piece).tolist() == [1] * (len(piece) - 1)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 40))
def test_best_fit_decreasing_follows_its_rule(lengths: list[int], size: int) -> None:
    # the plain writing of the rule: the fullest bin it fits, the last to have become so full
    plain: list[list[int]] = []
    changed: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        filled = [sum(lengths[one] for one in some) for some in plain]
        fitting = [number for number, full in enumerate(filled) if full + lengths[index] <= size]
        if fitting:
            chosen = max(fitting, key=lambda number: (filled[number], changed[number]))
        else:
            chosen = len(plain)
            plain.append([])
            changed.append(0)
        plain[chosen].append(index)
        changed[chosen] = sum(map(len, plain))
    assert best_fit(lengths, size) == plain


def test_one_document_per_sample_says_once_what_it_loses(make_source, caplog: pytest.LogCaptureFixture) -> None:
    source = make_source([5, 12, 8])
    with caplog.at_level(logging.WARNING):
        rows = OneDocument(source, 8, name="books")
    assert [record.getMessage()[:71] for record in caplog.records] == [
        "books: 4 of 25 tokens lie beyond --max-length 8 in 1 documents and are "
    ]
    assert [rows[k]["input_ids"].tolist() for k in range(3)] == [[*range(5)], [*range(5, 13)], [*range(17, 25)]]
    assert rows[0]["labels"].tolist() == [-100, 1, 2, 3, 4]


@pytest.mark.parametrize("packing", [Stream, BestFit, OneDocument])
def test_a_label_column_is_used_instead_of_the_ids(make_source, packing) -> None:
    row = packing(make_source([6], labels=True), 6)[0]
    assert row["input_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    assert row["labels"].tolist() == [-100, 1, -100, 3, -100, 5]


def test_collate_pads_and_masks_only_where_rows_differ(make_source) -> None:
    rows = BestFit(make_source([3, 4, 2]), 5, pad=9)
    batch = rows.collate([rows[k] for k in range(len(rows))])
    assert {name: table.tolist() for name, table in batch.items()} == {
        "input_ids": [[3, 4, 5, 6, 9], [0, 1, 2, 7, 8]],
        "labels": [[-100, 4, 5, 6, -100], [-100, 1, 2, -100, 8]],
        "position_ids": [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]],
        "document_ids": [[0, 0, 0, 0, -1], [0, 0, 0, 1, 1]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    }
    assert "attention_mask" not in rows.collate([rows[1]])
    assert all(table.dtype == torch.int64 for table in batch.values())


def test_collate_takes_tensors_too() -> None:
    rows = [
        {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 2])},
        {"input_ids": torch.tensor([3]), "labels": torch.tensor([-100])},
    ]
    assert collate(rows, pad=7)["input_ids"].tolist() == [[1, 2], [3, 7]]
    assert collate(rows[:1])["labels"].tolist() == [[-100, 2]]


def test_fingerprints_tell_samples_apart(make_source) -> None:
    source = make_source([4, 5, 6])
    rows = [Stream(source, 4), Stream(source, 5), BestFit(source, 4), Stream(source.select([0, 2, 1]), 4), Stream(source.select([0, 1]), 4)]
    assert len({one.fingerprint for one in rows}) == len(rows)
    assert Stream(source, 4).fingerprint == rows[0].fingerprint

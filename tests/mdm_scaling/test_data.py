"""Megatron's files and order, against a literal writing of its helpers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import InputError
from mdm_scaling.data import pathfile, sampler
from mdm_scaling.data.corpus import open_held_out, open_split
from mdm_scaling.data.indexed import Indexed, Writer, index_bytes, is_prefix, token_type
from mdm_scaling.data.tokens import Part


class Memory:
    """Documents in memory."""

    def __init__(self, lengths: list[int]) -> None:
        self.length = np.array(lengths)
        self.documents = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
        self.fingerprint = "x"

    def read(self, n: int, first: int, last: int) -> Any:
        return self.documents[n][first:last]


# --- .bin and .idx ---


def write(prefix: Path, documents: list[list[int]], vocabulary: int = 1000) -> None:
    with Writer(prefix, token_type(vocabulary)) as writer:
        for document in documents:
            writer.add(document)


def test_index_is_byte_for_byte_that_of_megatron(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 8) + struct.pack("<QQ", 3, 4)
    expected += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65499, "uint16"), (65500, "int32"), (128000, "int32")])
def test_small_vocabularies_take_16_bits(vocabulary: int, dtype: str) -> None:
    assert token_type(vocabulary) == np.dtype(dtype)


@given(st.lists(st.lists(st.integers(0, 999), max_size=9), min_size=1, max_size=9).filter(lambda lists: any(lists)))
def test_what_is_written_reads_back(documents: list[list[int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "a", documents)
        read = Indexed.open(Path(folder) / "a")
        assert [read[n].tolist() for n in range(len(read))] == documents
        assert read.tokens == sum(map(len, documents))


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_every_whole_type_is_read(code: int, tmp_path: Path) -> None:
    from mdm_scaling.data.indexed import TYPES

    dtype = np.dtype(TYPES[code])
    (tmp_path / "a.bin").write_bytes(np.array([1, 2, 3], dtype).tobytes())
    (tmp_path / "a.idx").write_bytes(index_bytes([2, 1], [0, 2], dtype))
    read = Indexed.open(tmp_path / "a")
    assert [read[0].tolist(), read[1].tolist()] == [[1, 2], [3]]


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4]])
    index, tokens = (tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()

    def says(message: str) -> None:
        with pytest.raises(InputError, match=message):
            Indexed.open(tmp_path / "a")

    (tmp_path / "a.idx").write_bytes(b"NOTINDEX" + index[8:])
    says("does not begin with MMIDIDX")
    (tmp_path / "a.idx").write_bytes(index[:-4])
    says("its header promises")
    (tmp_path / "a.idx").write_bytes(index_bytes([], [0], np.dtype("<u2")))
    says("lists no document")
    (tmp_path / "a.idx").write_bytes(index[:17] + bytes([7]) + index[18:])
    says("whole numbers")
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(tokens[:-2])
    says("its index needs 8")
    (tmp_path / "a.bin").unlink()
    assert is_prefix(str(tmp_path / "a"))
    says(r"a\.bin is missing")


def test_a_token_beyond_the_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 300]])
    with pytest.raises(InputError, match="holds token 300, but the tokenizer has 259"):
        open_held_out([str(tmp_path / "a")], byte_tokenizer(), text_column="text")


def test_a_prefix_is_split_by_documents(tmp_path: Path) -> None:
    write(tmp_path / "a", [[n] * 3 for n in range(100)])
    train, held = open_split(str(tmp_path / "a"), byte_tokenizer(), text_column="text", split=None, hold_out=0.05)
    assert held is not None
    assert (train.number.tolist(), held.number.tolist()) == (list(range(97)), [97, 98, 99])
    train, held = open_split(f"{tmp_path / 'a'}.bin", byte_tokenizer(), text_column="text", split="50,25,25", hold_out=0.05)
    assert held is not None
    assert (len(train.number), held.number.tolist()) == (50, list(range(50, 75)))


# --- order of samples ---


def megatron(lengths: list[int], size: int, wanted: int, seed: int) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """(documents, (place, offset) of each sample's first token, order of samples): the loops of Megatron's GPT dataset."""
    tokens = sum(lengths)
    epochs, reached = 0, 0
    while True:
        epochs += 1
        reached += tokens
        if (reached - 1) // size >= wanted:
            break
    separate = False
    if epochs > 1:
        sans_last = ((epochs - 1) * tokens - 1) // size
        separate = wanted - sans_last < int(0.8 * ((tokens - 1) // size))
    random = np.random.RandomState(seed)

    def documents_of(count: int) -> np.ndarray:
        index = np.mgrid[0:count, 0 : len(lengths)][1].reshape(-1).astype(np.int32)
        random.shuffle(index)
        return index

    documents = np.concatenate([documents_of(epochs - 1), documents_of(1)]) if separate else documents_of(epochs)
    starts, place, offset = [(0, 0)], 0, 0
    for _ in range((epochs * tokens - 1) // size):
        left = size + 1
        while left != 0:
            length = lengths[documents[place]] - offset
            left -= length
            if left <= 0:
                offset += left + length - 1
                left = 0
            else:
                place += 1
                offset = 0
        starts.append((place, offset))
    total = len(starts) - 1

    def samples_of(edge: int) -> np.ndarray:
        first = np.arange(0, edge, dtype=np.uint32)
        random.shuffle(first)
        if edge == total:
            return first
        last = np.arange(edge, total, dtype=np.uint32)
        random.shuffle(last)
        return np.concatenate([first, last])

    return documents, starts, samples_of(sans_last if separate else total)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 8),
    st.integers(1, 60),
    st.integers(0, 5),
)
def test_order_is_that_of_megatron(lengths: list[int], size: int, wanted: int, seed: int) -> None:
    if sum(lengths) < size + 1:
        return
    documents, starts, samples = megatron(lengths, size, wanted, seed)
    order = sampler.build(len(lengths), sum(lengths), size, wanted, seed)
    assert order.documents.tolist() == documents.tolist()
    assert order.samples.tolist() == samples.tolist()
    store = Memory(lengths)
    part = Part.of("x", store)
    ends = np.cumsum(part.length[order.documents])
    stream = np.concatenate([store.documents[n] for n in documents])
    at = 0
    for k, (place, offset) in enumerate(starts[:-1]):
        assert store.documents[documents[place]][offset] == stream[at]
        assert part.gather(order.documents, ends, k * size, k * size + size + 1).tolist() == stream[at : at + size + 1].tolist()
        at += size


@given(st.integers(2, 400), st.integers(1, 9), st.integers(1, 500))
def test_epochs_are_the_fewest_that_suffice(tokens: int, size: int, wanted: int) -> None:
    if tokens < size + 1:
        return
    epochs = sampler.num_epochs(tokens, size, wanted)
    assert (epochs * tokens - 1) // size >= wanted
    assert epochs == 1 or ((epochs - 1) * tokens - 1) // size < wanted


def test_counts_do_not_overflow() -> None:
    assert sampler.num_epochs(10**12, 2048, 10**10) == -(-(10**10 * 2048 + 1) // 10**12)
    assert not sampler.last_is_separate(10**12, 2048, 10**10, 1)
    assert sampler.last_is_separate(10**12, 2048, 10**10, 21)


def test_per_epoch_order_sees_every_document_once_per_epoch() -> None:
    order = sampler.build(7, 70, 10, 20, 3, "per-epoch")
    epochs = order.documents.reshape(order.epochs, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist())
    assert sorted(order.samples.tolist()) == list(range((order.epochs * 70 - 1) // 10))
    assert sorted(order.samples[:6].tolist()) == list(range(6))


@pytest.mark.parametrize("shuffle", ["pooled", "per-epoch"])
def test_fixed_packing_permutes_the_same_samples(shuffle: Any) -> None:
    order = sampler.build(7, 71, 10, 20, 3, shuffle, "fixed")
    assert order.documents.tolist() == list(range(7))
    assert sorted(order.samples.tolist()) == sorted(list(range(7)) * 3)
    if shuffle == "per-epoch":
        assert all(sorted(epoch) == list(range(7)) for epoch in order.samples.reshape(3, 7).tolist())


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6), st.integers(1, 60))
def test_blend_is_that_of_megatron(weights: list[float], count: int) -> None:
    share = np.array(weights) / np.sum(weights)
    which, number = sampler.blend(weights, count)
    taken = [0] * len(weights)
    for i in range(count):
        errors = [share[d] * max(i, 1.0) - taken[d] for d in range(len(weights))]
        best = 0
        for d in range(1, len(weights)):
            if errors[d] > errors[best]:
                best = d
        assert (which[i], number[i]) == (best, taken[best])
        taken[best] += 1


def test_first_tokens_are_nested_prefixes() -> None:
    part = Part.of("x", Memory([5, 7, 3]))
    for count in range(1, 15):
        cut = part.first_tokens(count)
        assert cut.tokens == count
        assert cut.gather(None, np.cumsum(cut.length), 0, count).tolist() == list(range(count))


# --- path files ---


def test_path_file_of_quoted_pairs(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]])
    (tmp_path / "paths.txt").write_text('# two corpora\n\n"1.0 a" "0.5 /elsewhere/b"\n')
    assert pathfile.read(tmp_path / "paths.txt") == [f"{tmp_path}/a@1.0", "/elsewhere/b@0.5"]


def test_path_file_of_entries(tmp_path: Path) -> None:
    (tmp_path / "paths.yaml").write_text("- {weight: 2, prefix: builtin:stdlib}\n")
    assert pathfile.weighted(pathfile.read(tmp_path / "paths.yaml")) == (["builtin:stdlib"], [2.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "names no corpus"), ('"1.0"', "no pair"), ('"x a"', "above 0"), ('"-1 a"', "above 0"), ('"1 a', "not closed")],
)
def test_odd_path_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "paths.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        pathfile.read(tmp_path / "paths.txt")

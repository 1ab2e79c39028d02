"""Philox against the known answers published with it (Random123, examples/kat_vectors), and properties of the layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_core import counter

# counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("position", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers_for_ints_numpy_and_torch(position, key, expected) -> None:
    assert counter.philox(position, key) == expected
    arrays = counter.philox(tuple(np.array([word], dtype=np.uint64) for word in position), key)
    assert tuple(int(word[0]) for word in arrays) == expected
    tensors = counter.philox(tuple(torch.tensor([word], dtype=torch.int64) for word in position), key)
    assert tuple(int(word) for word in tensors) == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_element_is_a_lane_of_its_block(seed: int, index: int, stream: int, size: int) -> None:
    got = counter.bits(seed, stream, index, size).tolist()
    for element in range(size):
        block = counter.philox((*counter.halves(index), element // 4, stream), counter.halves(seed))
        assert got[element] == block[element % 4]


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.integers(1, 9))
def test_rows_of_a_batch_are_the_samples_alone(indices: list[int], size: int) -> None:
    batch = counter.uniform(7, "noise", torch.tensor(indices), size)
    assert torch.equal(batch, torch.stack([counter.uniform(7, "noise", index, size) for index in indices]))
    assert torch.equal(batch, counter.uniform(7, "noise", indices, size))


def test_uniforms_are_the_upper_24_bits() -> None:
    got = counter.uniform(0, 0, 0, 4)
    assert got.dtype == torch.float32
    assert got.tolist() == [(word >> 8) / 2**24 for word in KNOWN[0][2]]


def test_normals_are_box_muller_of_lane_pairs() -> None:
    a, b, c, d = ((word >> 8) * 2.0**-24 for word in KNOWN[0][2])
    step = 2.0**-24
    expected = [
        math.sqrt(-2 * math.log(first + step)) * wave(2 * math.pi * second)
        for first, second in ((a, b), (c, d))
        for wave in (math.cos, math.sin)
    ]
    assert counter.normal(0, 0, 0, 4).tolist() == pytest.approx(expected, rel=1e-6)


def test_draws_have_the_moments_of_their_distribution() -> None:
    uniform, normal = counter.uniform(1, "noise", 5, 200_000), counter.normal(1, "noise", 5, 200_000)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    moments = [uniform.mean().item(), uniform.var().item(), normal.mean().item(), normal.var().item()]
    assert moments == pytest.approx([1 / 2, 1 / 12, 0, 1], abs=0.01)


def test_a_shorter_draw_is_a_prefix() -> None:
    for draw in (counter.bits, counter.uniform, counter.normal):
        assert torch.equal(draw(3, "mask", 9, 5), draw(3, "mask", 9, 50)[:5])


def test_streams_have_distinct_numbers() -> None:
    assert len(set(counter.STREAMS.values())) == len(counter.STREAMS)


def test_reseed_depends_on_every_part_of_the_address_and_on_nothing_else() -> None:
    seen = set()
    for address in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        counter.reseed(*address)
        first = torch.rand(3).tolist()
        torch.rand(10)
        counter.reseed(*address)
        assert torch.rand(3).tolist() == first
        seen.add(tuple(first))
    assert len(seen) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_bits_of_the_cpu() -> None:
    assert torch.equal(counter.bits(3, "noise", [5, 2**40], 33, device="cuda").cpu(), counter.bits(3, "noise", [5, 2**40], 33))

"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_cuda import testing
from kernels_cuda.lowrank import gaussian_
from kernels_cuda.lowrank.gaussian_ import reference

each_implementation = pytest.mark.parametrize("implementation", ["reference", *testing.implementations()])
words_of_32_bits = st.integers(0, 2**32 - 1)


def drawn(implementation: str, count: int, seed: int = 1, param: int = 3, index: int = 2) -> torch.Tensor:
    out = torch.empty(count, device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        gaussian_(out, seed, param, index)
    return out.cpu()


def test_words_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known answers of Philox4x32-10: zeros, and digits of pi (Random123)."""
    monkeypatch.setattr(reference, "PROJECTION", 0)
    assert reference.philox(0, 0, 0, 1, torch.device("cpu")).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@each_implementation
def test_numbers_are_normal(implementation: str) -> None:
    """Moments and the share in the tails, within five standard errors; no two of a pair or of neighbours are related."""
    count = 2**18 if implementation != "emulated" else 2**14
    values = drawn(implementation, count).double()
    error = 5 / math.sqrt(count)
    assert abs(values.mean()) < error
    assert abs(values.var() - 1) < math.sqrt(2) * error
    assert abs(values.pow(4).mean() - 3) < math.sqrt(96) * error
    tail = math.erfc(2 / math.sqrt(2))
    assert abs((values.abs() > 2).double().mean() - tail) < error * math.sqrt(tail)
    for apart in (1, 2, 3, 4):
        assert abs((values[:-apart] * values[apart:]).mean()) < error


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 700), st.integers(-(2**63), 2**64 - 1), words_of_32_bits, words_of_32_bits)
def test_every_implementation_gives_the_numbers_of_the_reference(count: int, seed: int, param: int, index: int) -> None:
    expected = drawn("reference", count, seed, param, index)
    for implementation in testing.implementations():
        torch.testing.assert_close(drawn(implementation, count, seed, param, index), expected, rtol=0, atol=1e-6)


@each_implementation
def test_a_longer_draw_begins_like_a_shorter_one(implementation: str) -> None:
    whole = drawn(implementation, 1000)
    assert torch.equal(drawn(implementation, 333), whole[:333])
    for other in ({"seed": 2}, {"param": 4}, {"index": 3}, {"seed": 1 + 2**32}):
        assert not torch.equal(drawn(implementation, 1000, **other), whole)

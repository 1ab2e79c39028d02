from __future__ import annotations

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lm_core.data.order import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_permutation_is_a_bijection(size: int, seed: int, address: int) -> None:
    assert sorted(Permutation(size, seed, address)(np.arange(size)).tolist()) == list(range(size))


@given(st.integers(1, 2**62), st.data())
def test_any_element_can_be_asked_on_its_own(size: int, data: st.DataObject) -> None:
    at = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    permutation = Permutation(size, 1, 2)
    there = permutation(at)
    assert ((there >= 0) & (there < size)).all()
    assert there.tolist() == [int(permutation(np.array([one]))[0]) for one in at]


def test_another_seed_or_address_gives_another_order() -> None:
    orders = {tuple(Permutation(50, seed, address)(np.arange(50))) for seed in range(3) for address in range(3)}
    assert len(orders) == 9


def test_the_order_of_a_seed_never_changes() -> None:
    assert Permutation(10, 0, 1)(np.arange(10)).tolist() == [4, 6, 3, 2, 5, 8, 0, 1, 9, 7]
    assert Permutation(100, 0, 1)(np.arange(8)).tolist() == [51, 22, 94, 70, 99, 4, 13, 44]


def test_all_orders_of_four_are_about_equally_frequent() -> None:
    draws = 4800
    seen = Counter(tuple(Permutation(4, seed, 1)(np.arange(4))) for seed in range(draws))
    expected = draws / math.factorial(4)
    # chi-squared with 23 degrees of freedom: 49.7 is exceeded once in a thousand
    assert sum((seen[order] - expected) ** 2 / expected for order in seen) + (24 - len(seen)) * expected < 49.7


def test_a_network_moves_every_bit_of_the_position() -> None:
    size = 1 << 12
    order = Permutation(size, 0, 1)(np.arange(size))
    # neighbours land a third of the range apart on average, as independent draws do
    assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 0.02
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05

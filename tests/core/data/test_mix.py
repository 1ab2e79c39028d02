from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.data.mix import Mix

WEIGHTS = st.lists(st.floats(0.001, 1), min_size=1, max_size=12)
DRAWS = pytest.mark.parametrize("draw", ["deficit", "keyed"])


def sources(mix: Mix, first: int, last: int) -> list[tuple[int, int]]:
    return [(int(source), int(before)) for source, before in zip(*mix.span(first, last))]


@settings(deadline=None, max_examples=60)
@given(WEIGHTS)
def test_shares_are_exact_within_one_sample_at_every_number(weights: list[float]) -> None:
    mix = Mix(weights)
    taken = [0] * len(weights)
    for n, (source, before) in enumerate(sources(mix, 0, 700), start=1):
        assert before == taken[source]
        taken[source] += 1
        assert all(abs(share * n - count) < 1 + 1e-9 for share, count in zip(mix.weights, taken))


def test_weights_equal_to_sizes_give_every_source_exactly_once_per_epoch() -> None:
    sizes = [7, 1, 30, 12]
    assert Counter(source for source, _ in sources(Mix(sizes), 0, 50)) == dict(enumerate(sizes))


def test_keyed_draws_have_the_frequencies_of_their_weights() -> None:
    taken = Counter(source for source, _ in sources(Mix([6, 3, 1, 0], draw="keyed", seed=4), 0, 20_000))
    assert [taken[source] / 20_000 for source in range(4)] == pytest.approx([0.6, 0.3, 0.1, 0], abs=0.015)


def test_keyed_draws_depend_on_the_seed() -> None:
    assert sources(Mix([1, 1], draw="keyed", seed=0), 0, 50) != sources(Mix([1, 1], draw="keyed", seed=1), 0, 50)


@DRAWS
@given(at=st.integers(0, 5000))
@settings(deadline=None, max_examples=25)
def test_any_number_can_be_asked_in_any_order(draw, at: int) -> None:
    ahead = Mix([3, 1, 2], draw=draw)
    expected = sources(ahead, 0, 5001)
    assert Mix([3, 1, 2], draw=draw).at(at) == ahead.at(at) == expected[at]


@DRAWS
@given(
    moves=st.lists(
        st.tuples(st.integers(1, 1500), WEIGHTS.filter(lambda weights: len(weights) == 3) | st.just([1.0, 0.0, 0.0])), max_size=3
    )
)
@settings(deadline=None, max_examples=25)
def test_resumed_anywhere_equals_uninterrupted_also_after_weights_moved(draw, moves: list[tuple[int, list[float]]]) -> None:
    mix, at, expected = Mix([0.2, 0.3, 0.5], draw=draw), 0, []
    restored = Mix([1, 1, 1], draw=draw)
    restored.load_state_dict(json.loads(json.dumps(mix.state_dict(0))))
    for length, weights in [*moves, (1200, None)]:
        half = at + length // 2
        whole = sources(mix, at, at + length)
        expected += whole
        assert sources(restored, at, half) == whole[: half - at]
        other = Mix([1, 1, 1], draw=draw)
        other.load_state_dict(json.loads(json.dumps(restored.state_dict(half))))
        assert other.taken(half) == restored.taken(half)
        assert sources(other, half, at + length) == whole[half - at :]
        restored, at = other, at + length
        if weights is not None:
            mix.set_weights(weights, at)
            restored.set_weights(weights, at)
    assert mix.taken(at) == [sum(source == which for source, _ in expected) for which in range(3)]


def test_moved_weights_hold_from_their_sample_on_and_earlier_debts_are_paid() -> None:
    mix = Mix([0.5, 0.5])
    mix.set_weights([0.9, 0.1], 101)
    taken = mix.taken(1101)
    assert taken[0] == pytest.approx(50.5 + 900, abs=1)
    assert mix.taken(101)[0] == pytest.approx(50.5, abs=1)


def test_a_resumed_mix_does_not_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = Mix([3, 1])
    mix.span(0, 50_000)
    state = mix.state_dict(50_000)
    fresh, computed = Mix([3, 1]), []
    make = Mix._chunk
    monkeypatch.setattr(Mix, "_chunk", lambda self, first, taken: computed.append(first) or make(self, first, taken))
    fresh.load_state_dict(state)
    assert fresh.taken(50_000) == mix.taken(50_000)
    fresh.span(50_000, 50_010)
    assert computed == [50_000]


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan"), 1], [float("inf")]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mix(weights)

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_core.errors import ConfigError
from moe_cpt.weights import REFERENCE, SHARES, bounded, normalised_shares, read_reference, read_shares, update_weights

LOSSES = {
    "en_book": 2.071, "en_wikipedia": 1.572, "en_stack": 1.491, "github": 0.705, "en_c4": 2.117, "en_cc": 1.728, "en_arxiv": 1.287,
}  # fmt: skip


def test_published_case() -> None:
    expected = {
        "en_cc": 0.6687479654, "en_c4": 0.1506024783, "github": 0.0436121267, "en_wikipedia": 0.0425590605,
        "en_book": 0.0501237068, "en_arxiv": 0.0252145329, "en_stack": 0.0191401294,
    }  # fmt: skip
    assert update_weights(SHARES["llama"], LOSSES, REFERENCE) == pytest.approx(expected, abs=1e-9)


def test_equal_excess_changes_only_by_the_smoothing() -> None:
    alpha = SHARES["llama"]
    shifted = {name: loss + 0.3 for name, loss in REFERENCE.items()}
    assert update_weights(alpha, shifted, REFERENCE, c=0.0) == pytest.approx(alpha, abs=1e-12)
    smoothed = {name: 0.9 * weight + 0.1 / 7 for name, weight in alpha.items()}
    assert update_weights(alpha, shifted, REFERENCE, c=0.1) == pytest.approx(smoothed, abs=1e-12)


def test_order_of_sources_plays_no_part() -> None:
    backwards = dict(reversed(SHARES["llama"].items()))
    assert update_weights(backwards, LOSSES, REFERENCE) == pytest.approx(update_weights(SHARES["llama"], LOSSES, REFERENCE), abs=1e-15)


def test_a_thousand_updates_stay_a_distribution_above_the_smoothing() -> None:
    weights = SHARES["llama"]
    for _ in range(1000):
        weights = update_weights(weights, LOSSES, REFERENCE, c=1e-4)
        assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
        assert min(weights.values()) >= 1e-4 / 7 - 1e-12


def test_the_rule_of_the_paper_ignores_losses_below_their_reference() -> None:
    alpha, reference = {"a": 0.5, "b": 0.25, "c": 0.25}, {"a": 1.0, "b": 1.0, "c": 1.0}
    loss = {"a": 0.5, "b": 1.0, "c": 1.0 + math.log(3)}
    assert update_weights(alpha, loss, reference, "sheared_llama_paper") == pytest.approx({"a": 0.5 / 1.5, "b": 0.25 / 1.5, "c": 0.5})


def test_huge_losses_do_not_overflow() -> None:
    weights = update_weights({"a": 0.5, "b": 0.5}, {"a": 1e5, "b": 1.0}, {"a": 1.0, "b": 1.0})
    assert weights["a"] == pytest.approx(1, abs=1e-4)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda values: sum(values) > 1e-3), st.floats(0, 1), st.floats(0, 1))
def test_bounds_are_kept_and_proportions_between_free_sources_too(values: list[float], below: float, above: float) -> None:
    low, high = below / len(values), 1 / len(values) + above * (1 - 1 / len(values))
    weights = {str(number): value / sum(values) for number, value in enumerate(values)}
    found = bounded(weights, low, high)
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-9)
    assert all(low - 1e-9 <= weight <= high + 1e-9 for weight in found.values())
    free = [name for name, weight in found.items() if low + 1e-9 < weight < high - 1e-9 and weights[name] > 1e-9]
    for name in free[1:]:
        assert found[name] / weights[name] == pytest.approx(found[free[0]] / weights[free[0]], rel=1e-6)


def test_named_shares_sum_to_one() -> None:
    for shares in SHARES.values():
        assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12)


def test_absent_sources_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = normalised_shares(read_shares("llama"), ["en_cc", "github"])
    assert found == pytest.approx({"en_cc": 0.67 / 0.715, "github": 0.045 / 0.715})
    assert "en_cc 0.937" in caplog.text


def test_shares_are_read_from_json_and_files(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("a: 0.3\nb: 2\n")
    assert read_shares('{"a": 0.5}') == {"a": 0.5}
    assert read_shares(str(tmp_path / "map.yaml")) == {"a": 0.3, "b": 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lama", "prob_map: 'lama' is neither a file nor one of llama, sheared_llama, uniform"),
        ('{"a": ', "is not valid JSON"),
        ('{"a": -1}', "prob_map: a has share -1"),
        ('{"a": NaN}', "prob_map: a has share nan"),
    ],
)
def test_impossible_shares_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_shares(text)


def test_shares_must_cover_the_sources() -> None:
    with pytest.raises(ConfigError, match="prob_map: no share for source books"):
        normalised_shares({"a": 1.0}, ["a", "books"])
    with pytest.raises(ConfigError, match="prob_map: all shares of a are 0"):
        normalised_shares({"a": 0.0, "b": 1.0}, ["a"])


def test_reference_losses_must_cover_the_sources(tmp_path: Path) -> None:
    assert read_reference(None, ["github"]) == {"github": REFERENCE["github"]}
    with pytest.raises(ConfigError, match="the built-in table has no loss for source stdlib"):
        read_reference(None, ["stdlib"])
    (tmp_path / "ref.json").write_text(json.dumps({"a": "x"}))
    with pytest.raises(ConfigError, match="gives a the loss 'x'"):
        read_reference(tmp_path / "ref.json", ["a"])
    with pytest.raises(ConfigError, match=r"none\.json does not exist"):
        read_reference(tmp_path / "none.json", ["a"])

from __future__ import annotations

from typing import Any

import pytest

from lm_core.errors import ConfigError
from mdm_scaling import planner, sizes

TABLE = [
    (1e19, "ar", "217M", 7_662_725_892, 3_741_565, 14_615, "c4_7B6"),
    (1e19, "mdm", "117M", 13_485_740_760, 6_584_834, 25_722, "c4_13B5"),
    (3e19, "ar", "425M", 11_993_656_602, 5_856_278, 22_876, "c4_12B"),
    (3e19, "mdm", "217M", 22_988_177_676, 11_224_696, 43_846, "c4_23B"),
    (1e20, "ar", "724M", 23_800_967_429, 11_621_566, 45_396, "c4_23B8"),
    (1e20, "mdm", "425M", 39_978_855_343, 19_520_925, 76_253, "c4_40B"),
]


@pytest.mark.parametrize(("flops", "objective", "preset", "tokens", "samples", "steps", "name"), TABLE)
def test_published_runs(flops: float, objective: str, preset: str, tokens: int, samples: int, steps: int, name: str) -> None:
    assert planner.optimal(flops, objective) == preset
    made = planner.plan(objective, preset, sizes.SIZES[preset].nominal, flops=flops)
    assert (made.tokens, made.samples, made.steps, made.name) == (tokens, samples, steps, name)


def test_tokens_are_exact_for_any_budget() -> None:
    assert planner.tokens_for(1e20, 416_887_040) == 10**20 // (6 * 416_887_040)
    assert planner.tokens_for(123456789.5, 7) == 2939447


@pytest.mark.parametrize(
    ("tokens", "corpus", "expected"),
    [(100e6, "c4", 208931), (100e6, "slimpajama", 94513), (1.9e9, "c4", 3969698)],
)
def test_documents(tokens: float, corpus: str, expected: int) -> None:
    assert planner.documents(tokens, planner.TOKENS_PER_DOC[corpus]) == expected


def test_repeated_data_is_named_by_its_epochs() -> None:
    made = planner.plan("ar", "217M", sizes.SIZES["217M"].nominal, flops=1e19, epochs=4)
    assert made.unique_tokens == 7_662_725_892 // 4
    assert made.name == "c4_1B9_4ep"
    given = planner.plan("ar", "217M", sizes.SIZES["217M"].nominal, unique_tokens=100_000_000, epochs=50)
    assert (given.samples, given.name) == (100_000_000 * 50 // 2048, "c4_100m_50ep")


def test_advice_for_large_models() -> None:
    assert len(planner.plan("ar", "4516M", sizes.SIZES["4516M"].nominal, flops=1e20).advice) == 2
    assert planner.plan("ar", "217M", sizes.SIZES["217M"].nominal, flops=1e20).advice == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: planner.optimal(2e19, "ar"), "1e.19, 3e.19, 1e.20"),
        (lambda: planner.tokens_per_doc("pile"), "neither c4, slimpajama, oscar nor a number"),
        (lambda: planner.plan("ar", "7M", 7_000_000, flops=1e10), "less than one update of 256"),
        (lambda: planner.plan("ar", "7M", 7_000_000), "no budget"),
    ],
)
def test_what_cannot_be_planned_is_said(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()

"""Figures beside their targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from lm_core.bench import BenchConfig
from lm_core.errors import ConfigError
from lm_core.figures import Figure, in_turns, ratio, report


@pytest.mark.parametrize(("value", "least", "passed"), [(1.0, False, True), (3.0, False, False), (1.0, True, False), (3.0, True, True)])
def test_a_target_is_a_bound_from_above_or_below(value: float, least: bool, passed: bool) -> None:
    assert Figure("x", "", value, 2.0, least).passed == passed


def test_a_floor_stands_beside_the_number() -> None:
    assert Figure("x", "a ratio", 0.7, 0.5, floor=0.61).line.endswith("<= 0.5     a ratio; floor 0.61")
    assert Figure("x", "a ratio", 0.7, floor=0.61).as_dict()["floor"] == 0.61


def busy(seconds: float) -> Callable[[], None]:
    def run() -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    return run


def test_functions_take_turns_and_ratios_are_of_processor_time() -> None:
    order: list[str] = []
    in_turns([lambda: order.append("a"), lambda: order.append("b")], repeats=2, warm=1)
    assert "".join(order) == "ababab"
    assert ratio(busy(0.02), busy(0.01), repeats=3, warm=0) == pytest.approx(2, rel=0.3)


def test_report_runs_what_is_asked_for_once(capsys: pytest.CaptureFixture[str]) -> None:
    runs = []

    def both(config: object) -> Iterator[Figure]:
        runs.append(config)
        yield Figure("A", "the first", 1.0, 2.0)
        yield Figure("B", "the second", 3.0, details={"unit": "ms"})

    def none(config: object) -> Iterator[Figure]:
        yield from ()

    config = BenchConfig()
    found = report({"A": both, "B": both, "C": none}, config, only=[], threads=1)
    assert [figure["name"] for figure in found["figures"]] == ["A", "B"]
    assert found["figures"][1]["unit"] == "ms"
    assert found["not_measured"] == ["C"]
    assert len(runs) == 1
    assert "pass  A" in capsys.readouterr().out
    assert [figure["name"] for figure in report({"A": both, "B": both}, config, only=["B"], threads=1)["figures"]] == ["B"]
    with pytest.raises(ConfigError, match="D is no measurement; choose from A"):
        report({"A": both}, config, only=["D"], threads=1)

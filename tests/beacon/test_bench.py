from __future__ import annotations

from typing import Any

import pytest

from beacon import bench
from beacon.options import BenchConfig


@pytest.fixture(scope="module")
def small() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Machine, "length", 512)
        return list(bench.run(BenchConfig(only=["P1", "P2", "P3", "P4", "P6", "P7", "P8", "P9"]))["figures"])


def test_what_does_not_depend_on_speed_meets_its_target(small: list[dict[str, Any]]) -> None:
    met = [
        (figure["name"], figure["pass"]) for figure in small if figure["name"] in ("P3", "P4", "P6", "P9") and figure["target"] is not None
    ]
    assert met == [("P3", True), ("P4", True), ("P6", True), ("P6", True), ("P9", True)]


def test_every_measure_says_its_target(small: list[dict[str, Any]]) -> None:
    targets = [(figure["name"], figure["target"]) for figure in small if figure["least"] and figure["target"] is not None]
    assert targets == [("P1", 1.2), ("P2", 1.2), ("P7", 1), ("P7", 1), ("P8", 3), ("P9", 7)]
    for figure in small:
        if "baseline_seconds" in figure:
            assert figure["value"] == figure["baseline_seconds"] / figure["seconds"]

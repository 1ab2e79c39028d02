from __future__ import annotations

import pytest

from beacon import bench
from beacon.options import BenchConfig


@pytest.fixture(scope="module")
def small() -> dict[str, dict[str, object]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Machine, "length", 512)
        return bench.run(BenchConfig(only=["P1", "P2", "P3", "P4", "P6", "P7", "P8", "P9"]))


def test_what_does_not_depend_on_speed_meets_its_target(small: dict[str, dict[str, object]]) -> None:
    assert {name: found["met"] for name, found in small.items() if name in ("P3", "P4", "P6", "P9")} == {
        "P3": True, "P4": True, "P6": True, "P9": True,
    }  # fmt: skip


def test_every_measure_says_its_target_and_whether_it_is_met(small: dict[str, dict[str, object]]) -> None:
    assert [found["target"] for found in small.values()][:2] == ["speedup >= 1.2", "speedup >= 1.2"]
    assert small["P7"]["target"] == "speedups >= 1"
    assert small["P7"]["met"] == all(float(str(small["P7"][name])) >= 1 for name in ("append_speedup", "evict_speedup"))
    for name in ("P1", "P2"):
        assert small[name]["met"] == (float(str(small[name]["speedup"])) >= 1.2)
    assert small["P8"]["met"] == (float(str(small["P8"]["speedup"])) >= 3)
    assert str(small["P8"]["target"]).startswith("speedup >= 3 (")

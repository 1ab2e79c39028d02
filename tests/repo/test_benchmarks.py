"""Every package's `bench`, however it says what it found, becomes rows of docs/benchmarks.md."""

from __future__ import annotations

import json
from pathlib import Path

from lm_core.figures import Figure
from tests.repo.benchmarks import collected, page


def test_figures_of_every_shape_become_rows_with_their_targets(tmp_path: Path) -> None:
    said = {
        "a": {"conditions": {"commit": "0123456789"}, "figures": [Figure("C1", "a ratio", 2.0, 3.0, least=True).as_dict()]},
        "b": {"wkv7": {"forward": {"milliseconds": 2.0, "ratio": 20.0, "at_least": 15}}},
        "c": {
            "P3": {"flops": 3, "ratio": 1.0, "target": "ratio <= 1.05", "met": True},
            "P4": {"bytes": 7, "target": "equal", "met": False},
        },
    }
    for name, found in said.items():
        (tmp_path / name).write_text(json.dumps(found))
    text = page({f"{name} bench": collected(name, tmp_path / name) for name in said})
    for row in (
        "| C1: a ratio | 2 | ≥ 3 | **no** |",
        "| wkv7: forward (milliseconds 2) | 20 | ≥ 15 | yes |",
        "| P3: (flops 3) | 1 | ratio <= 1.05 | yes |",
        "| P4: (bytes 7) |  | equal | **no** |",
    ):
        assert row in text
    assert "commit 0123456" in text

"""Every package's `bench`, however it says what it found, becomes rows of docs/benchmarks.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_core.figures import Figure
from tests.repo.benchmarks import collected, page


def test_figures_of_every_shape_become_rows_with_their_targets(tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "a": {"conditions": {"commit": "0123456789"}, "figures": [Figure("C1", "a ratio", 2.0, 3.0, least=True).as_dict()]},
        "b": {"wkv7": {"forward": {"milliseconds": 2.0, "ratio": 20.0, "at_least": 15}}},
        "c": {
            "P3": {"flops": 3, "ratio": 1.0, "target": "ratio <= 1.05", "met": True},
            "P4": {"bytes": 7, "target": "equal", "met": False},
        },
    }
    for name, found in said.items():
        (tmp_path / name).write_text(json.dumps(found))
    figures = [Figure("C5", "energy caught", 0.99, 0.985, least=True), Figure("C6", "longest step", 1.3, 3.0), Figure("C7", "told", 7.0)]
    said["d"] = {}
    (tmp_path / "d").write_text("\n".join(["processor x; threads 1; commit 89abcdef0; torch 2", *(figure.line for figure in figures)]))
    text = page({f"{name} bench": collected(name, tmp_path / name) for name in said})
    for row in (
        "| C1: a ratio | 2 | ≥ 3 | **no** |",
        "| wkv7: forward (milliseconds 2) | 20 | ≥ 15 | yes |",
        "| P3: (flops 3) | 1 | ratio <= 1.05 | yes |",
        "| C5: energy caught | 0.99 | ≥ 0.985 | yes |",
        "| C6: longest step | 1.3 | ≤ 3 | yes |",
        "| C7: told | 7 |  |  |",
        "| P4: (bytes 7) |  | equal | **no** |",
    ):
        assert row in text
    assert "commit 0123456" in text

"""Every package's `bench`, however it says what it found, becomes rows of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from lm_core.figures import Figure
from tests.repo.benchmarks import figures_of, page


def test_figures_of_every_shape_become_rows_with_their_targets() -> None:
    said: dict[str, Any] = {
        "a": {
            "figures": [
                Figure("C1", "a ratio", 2.0, 3.0, least=True).as_dict(),
                Figure("C6", "longest step", 1.3, 3.0).as_dict(),
                Figure("C7", "told", 7.0).as_dict(),
            ]
        },
        "c": {
            "P3": {"flops": 3, "ratio": 1.0, "target": "ratio <= 1.05", "met": True},
            "P4": {"bytes": 7, "target": "equal", "met": False},
        },
    }
    where = {"date": "2026-11-22", "commit": "0123456", "machine": "a processor", "load": [1.0, 2.0], "seconds": 3}
    text = page({name: {"command": f"{name} bench", "figures": figures_of(found), "conditions": where} for name, found in said.items()})
    for row in (
        "| C1: a ratio | 2 | ≥ 3 | **no** |",
        "| C6: longest step | 1.3 | ≤ 3 | yes |",
        "| C7: told | 7 |  |  |",
        "| P3: (flops 3) | 1 | ratio <= 1.05 | yes |",
        "| P4: (bytes 7) |  | equal | **no** |",
    ):
        assert row in text
    assert "`a bench`, 2026-11-22, commit 0123456, load 1.0 to 2.0, 3 s." in text

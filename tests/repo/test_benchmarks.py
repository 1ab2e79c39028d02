"""What a `bench` found becomes rows of docs/benchmarks.md."""

from __future__ import annotations

from lm_core.figures import Figure
from tests.repo.benchmarks import page


def test_figures_become_rows_with_their_targets() -> None:
    figures = [
        Figure("C1", "a ratio", 2.0, 3.0, least=True),
        Figure("C6", "longest step", 1.3, 3.0, floor=1.125),
        Figure("C7", "told", 7.0),
    ]
    where = {"date": "2026-11-22", "commit": "0123456", "machine": "a processor", "load": [1.0, 2.0], "seconds": 3}
    text = page({"a bench": {"command": "a bench", "figures": [figure.as_dict() for figure in figures], "conditions": where}})
    for row in ("| C1: a ratio | 2 | ≥ 3 |  | **no** |", "| C6: longest step | 1.3 | ≤ 3 | 1.125 | yes |", "| C7: told | 7 |  |  |  |"):
        assert row in text
    assert "`a bench`, 2026-11-22, commit 0123456, load 1.0 to 2.0, 3 s." in text

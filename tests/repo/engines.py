"""docs/engines.md: which method runs in which engine, from what the conformance suites declare and test.

Written by `nox -s docs`: python -m tests.repo.engines docs/engines.md
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from lm_core.testing import ENGINES, Conformance
from tests.repo.tree import ROOT

HEAD = """\
# Engines and methods

Written by `nox -s docs`. Each row is a conformance suite: on two processes, every engine marked "equal" gives the
losses of one process in the replicated engine (`test_every_engine_gives_the_losses_of_one_process_or_says_why_it_cannot`); a number
stands for the refusal below. Two replicated processes equal one in every row.
"""


def suites() -> Iterator[tuple[str, type[Conformance]]]:
    """Every conformance suite by package and name, in order."""
    for path in sorted(ROOT.glob("tests/*/test_*.py")):
        if "Conformance" not in path.read_text() or path.parent.name == "repo":
            continue
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, Conformance) and name.startswith("Test"):
                yield f"{path.parent.name}: {name.removeprefix('Test')}", value


def page() -> str:
    notes: list[str] = []
    rows = []
    for name, suite in suites():
        cells = []
        for engine in ENGINES:
            words = suite.refuses.get(engine)
            if words and words not in notes:
                notes.append(words)
            cells.append(f"refused ({notes.index(words) + 1})" if words else "equal")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    table = [f"| method | {' | '.join(ENGINES)} |", "|---" * (len(ENGINES) + 1) + "|", *rows]
    return "\n".join([HEAD, *table, "", *(f"{number}. {words}" for number, words in enumerate(notes, 1))]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")

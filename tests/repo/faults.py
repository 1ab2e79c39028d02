"""docs/faults.md: how many faults each method survived, from what the tests noted.

Written by `nox -s faults`: python -m tests.repo.faults docs/faults.jsonl docs/faults.md
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

from tests.repo.tree import ROOT, methods

HEAD = """\
# Faults

Written by `nox -s faults` from [faults.jsonl](faults.jsonl), last on {date} at commit {commit}; counts of earlier runs stay. Each number counts faults that a method's real command met on its tiny preset and survived:
the run goes on with the same command and ends with the bytes of an uninterrupted one (with two processes: with every step once), or it ends in one
clear error with exit code 2 (input) or 3 (run), without a traceback. [tests/repo/test_faults.py](../tests/repo/test_faults.py) says how
each fault is made; `tests/core/test_faults.py` also kills a small run at chosen changes of its files.
"-" means that it was not run.
"""


def page(log: Path) -> str:
    """The table; where a test ran more than once, its last note counts."""
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    counts = {(note["fault"], note["method"]): note["count"] for note in notes}
    faults = list(dict.fromkeys(note["fault"] for note in notes))
    names = [package.name for package in methods()]
    rows = [[fault, *(str(counts.get((fault, name), "-")) for name in names)] for fault in faults]
    rows.append(["all", *(str(sum(counts.get((fault, name), 0) for fault in faults)) for name in names)])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    head = HEAD.format(date=datetime.date.today(), commit=commit or "unknown")
    table = [["fault", *names], ["---"] * (len(names) + 1), *rows]
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in table)]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(page(Path(sys.argv[1])), encoding="utf-8")

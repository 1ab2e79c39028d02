"""The table of a run: one row per logged training record, under the column names of the original guide."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from lm_core.progress import Progress
from lm_core.sinks import Record

COLUMNS = (
    "epoch",
    "training_step",
    "compute_time",
    "peak_memory_usage_history_GB",
    "peak_memory_usage_allocated_GB",
    "peak_memory_usage_reserved_GB",
    "loss",
    "perplexity",
    "lr",
    "grad_norm",
    "grad_norm_kind",
    "tokens_seen",
    "tokens_per_second",
    "refreshes",
    "skipped_steps",
)


class CsvSink:
    """Writes `path`. Times are seconds per step since the row before, memory is in 10^9 bytes.

    `memory()` gives bytes allocated and reserved, `refreshes()` how many bases have been computed so far, `kind()` what
    the gradient norm is of. A resumed run cuts the rows after its checkpoint, then appends.
    """

    def __init__(self, path: Path, memory: Callable[[], tuple[int, int]], refreshes: Callable[[], int], kind: Callable[[], str]) -> None:
        self.path = path
        self.memory, self.refreshes, self.kind = memory, refreshes, kind
        self.file: TextIO | None = None
        self.last = Progress()

    def start(self, progress: Progress) -> None:
        rows = [row for row in read(self.path) if int(row["training_step"]) <= progress.steps] if progress.steps else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}.partial")
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(fresh, self.path)
        self.file = self.path.open("a", newline="")
        self.last = progress

    def __call__(self, record: Record) -> None:
        # evaluations are logged, too; this table is of training steps
        if "train/loss" not in record:
            return
        assert self.file is not None, "start comes first"
        steps, (allocated, reserved) = int(record["step"]) - self.last.steps, self.memory()
        loss = record["train/loss"]
        values = (
            record.get("epoch", ""),
            int(record["step"]),
            (record["seconds"] - self.last.seconds) / max(1, steps),
            record["memory/gib"] * 2**30 / 1e9,
            allocated / 1e9,
            reserved / 1e9,
            loss,
            math.exp(loss) if loss < 700 else math.inf,
            record["optim/lr"],
            record["optim/grad_norm"],
            self.kind(),
            int(record["tokens"]),
            record.get("speed/tokens_per_second", ""),
            self.refreshes(),
            int(record["skipped"]),
        )
        csv.writer(self.file).writerow(values)
        self.file.flush()
        self.last = Progress(steps=int(record["step"]), seconds=record["seconds"])

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; a last one that a crash tore is left out, and a missing file is empty."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]

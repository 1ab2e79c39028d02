"""Finished runs as rows of a table: what laws are fitted to."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_core.errors import InputError, reading

COLUMNS = (
    "run_id", "objective", "N", "D", "U", "epochs", "C", "loss", "loss_se", "best_loss", "best_step", "final_loss", "seed", "experiment", "knob", "folder",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One run. `loss` is the one that was asked for, best or final; `se` its standard error (NaN where unknown)."""

    objective: str
    N: float
    D: float
    U: float
    C: float
    loss: float
    se: float
    folder: str = ""

    @property
    def epochs(self) -> float:
        return self.D / self.U


def read_points(path: Path, objective: str | None = None, loss: str = "best") -> list[Point]:
    """The rows of runs.csv, of one objective if given. Raises InputError naming the line that cannot be used."""
    with reading(f"runs: {path}", "write it with `mdm-scaling runs collect`"), path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = [_point(row, f"{path}:{line}", loss) for line, row in enumerate(rows, start=2)]
    chosen = [point for point in points if objective is None or point.objective == objective]
    if not chosen:
        raise InputError(f"runs: {path} holds no run{f' of objective {objective}' if objective else ''}; collect some first")
    return chosen


def _point(row: Mapping[str, str], where: str, loss: str) -> Point:
    try:
        N, D, U = float(row["N"]), float(row["D"]), float(row.get("U") or row["D"])
        value = float(row[f"{loss}_loss"] or row["loss"])
        se = float(row.get("loss_se") or math.nan)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"runs: {where} lacks a number ({error!r}); it needs N, D and {loss}_loss") from None
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"runs: {where}: the loss {value} is not a number above 0; leave the run out")
    if not (N > 0 and D > 0 and U > 0):
        raise InputError(f"runs: {where}: N, D and U must be above 0; correct them")
    if U > D * (1 + 1e-9):
        raise InputError(f"runs: {where}: {U:g} unique tokens are more than the {D:g} processed; U is at most D")
    return Point(row["objective"], N, D, min(U, D), 6 * N * D, value, se, row.get("folder", ""))


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """A CSV file with these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)

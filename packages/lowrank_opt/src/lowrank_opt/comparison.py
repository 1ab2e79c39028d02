"""`lowrank-opt compare`: what several runs reached, at which memory and speed, as a table and in one picture."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lm_core import sinks
from lm_core.config import load
from lm_core.errors import InputError
from lowrank_opt.commands import CompareConfig


@dataclass(frozen=True)
class Line:
    """One run. Losses are held-out means over sources; memory in GiB; `seconds` is the median step between log records."""

    run: str
    optimizer: str
    lr: float
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    state_mib: float
    predicted_gib: float
    measured_gib: float
    seconds: float
    tokens_per_second: float


def read(folder: Path) -> Line:
    """The numbers of one run folder. Raises InputError for a folder that is no finished run of this command."""
    for name in ("config.yaml", "metrics.jsonl", "result.json"):
        if not (folder / name).is_file():
            raise InputError(f"runs: {folder} has no {name}; name folders of runs that have ended")
    config, result = load(folder / "config.yaml"), json.loads((folder / "result.json").read_text())
    records = sinks.read(folder / "metrics.jsonl")
    held_out = [mean for record in records if math.isfinite(mean := _held_out(record))]
    steps = [record for record in records if "train/loss" in record]
    spans = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(steps)
        if after["step"] > before["step"]
    ]
    seconds = statistics.median(spans) if spans else math.nan
    progress, memory = result["progress"], result["memory"]
    return Line(
        run=folder.name,
        optimizer=str(config.get("optimizer", "")),
        lr=float(config.get("lr", math.nan)),
        steps=progress["steps"],
        tokens=progress["tokens"],
        first_loss=held_out[0] if held_out else math.nan,
        last_loss=held_out[-1] if held_out else math.nan,
        state_mib=state_bytes(folder) / 2**20,
        predicted_gib=memory["predicted_peak_bytes"] / 2**30,
        measured_gib=memory["measured_peak_bytes"] / 2**30,
        seconds=seconds,
        tokens_per_second=progress["tokens"] / progress["steps"] / seconds if progress["steps"] else math.nan,
    )


def _held_out(record: sinks.Record) -> float:
    losses = [value for name, value in record.items() if name.startswith("eval/") and name.endswith("/loss")]
    return math.fsum(losses) / len(losses) if losses else math.nan


def state_bytes(folder: Path) -> float:
    """Bytes of optimizer state in the newest checkpoint; NaN where a run keeps none."""
    from lowrank_opt.inspection import tensors

    kept = [path.parent for path in (folder / "checkpoints").glob("checkpoint-*/optimizer.json") if path.parent.suffix != ".old"]
    if not kept:
        return math.nan
    newest = max(kept, key=lambda path: int(path.name.rpartition("-")[2]))
    return float(sum(entry["bytes"] for entry in tensors(newest).values()))


def markdown(lines: Sequence[Line]) -> str:
    """The table for a document, best held-out loss first."""
    rows = [
        "| run | optimizer | lr | steps | held-out loss, first | last | state, MiB | peak predicted, GiB | measured | s/step | tokens/s |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|---|---|---|")
    rows += [
        f"| {line.run} | {line.optimizer} | {line.lr:g} | {line.steps} | {line.first_loss:.4f} | {line.last_loss:.4f} "
        f"| {line.state_mib:.1f} | {line.predicted_gib:.2f} | {line.measured_gib:.2f} | {line.seconds:.2f} | {line.tokens_per_second:.0f} |"
        for line in lines
    ]
    return "\n".join(rows)


def run(folders: Sequence[Path], config: CompareConfig) -> dict[str, Any]:
    """Print the table; write it and the picture where asked."""
    found = {folder: read(folder) for folder in folders}
    lines = sorted(found.values(), key=lambda line: (math.isnan(line.last_loss), line.last_loss))
    print(markdown(lines))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with config.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Line)])
            writer.writeheader()
            writer.writerows(asdict(line) for line in lines)
    if config.picture is not None:
        from lm_core.plot import plot_against

        plot_against(folders, config.picture, {folder: line.measured_gib for folder, line in found.items()})
    return {"runs": [asdict(line) for line in lines]}

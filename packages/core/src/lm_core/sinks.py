"""Where records go: the console, metrics.jsonl, TensorBoard, wandb."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lm_core.errors import InputError
from lm_core.progress import Budget, Progress, short

if TYPE_CHECKING:
    from lm_core.options import OutputOptions

logger = logging.getLogger(__name__)

Record = dict[str, float]
# A function of one record, called on rank 0. One that has `start(progress)` or `close()` is told of both ends of the run.
Sink = Callable[[Record], None]


def line(record: Record, budget: Budget, left: float | None = None) -> str:
    """One record for people; `left` is in seconds.

    >>> line({"step": 340, "tokens": 5e6, "train/loss": 2.3142, "optim/lr": 2.7e-4}, Budget.parse("20M tokens"), 190)
    'step 340  tokens 5.0M/20.0M  loss 2.314  lr 2.7e-4  left 0:03:10'
    """
    done = {**record, "steps": record["step"], "hours": record.get("seconds", 0.0) / 3600, "epochs": record.get("epoch", 0.0)}
    parts = []
    # steps and tokens always, every other unit where the budget limits it
    for unit in dict.fromkeys(["steps", *budget.limits, "tokens"]):
        amount = f"{done[unit]:.2f}" if unit in ("epochs", "hours") else short(done[unit])
        limit = f"/{short(budget.limits[unit])}" if unit in budget.limits else ""
        parts.append(f"{'step' if unit == 'steps' else unit} {amount}{limit}")
    if "train/loss" in record:
        parts.append(f"loss {record['train/loss']:.4g}")
    if "optim/lr" in record:
        parts.append(f"lr {scientific(record['optim/lr'])}")
    if "speed/tokens_per_second" in record:
        rate = record["speed/tokens_per_second"]
        parts.append(f"{short(float(f'{rate:.3g}'))} tokens/s")
    for name, value in record.items():
        if name.startswith("eval/") and name.endswith("/loss"):
            error = record.get(name.removesuffix("loss") + "standard_error", math.nan)
            parts.append(f"eval {name[5:-5]} {value:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else ""))
    if left is not None:
        parts.append(f"left {timedelta(seconds=round(left))}")
    return "  ".join(parts)


def scientific(number: float) -> str:
    """
    >>> [scientific(n) for n in (2.7e-4, 1.0, 0.0)]
    ['2.7e-4', '1.0e0', '0']
    """
    if number == 0:
        return "0"
    mantissa, _, exponent = f"{number:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


class Console:
    """A progress bar on a terminal, one line per record elsewhere; written to `stream` (default: standard output)."""

    def __init__(self, budget: Budget, epoch_samples: int | None, stream: TextIO | None = None) -> None:
        self.budget = budget
        self.epoch_samples = epoch_samples
        self.stream = sys.stdout if stream is None else stream
        self.bar: Any = _bar(self.stream) if self.stream.isatty() and os.environ.get("TERM") != "dumb" else None
        self.first = Progress()

    def start(self, progress: Progress) -> None:
        self.first = progress
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task("", total=1.0, completed=self.budget.fraction(progress, None, self.epoch_samples))

    def __call__(self, record: Record) -> None:
        progress = Progress.from_dict({**record, "steps": record["step"]})
        evaluation = any(name.startswith("eval/") for name in record)
        text = line(record, self.budget, None if evaluation else self.seconds_left(progress))
        if self.bar is None:
            print(text, file=self.stream, flush=True)
        elif evaluation:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            completed = self.budget.fraction(progress, None, self.epoch_samples)
            self.bar.update(self.bar.task_ids[0], description=text, completed=completed, refresh=True)

    def seconds_left(self, progress: Progress) -> float | None:
        """By the speed since this process began; None before there is any."""
        begun = self.budget.fraction(self.first, None, self.epoch_samples)
        done = self.budget.fraction(progress, None, self.epoch_samples)
        if done <= begun:
            return None
        return (1 - done) / (done - begun) * (progress.seconds - self.first.seconds)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _bar(stream: TextIO) -> Any:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
    # drawn with each record: redrawing ten times a second in a thread takes a hundredth of a core
    return Bar(*columns, console=Terminal(file=stream), auto_refresh=False)


class JsonLines:
    """Appends one JSON object per line. A number that is not finite becomes null, so that any JSON reader takes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None

    def start(self, progress: Progress) -> None:
        """Cut what was written after `progress`, and a last line that a crash tore."""
        rows = [row for row in read(self.path) if row["step"] + row["skipped"] <= progress.steps + progress.skipped]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        with fresh.open("w") as file:
            file.writelines(_json(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        self.file = self.path.open("a")

    def __call__(self, record: Record) -> None:
        assert self.file is not None, "start comes first"
        self.file.write(_json(record))
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _json(record: Record) -> str:
    return json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}) + "\n"


def read(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, null read as NaN; a torn last line is left out, a missing file is empty.

    Raises InputError naming any other line that is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # every whole line ends with a newline, so what follows the last one is torn
    rows = [_row(path, number, text) for number, text in enumerate(lines[:-1], 1) if text.strip()]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _row(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise InputError(f"{path}: line {number} is damaged; remove that line")
    return row


class TensorBoard:
    """Event files in `folder`/<time>_<host>. Steps are the axis; losses are also written against tokens (`<name>_on_tokens`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def start(self, progress: Progress) -> None:
        with _quiet_import():
            from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}_{socket.gethostname()}"))

    def __call__(self, record: Record) -> None:
        by_step = {name: value for name, value in record.items() if "/" in name}
        by_step |= {f"progress/{name}": record[name] for name in ("tokens", "flops", "epoch") if name in record}
        self._write(by_step, record["step"])
        self._write({f"{name}_on_tokens": value for name, value in record.items() if name.endswith("/loss")}, record["tokens"])

    def _write(self, values: dict[str, float], at: float) -> None:
        """All in one event: `add_scalar` makes one event each, which takes several times longer."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=entries), int(at))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Wandb:
    """Weights & Biases, into `folder`/wandb; a resumed run goes on under its old id. Without a key it stays offline."""

    def __init__(self, folder: Path, options: OutputOptions) -> None:
        self.folder = folder
        self.options = options
        self.run: Any = None

    def start(self, progress: Progress) -> None:
        with _quiet_import():
            import wandb
        from lm_core.config import to_dict

        online = self.options.wandb == "online"
        if online and not wandb.api.api_key:
            logger.warning("wandb: no key found, so this run is logged offline; set WANDB_API_KEY, or upload it later with `wandb sync`")
            online = False
        identity = self.folder / "wandb" / "id"
        identity.parent.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=self.options.wandb_project,
            group=self.options.wandb_group,
            name=self.options.run_name or self.folder.name,
            id=identity.read_text(),
            resume="allow",
            mode="online" if online else "offline",
            dir=self.folder,
            config=to_dict(self.options),
            settings=wandb.Settings(silent=True, console="off"),
        )
        for axis in ("step", "tokens", "flops"):
            self.run.define_metric(axis, hidden=True)
        self.run.define_metric("*", step_metric="step")

    def __call__(self, record: Record) -> None:
        self.run.log(record)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Deprecations inside a library that is being imported are not this run's business, even where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield

"""What the routers do in a run: numbers for the log, a heat map of their loads, and the speed per device."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_core import dist
from lm_core.errors import InputError
from lm_core.method import Batch
from lm_core.plot import drawing, plot_run, plot_runs
from lm_core.sinks import Record, read
from moe_cpt.routing import Routing

# L layers, N experts


class Meter:
    """Sums over one log interval of this rank, until `flush` adds up the ranks."""

    def __init__(self) -> None:
        self.load_LN: Tensor | None = None
        self.importance_LN: Tensor | None = None
        self.source_tokens: Tensor | None = None
        self.dropped: Tensor | None = None
        self.layers: list[int] = []
        self.last_load: list[list[float]] = []
        self.last_importance: list[list[float]] = []
        # where the data is; the clock runs from a step's first micro-batch to the next step's, unless something lies between
        self._place = (-1, -1)
        self._began: float | None = None
        self._step_tokens = 0
        self._timed = {"seconds": 0.0, "tokens": 0, "steps": 0}

    @property
    def last_step(self) -> int:
        """That of the last micro-batch; -1 before the first."""
        return self._place[0]

    def pause(self) -> None:
        """What follows until the next step is no training."""
        self._began = None

    def clear(self) -> None:
        """Forget the interval."""
        self.load_LN = self.importance_LN = self.source_tokens = self.dropped = None
        self._timed = {"seconds": 0.0, "tokens": 0, "steps": 0}

    def add(self, batch: Batch, tokens: int, routing: Routing, sources: int) -> None:
        """Count one micro-batch. One from before the last one starts anew: a run is estimated by training steps that are then undone."""
        step, place = self._place[0], (batch.step, int(batch.index[0]))
        if place <= self._place:
            self.clear()
            step, self._began = -1, None
        self._place = place
        self.layers = sorted(routing.gates)
        load, importance = routing.sums("count_N").detach(), routing.sums("importance_N").detach()
        self.load_LN = load if self.load_LN is None else self.load_LN + load
        self.importance_LN = importance if self.importance_LN is None else self.importance_LN + importance
        dropped = routing.sums("dropped").sum().detach().double()
        self.dropped = dropped if self.dropped is None else self.dropped + dropped
        if sources > 1:
            counts = torch.bincount(batch["source"], minlength=sources).double() * batch["input_ids"].shape[1]
            self.source_tokens = counts if self.source_tokens is None else self.source_tokens + counts
        if batch.step != step:
            now = time.monotonic()
            if self._began is not None:
                self._timed["seconds"] += now - self._began
                self._timed["tokens"] += self._step_tokens
                self._timed["steps"] += 1
            self._began, self._step_tokens = now, 0
        self._step_tokens += tokens

    def flush(self, sources: list[str], flops_per_token: float, flops_per_device: float | None) -> dict[str, float]:
        """Values of the interval over all ranks; speeds are those of this rank, without a share of an unknown peak."""
        values: dict[str, float] = {}
        if self.load_LN is not None and self.importance_LN is not None:
            load, importance = dist.all_sum(torch.stack([self.load_LN, self.importance_LN]).double()).unbind()
            self.last_load, self.last_importance = load.tolist(), importance.tolist()
            for layer, loads, importances in zip(self.layers, load, importance):
                values[f"moe/layer_{layer}/load"] = float(loads.max() / loads.mean())
                values[f"moe/layer_{layer}/importance"] = float(importances.max() / importances.mean())
            values["moe/dead_experts"] = float((load == 0).sum())
            assert self.dropped is not None
            values["moe/dropped_tokens"] = float(dist.all_sum(self.dropped))
        if self.source_tokens is not None:
            values |= {f"data/tokens/{name}": count for name, count in zip(sources, dist.all_sum(self.source_tokens).tolist())}
        if self._timed["steps"]:
            rate = self._timed["tokens"] / max(self._timed["seconds"], 1e-9)
            values["speed/tokens_per_gpu_second"] = rate
            values["speed/seconds_per_step"] = self._timed["seconds"] / self._timed["steps"]
            if flops_per_device is not None:
                values["speed/mfu"] = rate * flops_per_token / flops_per_device
        self.clear()
        return values


class RouterSink:
    """Keeps the tables of the last record as `router.json` and draws them when the run ends."""

    def __init__(self, meter: Meter, folder: Path) -> None:
        self.meter, self.folder = meter, folder

    def __call__(self, record: Record) -> None:
        if "moe/dead_experts" in record:
            tables = {"step": record["step"], "load": self.meter.last_load, "importance": self.meter.last_importance}
            (self.folder / "router.json").write_text(json.dumps(tables) + "\n")

    def close(self) -> None:
        if (self.folder / "router.json").exists():
            draw_tables(json.loads((self.folder / "router.json").read_text()), self.folder / "figures" / "router.png")


def draw_tables(tables: Mapping[str, list[list[float]]], path: Path) -> Path:
    """Heat maps of load and importance, layers by experts, each as a multiple of its layer's mean."""
    with drawing(path, width=10) as canvas:
        for axes, name in zip(canvas.subplots(1, 2), ("load", "importance")):
            table = torch.tensor(tables[name], dtype=torch.float64)
            relative = table / table.mean(1, keepdim=True).clamp(min=1e-12)
            image = axes.imshow(relative.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, float(relative.max())))
            axes.set_title(f"{name} / mean of the layer")
            axes.set_xlabel("expert")
            axes.set_ylabel("layer")
            axes.yaxis.get_major_locator().set_params(integer=True)
            canvas.colorbar(image, ax=axes)
    return path


def draw_loads(tables: Mapping[str, Mapping[str, list[list[float]]]], path: Path) -> Path:
    """Heat maps of the loads of several runs beside each other, on one scale, which ends at four times the mean."""
    columns = min(4, len(tables))
    lines = -(-len(tables) // columns)
    with drawing(path, width=3 * columns) as canvas:
        canvas.set_figheight(0.6 + 2.6 * lines)
        grid = canvas.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(tables) :]:
            axes.remove()
        for axes, (name, found) in zip(grid.flat, tables.items()):
            load = torch.tensor(found["load"], dtype=torch.float64)
            relative = load / load.mean(1, keepdim=True).clamp(min=1e-12)
            image = axes.imshow(relative.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=4)
            axes.set_title(name, fontsize=10)
            axes.label_outer()
        canvas.supxlabel("expert")
        canvas.supylabel("layer")
        canvas.colorbar(image, ax=list(grid.flat[: len(tables)]), extend="max", label="load / mean of the layer")
    return path


def compare(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Print a table of held-out losses, and draw losses, router loads and source shares of the runs into `out`.

    Raises InputError for a folder that is no run.
    """
    rows, pictures, routers = {}, [plot_runs(runs, out / "losses.png")], {}
    for run in runs:
        records = read(run / "metrics.jsonl")
        name = run.name if run.name != "run" else run.parent.name
        if name in rows:
            raise InputError(f"runs: two of them are called {name}; rename a folder")
        rows[name] = held_out(records)
        if (run / "router.json").is_file():
            routers[name] = json.loads((run / "router.json").read_text())
            pictures.append(draw_tables(routers[name], out / f"router-{name}.png"))
        drawn = {path.stem: path for path in plot_run(run)}
        if "weights" in drawn:
            pictures.append(out / f"weights-{name}.png")
            pictures[-1].write_bytes(drawn["weights"].read_bytes())
    if routers:
        pictures.append(draw_loads(routers, out / "loads.png"))
    table = markdown(rows)
    (out / "table.md").write_text(table)
    print(table, end="")
    return {"runs": rows, "pictures": [str(path) for path in pictures]}


def held_out(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By source the held-out loss before training and at its end, each with its standard error, and the tokens between."""
    found: dict[str, dict[str, float]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("eval/") and name.endswith("/loss") and f"{name.removesuffix('loss')}standard_error" in record:
                source = name.removeprefix("eval/").removesuffix("/loss")
                error = record[f"eval/{source}/standard_error"]
                entry = found.setdefault(source, {"before": value, "before_error": error})
                entry |= {"after": value, "after_error": error, "tokens": record["tokens"]}
    return found


def markdown(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The losses of all runs as a table."""
    sources = list(dict.fromkeys(source for losses in rows.values() for source in losses))
    heads = [f"{source} {when}" for source in sources for when in ("before", "after")]
    lines = ["| run | tokens | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for name, losses in rows.items():
        cells = []
        for source in sources:
            for when in ("before", "after"):
                entry = losses.get(source)
                cells.append("" if entry is None else f"{entry[when]:.3f} ± {entry[f'{when}_error']:.3f}")
        tokens = max((int(entry["tokens"]) for entry in losses.values()), default=0)
        lines.append(f"| {name} | {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

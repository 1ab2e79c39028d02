"""A study in one command: a grid of small runs of both objectives, laws, figures, and a report that says what was found."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_core.errors import RunFailed, UserError
from mdm_scaling import plots, sizes, sweep
from mdm_scaling.analysis import StudyConfig
from mdm_scaling.fit import chinchilla, constrained, crossover
from mdm_scaling.fit.laws import Law
from mdm_scaling.fit.points import Point, read_points

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repeats:
    """Runs on the first `unique_tokens` of the data, seen so many times."""

    unique_tokens: int
    epochs: tuple[int, ...]
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """What a study trains: sizes at budgets with all data once, and sizes on little data for several epochs."""

    single: tuple[tuple[float, tuple[str, ...]], ...]
    repeated: tuple[Repeats, ...]


# the single-epoch runs stay below the 440 thousand training bytes of builtin:python-docs
GRIDS = {
    "quick": Grid(
        single=((2e10, ("20k", "40k", "80k")), (5e10, ("20k", "40k", "80k"))),
        repeated=(Repeats(4_096, (2, 8, 32), ("20k", "80k")),),
    ),
    "laptop": Grid(
        single=(
            (2.4e10, ("20k", "40k", "80k")),
            (5e10, ("20k", "40k", "80k", "170k")),
            (1.1e11, ("40k", "80k", "170k", "390k")),
            (2.4e11, ("80k", "170k", "390k")),
        ),
        repeated=(
            Repeats(4_096, (16, 64, 128), ("170k",)),
            Repeats(16_384, (4, 16, 64), ("40k", "170k")),
            Repeats(65_536, (2, 8), ("170k",)),
        ),
    ),
}
BASE = {
    "tokenizer": "bytes",
    "max_length": 64,
    "micro_batch_size": 16,
    "global_batch_size": 16,
    "precision": "fp32",
    "lr": 3e-3,
    "warmup": 0.1,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "eval_every": "0.125",
    "eval_iters": 16,
    "num_mc": 2,
    "save_every": "never",
    "tensorboard": False,
    "num_workers": 0,
    "log_every": 100,
}


def manifest(preset: str, data: str) -> list[dict[str, Any]]:
    """The runs of a study, cheapest first, so that `left` is overestimated rather than underestimated."""
    grid, base = GRIDS[preset], {**BASE, "data": [data]}
    entries = [entry for budget, names in grid.single for entry in sweep.grid("isoflop", base, flops=[budget], presets=names)]
    for group in grid.repeated:
        for name in group.sizes:
            count = sizes.ALL[name].nominal
            # budgets that are so many epochs of the unique tokens
            for epochs in group.epochs:
                flops = 6.0 * count * group.unique_tokens * epochs
                entries += sweep.grid("data-value", base, flops=[flops], epochs=[epochs], presets=[name])
    return sorted(entries, key=lambda entry: _cost(entry["config"]))


def _cost(config: dict[str, Any]) -> float:
    tokens = (
        config["unique_tokens"] * config["epochs"] if config["unique_tokens"] else config["flops"] / 6 / sizes.ALL[config["model"]].nominal
    )
    return float(tokens * sizes.ALL[config["model"]].nominal)


def run(config: StudyConfig) -> dict[str, Any]:
    """Train what is missing, fit, draw, and write `report.md`."""
    began = time.monotonic()
    entries = manifest(config.preset, config.data)
    sweep.write(config.out / "manifest.jsonl", entries)
    states = sweep.start(entries, config.out / "runs", jobs=config.jobs)
    failed = [name for name, state in states.items() if state != "done"]
    if failed:
        raise RunFailed(
            f"study: {len(failed)} of {len(states)} runs failed, first {config.out / 'runs' / failed[0]} (see log.txt there); run the command again to go on"
        )
    sweep.collect([config.out / "runs"], config.out / "runs.csv")
    points = read_points(config.out / "runs.csv")
    laws = {objective: law for objective in ("ar", "mdm") if (law := _law(points, objective, config.out)) is not None}
    amounts = [group.unique_tokens for group in GRIDS[config.preset].repeated]
    crossings = [crossover.empirical(points, U) for U in amounts]
    plots.isoflop([point for point in points if point.epochs <= constrained.SINGLE_EPOCH], config.out / "isoflop.png")
    plots.frontier([point for point in points if point.epochs <= constrained.SINGLE_EPOCH], config.out / "frontier.png")
    plots.data_value(
        [point for point in points if point.epochs > constrained.SINGLE_EPOCH], config.out / "data_value.png", list(laws.values())
    )
    plots.crossing(crossings, config.out / "crossover.png")
    minutes = (time.monotonic() - began) / 60
    (config.out / "report.md").write_text(report(config, points, laws, crossings, minutes))
    print(f"{config.out / 'report.md'}: {len(points)} runs, {minutes:.1f} minutes in this call")
    return {"report": str(config.out / "report.md"), "runs": len(points), "laws": sorted(laws), "minutes": minutes}


def _law(points: list[Point], objective: str, folder: Path) -> Law | None:
    """The data-constrained law of one objective, written beside the table; None where the runs do not identify one."""
    mine = [point for point in points if point.objective == objective]
    try:
        law = constrained.fit(mine, objective=objective, name=objective, bootstrap=200)
    except UserError as error:
        logger.warning("no law for %s: %s", objective, error)
        return None
    (folder / f"law_{objective}.json").write_text(law.to_json())
    return law


def report(config: StudyConfig, points: list[Point], laws: dict[str, Law], crossings: list[crossover.Crossing], minutes: float) -> str:
    """The study in Markdown."""
    lines = [
        f"# Masked diffusion and next-token prediction on {config.data}",
        "",
        (
            f"{len(points)} runs of the study `{config.preset}` ({minutes:.1f} minutes in the call that finished it, {config.jobs} at a time). Losses are in nats per byte on "
            "held-out text; those of masked diffusion (mdm) are upper bounds on the negative log-likelihood, those of next-token prediction (ar) are exact."
        ),
        "",
        "## All data once",
        "",
        "![iso-FLOP curves](isoflop.png)",
        "![loss over compute](frontier.png)",
        "",
        "| objective | FLOPs | best size tried | its loss | vertex of the parabola |",
        "|---|---|---|---|---|",
    ]
    single = [point for point in points if point.epochs <= constrained.SINGLE_EPOCH]
    for objective in plots.objectives(single):
        for parabola in chinchilla.parabolas([point for point in single if point.objective == objective]):
            best = min(parabola.points, key=lambda point: point.loss)
            vertex = f"N = {parabola.N:.3g}" if parabola.N else parabola.status
            lines.append(f"| {objective} | {parabola.C:.2g} | {best.N:,.0f} | {best.loss:.4f} ± {best.se:.4f} | {vertex} |")
    lines += [
        "",
        "## Little data, many times",
        "",
        "![loss over epochs](data_value.png)",
        "",
        "| unique bytes | epochs | N | ar | mdm | lower |",
        "|---|---|---|---|---|---|",
    ]
    lines += _pairs([point for point in points if point.epochs > constrained.SINGLE_EPOCH])
    lines += ["", "## Where masked diffusion begins to win", "", "![critical compute](crossover.png)", ""]
    for crossing in crossings:
        if crossing.flops:
            spread = f" (95 % interval {crossing.low:.2g} to {crossing.high:.2g})" if crossing.low and crossing.high else ""
            lines.append(
                f"- {crossing.U:,.0f} unique bytes: {crossing.winner} has the lower best loss beyond {crossing.flops:.2g} FLOPs{spread}."
            )
        else:
            lines.append(f"- {crossing.U:,.0f} unique bytes: no crossing in the range of the runs; {crossing.winner} is lower all over.")
    lines += [
        "",
        "## Laws",
        "",
        "| objective | E | A | B | alpha | beta | K_D | K_N | R² | points |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(law) for law in laws.values()]
    lines += [
        "",
        "Weakly identified constants are marked *; such a small grid cannot settle them. Files: `runs.csv`, `law_*.json`, a CSV beside each picture.",
        "",
    ]
    return "\n".join(lines)


def _pairs(points: list[Point]) -> list[str]:
    """Rows with the loss of both objectives for the same data, epochs and size."""
    cells: dict[tuple[float, int, float], dict[str, Point]] = {}
    for point in points:
        cells.setdefault((float(f"{point.U:.2g}"), round(point.epochs), point.N), {})[point.objective] = point
    rows = []
    for (_, epochs, N), pair in sorted(cells.items()):
        if set(pair) == {"ar", "mdm"}:
            ar, mdm = pair["ar"], pair["mdm"]
            lower = "ar" if ar.loss < mdm.loss else "mdm"
            rows.append(f"| {ar.U:,.0f} | {epochs} | {N:,.0f} | {ar.loss:.4f} ± {ar.se:.4f} | {mdm.loss:.4f} ± {mdm.se:.4f} | {lower} |")
    return rows


def _row(law: Law) -> str:
    weak = law.about.get("weakly_identified", [])
    decays = [f"{getattr(law, name):.3g}{'*' if name in weak else ''}" for name in ("K_D", "K_N")]
    numbers = [f"{math.exp(law.e):.3g}", f"{math.exp(law.a):.3g}", f"{math.exp(law.b):.3g}", f"{law.alpha:.3g}", f"{law.beta:.3g}", *decays]
    return f"| {law.objective} | {' | '.join(numbers)} | {law.about['r2']:.3f} | {law.about['n_points']} |"

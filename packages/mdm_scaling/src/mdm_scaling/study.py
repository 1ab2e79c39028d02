"""A study in one command: a grid of small runs of both objectives, laws, figures, and a report that says what was found."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_core.errors import RunFailed, UserError
from mdm_scaling import plots, sizes, sweep
from mdm_scaling.analysis import StudyConfig
from mdm_scaling.fit import chinchilla, constrained, crossover
from mdm_scaling.fit.crossover import Crossing
from mdm_scaling.fit.laws import Law, power
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


# budgets of which whole updates of all their sizes leave next to nothing, or their runs would not be of one budget;
# the single-epoch runs stay below the 440 thousand training bytes of builtin:python-docs
GRIDS = {
    "quick": Grid(
        single=((1.95e10, ("20k", "40k", "80k")), (4.68e10, ("20k", "40k", "80k"))),
        repeated=(Repeats(4_096, (2, 8, 32), ("20k", "80k")),),
    ),
    "laptop": Grid(
        single=((5e10, ("20k", "40k", "80k")), (1.1e11, ("40k", "80k", "170k")), (2.4e11, ("80k", "170k", "390k"))),
        repeated=(Repeats(4_096, (16, 64, 128), ("170k",)), Repeats(16_384, (4, 16, 64), ("170k",))),
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
    "eval_every": "0.2",
    "eval_iters": 16,
    "num_mc": 2,
    "save_every": "never",
    "keep_best": False,
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
    points, ended = (read_points(config.out / "runs.csv", loss=loss) for loss in ("best", "final"))
    laws = {objective: law for objective in ("ar", "mdm") if (law := _law(points, objective, config.out)) is not None}
    amounts = [group.unique_tokens for group in GRIDS[config.preset].repeated]
    crossings = [crossover.empirical(points, U) for U in amounts]
    ends = [crossing for U in amounts for crossing in crossover.at_the_end(ended, U)]
    single, repeated = _single(points), [point for point in points if point.epochs > constrained.SINGLE_EPOCH]
    plots.isoflop(single, config.out / "isoflop.png")
    plots.frontier(single, config.out / "frontier.png")
    plots.data_value(repeated, config.out / "data_value.png", _drawn(laws))
    plots.data_value([point for point in ended if point.epochs > constrained.SINGLE_EPOCH], config.out / "data_value_end.png")
    plots.residuals(points, list(laws.values()), config.out / "residuals.png")
    plots.crossing(crossings, config.out / "crossover.png", ends)
    minutes = (time.monotonic() - began) / 60
    (config.out / "report.md").write_text(report(config, points, ended, laws, crossings, ends, minutes))
    print(f"{config.out / 'report.md'}: {len(points)} runs, {minutes:.1f} minutes in this call")
    return {"report": str(config.out / "report.md"), "runs": len(points), "laws": sorted(laws), "minutes": minutes}


def _drawn(laws: dict[str, Law]) -> list[Law]:
    """Those that describe their runs better than the mean loss does."""
    return [law for law in laws.values() if law.about["r2"] > 0]


def _single(points: list[Point]) -> list[Point]:
    return [point for point in points if point.epochs <= constrained.SINGLE_EPOCH]


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


def report(
    config: StudyConfig, points: list[Point], ended: list[Point], laws: dict[str, Law], crossings: list[Crossing], ends: list[Crossing], minutes: float
) -> str:  # fmt: skip
    """The study in Markdown. `points` have the lowest held-out loss of each run, `ended` the last one."""
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
    single = _single(points)
    for objective in plots.objectives(single):
        for parabola in chinchilla.parabolas([point for point in single if point.objective == objective]):
            best = min(parabola.points, key=lambda point: point.loss)
            vertex = f"N = {parabola.N:.3g}" if parabola.N else parabola.status
            lines.append(f"| {objective} | {parabola.C:.2g} | {best.N:,.0f} | {best.loss:.4f} ± {best.se:.4f} | {vertex} |")
    lines += [
        "",
        "## Little data, many times",
        "",
        "The lowest held-out loss of a run (as if it had been stopped there), and the loss at its end.",
        "",
        "![lowest loss over epochs](data_value.png)",
        "![loss at the end over epochs](data_value_end.png)",
        "",
        "| unique bytes | epochs | N | ar, lowest | mdm, lowest | ar, at the end | mdm, at the end |",
        "|---|---|---|---|---|---|---|",
        *_pairs(points, ended),
        "",
        "## Where masked diffusion begins to win",
        "",
        "![critical compute](crossover.png)",
        "",
        "By the lowest loss that any run of at most so much compute had:",
        "",
        *map(_sentence, crossings),
        "",
        "By the loss at the end, both models of one size and with the same compute:",
        "",
        *map(_sentence, ends),
        "",
        "## Laws",
        "",
        "Of the lowest losses, L = E + A/N'^alpha + B/D'^beta with N' and D' discounted by K_N and K_D.",
        "",
        "![residuals](residuals.png)",
        "",
        "| objective | E | A | B | alpha | beta | K_D | K_N | R² | points |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_row, laws.values()),
        "",
        (
            "Constants marked * are weakly identified: values a factor of ten apart fit as well. A law with a negative R² describes the runs worse "
            "than their mean does, and is left out of the pictures of losses. Files: `runs.csv`, `law_*.json`, a CSV beside each picture."
        ),
        "",
    ]
    return "\n".join(lines)


def _sentence(crossing: Crossing) -> str:
    where = f"- {crossing.U:,.0f} unique bytes" + (f", N = {crossing.N:,.0f}" if crossing.N else "")
    if not crossing.flops:
        return f"{where}: no crossing in the range of the runs; {crossing.winner} is lower all over."
    spread = f" (95 % interval {crossing.low:.2g} to {crossing.high:.2g})" if crossing.low and crossing.high else ""
    epochs = f", {crossing.flops / 6 / crossing.N / crossing.U:.0f} epochs" if crossing.N else ""
    return f"{where}: {crossing.winner} has the lower loss beyond {crossing.flops:.2g} FLOPs{epochs}{spread}."


def _pairs(points: list[Point], ended: list[Point]) -> list[str]:
    """Rows with the losses of both objectives for the same data, epochs and size."""
    cells: dict[tuple[float, int, float], dict[str, tuple[Point, Point]]] = {}
    for point, last in zip(points, ended, strict=True):
        if point.epochs > constrained.SINGLE_EPOCH:
            cells.setdefault((float(f"{point.U:.2g}"), round(point.epochs), point.N), {})[point.objective] = point, last
    rows = []
    for (_, epochs, N), pair in sorted(cells.items()):
        if set(pair) == {"ar", "mdm"}:
            lowest, at_end = zip(pair["ar"], pair["mdm"])
            losses = [f"{point.loss:.4f} ± {point.se:.4f}" for point in lowest] + [f"{point.loss:.4f}" for point in at_end]
            rows.append(f"| {pair['ar'][0].U:,.0f} | {epochs} | {N:,.0f} | {' | '.join(losses)} |")
    return rows


def _row(law: Law) -> str:
    weak = law.about.get("weakly_identified", [])
    decays = [f"{getattr(law, name):.3g}{'*' if name in weak else ''}" for name in ("K_D", "K_N")]
    numbers = [*(power(log) for log in (law.e, law.a, law.b)), f"{law.alpha:.3g}", f"{law.beta:.3g}", *decays]
    return f"| {law.objective} | {' | '.join(numbers)} | {law.about['r2']:.3f} | {law.about['n_points']} |"

"""Figures of runs and laws: PNG files with the plotted numbers beside them as CSV, the same bytes for the same input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lm_core.errors import InputError
from mdm_scaling.fit import chinchilla, crossover
from mdm_scaling.fit.crossover import Crossing
from mdm_scaling.fit.laws import Law, published_critical_flops
from mdm_scaling.fit.points import Point, write_table

# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = {"ar": "#0072B2", "mdm": "#D55E00"}
SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BOUND = "masked diffusion: upper bound"


@contextmanager
def figure(out: Path, title: str, x: str, y: str, panels: int = 1) -> Iterator[Any]:
    """Axes of a new figure, saved when done."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(1, panels, figsize=(6.4 * panels, 4.4), layout="constrained", squeeze=False, sharey=True)
    made.suptitle(title)
    for axis in axes[0]:
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(y)
    yield axes[0] if panels > 1 else axes[0][0]
    out.parent.mkdir(parents=True, exist_ok=True)
    # neither dates nor versions, so that equal input gives equal bytes
    made.savefig(out, dpi=120, metadata={"Software": None})
    pyplot.close(made)


def numbers(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The plotted numbers, beside the picture."""
    write_table(out.with_suffix(".csv"), rows, list(rows[0]) if rows else [])


def label(objective: str) -> str:
    """The name of an objective in a legend; a bound is called one."""
    return BOUND if objective == "mdm" else "autoregressive"


def objectives(points: Sequence[Point]) -> list[str]:
    return [objective for objective in ("ar", "mdm") if any(point.objective == objective for point in points)]


def isoflop(points: Sequence[Point], out: Path) -> None:
    """Loss over size at each budget, with parabolas and their vertices."""
    kinds, rows = objectives(points), []
    with figure(out, "Iso-FLOP curves", "parameters N", "held-out loss (nats/token)", len(kinds)) as axes:
        for axis, objective in zip(np.atleast_1d(axes), kinds):
            axis.set_xscale("log")
            axis.set_title(label(objective))
            for number, parabola in enumerate(chinchilla.parabolas([point for point in points if point.objective == objective])):
                colour = SHADES[number % len(SHADES)]
                N = [point.N for point in parabola.points]
                axis.errorbar(
                    N,
                    [point.loss for point in parabola.points],
                    [_se(point) for point in parabola.points],
                    fmt="o",
                    color=colour,
                    label=f"{parabola.C:.1e}",
                )
                if parabola.coefficients is not None:
                    x = np.linspace(math.log10(min(N)), math.log10(max(N)), 80)
                    axis.plot(10**x, np.polyval(parabola.coefficients, x), color=colour)
                if parabola.N is not None and parabola.coefficients is not None:
                    axis.plot([parabola.N], [np.polyval(parabola.coefficients, math.log10(parabola.N))], "*", color=colour, markersize=13)
                rows += [
                    {
                        "objective": objective,
                        "C": parabola.C,
                        "N": point.N,
                        "loss": point.loss,
                        "vertex_N": parabola.N,
                        "status": parabola.status,
                    }
                    for point in parabola.points
                ]
            axis.legend(title="FLOPs", fontsize=8)
    numbers(out, rows)


def _se(point: Point) -> float:
    return 0.0 if math.isnan(point.se) else point.se


def frontier(points: Sequence[Point], out: Path) -> None:
    """Loss over compute, with the running minimum of each objective."""
    rows = []
    with figure(out, "Loss and compute", "FLOPs C", "held-out loss (nats/token)") as axis:
        axis.set_xscale("log")
        for objective in objectives(points):
            mine = sorted((point for point in points if point.objective == objective), key=lambda point: point.C)
            lowest = np.minimum.accumulate([point.loss for point in mine])
            axis.errorbar([p.C for p in mine], [p.loss for p in mine], [_se(p) for p in mine], fmt="o", alpha=0.5, color=COLOURS[objective])
            axis.step([p.C for p in mine], lowest, where="post", color=COLOURS[objective], label=label(objective))
            rows += [
                {"objective": objective, "C": p.C, "N": p.N, "D": p.D, "loss": p.loss, "lowest": float(low)} for p, low in zip(mine, lowest)
            ]
        axis.legend()
    numbers(out, rows)


def data_value(points: Sequence[Point], out: Path, laws: Sequence[Law] = ()) -> None:
    """Loss over epochs, a panel for each amount of unique data; laws as dotted lines."""
    series: dict[tuple[float, float, str], list[Point]] = {}
    for point in points:
        series.setdefault((float(f"{point.U:.2g}"), point.N, point.objective), []).append(point)
    series = {key: sorted(group, key=lambda point: point.epochs) for key, group in sorted(series.items()) if len(group) > 1}
    if not series:
        raise InputError("runs: no two runs share size and unique tokens; a curve over epochs needs them")
    amounts, sizes = sorted({key[0] for key in series}), sorted({key[1] for key in series})
    rows = []
    with figure(out, "What repeated data is worth", "epochs", "held-out loss (nats/token)", len(amounts)) as axes:
        for (U, N, objective), group in series.items():
            axis, colour = np.atleast_1d(axes)[amounts.index(U)], SHADES[sizes.index(N) % len(SHADES)]
            axis.set_xscale("log")
            axis.set_title(f"{group[0].U:,.0f} unique tokens", fontsize=10)
            axis.set_xticks(sorted({round(point.epochs) for point in group}), minor=False)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
            epochs, lost, spread = zip(*((point.epochs, point.loss, _se(point)) for point in group))
            axis.errorbar(
                epochs, lost, spread, fmt="o-" if objective == "ar" else "s--", color=colour, label=f"{objective}  N {N:.2g}", markersize=4
            )
            for law in laws:
                if law.objective == objective:
                    x = np.geomspace(group[0].epochs, group[-1].epochs, 60)
                    axis.plot(x, law.loss(N, x * group[0].U, group[0].U), ":", color=colour, linewidth=1)
            rows += [{"objective": objective, "N": N, "U": p.U, "epochs": p.epochs, "loss": p.loss, "se": p.se} for p in group]
        for axis in np.atleast_1d(axes):
            axis.legend(fontsize=7, handlelength=4, title="masked diffusion (mdm): upper bound", title_fontsize=7)
    numbers(out, rows)


def crossing(crossings: Sequence[Crossing], out: Path, ends: Sequence[Crossing] = ()) -> None:
    """Critical compute over unique data: above it masked diffusion wins; `ends` compares models of one size without early stopping."""
    kinds = [("lowest loss so far", list(crossings)), ("loss at the end of training", list(ends))]
    rows = [
        {"loss": kind, "U": c.U, "N": c.N, "flops": c.flops, "low": c.low, "high": c.high, "winner": c.winner}
        for kind, cs in kinds
        for c in cs
    ]
    with figure(out, "Compute beyond which one objective wins", "unique tokens U", "critical FLOPs") as axis:
        axis.set_xscale("log")
        axis.set_yscale("log")
        every = [*crossings, *ends]
        x = np.geomspace(min(c.U for c in every) / 2, max(c.U for c in every) * 2, 40)
        axis.plot(x, [published_critical_flops(u) for u in x], ":", color="#000000", label="Prabhudesai et al. 2025")
        for (kind, found), fill in zip(kinds, (COLOURS["mdm"], "none")):
            for objective in ("mdm", "ar"):
                for number, c in enumerate(known := [c for c in found if c.flops and c.winner == objective]):
                    assert c.flops
                    spread = [[c.flops - (c.low or c.flops)], [(c.high or c.flops) - c.flops]]
                    shade = COLOURS[objective]
                    axis.errorbar(
                        [c.U], [c.flops], np.maximum(spread, 0), fmt="o", color=shade, markerfacecolor=shade if fill != "none" else fill,
                        label=None if number else f"{kind}: {objective} wins beyond",
                    )  # fmt: skip
                if objective == "mdm" and (law := crossover.power_law(known)) is not None:
                    axis.plot(x, 10 ** (law[0] + law[1] * np.log10(x)), color=COLOURS["mdm"], label=f"C = 10^{law[0]:.2f} U^{law[1]:.2f}")
            for objective, mark in (("ar", "^"), ("mdm", "v")):
                open_ended = [c for c in found if not c.flops and c.compared and c.winner == objective]
                if open_ended:
                    # the crossing lies beyond what was compared, if there is one
                    shade = COLOURS[objective]
                    axis.plot(
                        [c.U for c in open_ended], [c.compared for c in open_ended], mark, color=shade, markerfacecolor=shade if fill != "none" else fill,
                        label=f"{kind}: {objective} wins, up to here",
                    )  # fmt: skip
        axis.legend(fontsize=8)
    numbers(out, rows)


def residuals(points: Sequence[Point], laws: Sequence[Law], out: Path) -> None:
    """Measured over predicted loss against epochs."""
    rows = []
    with figure(out, "Residuals", "epochs", "log measured - log predicted") as axis:
        axis.set_xscale("log")
        axis.axhline(0, color="#000000", linewidth=0.8)
        for law in laws:
            mine = [point for point in points if point.objective == law.objective]
            difference = [math.log(p.loss) - math.log(float(law.loss(p.N, p.D, p.U))) for p in mine]
            axis.plot(
                [p.epochs for p in mine], difference, "o", alpha=0.6, color=COLOURS[law.objective], label=f"{law.name} ({law.objective})"
            )
            rows += [
                {"law": law.name, "objective": law.objective, "N": p.N, "D": p.D, "U": p.U, "epochs": p.epochs, "residual": r}
                for p, r in zip(mine, difference)
            ]
        axis.legend()
    numbers(out, rows)


def contour(law: Law, U: float, out: Path) -> None:
    """The loss of a law over epochs and parameters, for so many unique tokens."""
    epochs, N = (
        np.geomspace(1, 100, 61),
        np.geomspace(law.allocate(6 * U * 1e3, U)[0] / 100, law.allocate(6 * U * 1e3, U)[0] * 10 + 1e4, 61),
    )
    grid = law.loss(N[:, None], U * epochs[None, :], U)
    with figure(out, f"{law.name}: loss for {U:.3g} unique tokens", "epochs", "parameters N") as axis:
        axis.set_xscale("log")
        axis.set_yscale("log")
        drawn = axis.contour(epochs, N, grid, levels=16, cmap="viridis")
        axis.clabel(drawn, fontsize=7)
    numbers(out, [{"epochs": float(e), "N": float(n), "loss": float(grid[i, j])} for i, n in enumerate(N) for j, e in enumerate(epochs)])

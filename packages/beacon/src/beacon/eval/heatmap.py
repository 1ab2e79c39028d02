"""Scores by length and depth as a picture and as a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def cells(items: Iterable[Mapping[str, Any]], score: str) -> dict[tuple[int, int], float]:
    """Mean score by (length, depth)."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for item in items:
        found[item["length"], item["depth"]].append(item[score])
    return {place: sum(values) / len(values) for place, values in sorted(found.items())}


def draw(panels: Mapping[str, Mapping[tuple[int, int], float]], path: Path, label: str) -> None:
    """One heat map per panel, side by side: x length, y depth, red to green from 0 to 1, each value written into its cell."""
    from matplotlib.figure import Figure

    lengths, depths = axes_of(panels)
    figure = Figure(
        figsize=(1.6 + len(panels) * max(2.5, 0.55 * len(lengths) + 0.6), 1.2 + 0.35 * max(3, len(depths))), layout="constrained"
    )
    row: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, values) in zip(row, panels.items()):
        table = [[values.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(table, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if value == value:
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=60, fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths], fontsize=7)
        axes.set_xlabel("context (tokens)")
        axes.set_title(name, fontsize=9)
    row[0].set_ylabel("depth in the haystack")
    figure.colorbar(image, ax=list(row), label=label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def axes_of(panels: Mapping[str, Mapping[tuple[int, int], float]]) -> tuple[Sequence[int], Sequence[int]]:
    places = {place for values in panels.values() for place in values}
    return sorted({length for length, _ in places}), sorted({depth for _, depth in places})

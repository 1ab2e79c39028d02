"""Figures from metrics.jsonl: the same bytes for the same records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_core.errors import InputError
from lm_core.progress import short
from lm_core.sinks import Record, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# told apart by colour-blind readers and in print (Okabe and Ito, "Color Universal Design", 2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvpd"

Curve = tuple[list[float], list[float]]


def plot_run(folder: Path) -> list[Path]:
    """Draw loss, learning rate, gradient norm, speed and source weights of one run into `folder`/figures, each if it was logged."""
    records = read(folder / "metrics.jsonl")
    sources = _names(records, "eval/", "/loss")
    weights = _names(records, "data/weight/")
    draw: dict[str, Callable[[Axes], None]] = {}
    if any("train/loss" in record or sources for record in records):
        draw["loss"] = lambda axes: _losses(axes, records, sources)
    for name, metric, label in (
        ("lr", "optim/lr", "learning rate"),
        ("grad_norm", "optim/grad_norm", "gradient norm"),
        ("speed", "speed/tokens_per_second", "tokens per second"),
    ):
        if _finite(_curve(records, metric)):
            draw[name] = lambda axes, metric=metric, label=label: _single(axes, _curve(records, metric), label)  # type: ignore[misc]
    if weights:
        draw["weights"] = lambda axes: _weights(axes, records, weights)
    paths = []
    for name, curve in draw.items():
        with drawing(folder / "figures" / f"{name}.png") as figure:
            axes = figure.subplots()
            curve(axes)
            _tokens(axes)
            paths.append(folder / "figures" / f"{name}.png")
    return paths


def plot_runs(folders: Sequence[Path], out: Path) -> Path:
    """Training and held-out loss of several runs, each in one colour and line, side by side in the picture `out`.

    The held-out loss is the plain mean over the sources. Raises InputError naming a folder without records.
    """
    runs = {name: read(folder / "metrics.jsonl") for name, folder in zip(_short_names(folders), folders)}
    for folder, records in zip(folders, runs.values()):
        if not records:
            raise InputError(f"runs: {folder} has no records in metrics.jsonl; give folders of runs that have logged at least once")
    with drawing(out, width=12) as figure:
        left, right = figure.subplots(1, 2)
        for number, (name, records) in enumerate(runs.items()):
            line, marked = _styles(number)
            _smoothed(left, _curve(records, "train/loss"), name, **line)
            right.plot(*_held_out(records), **marked, markersize=4, label=name)
        for axes, title in ((left, "training loss"), (right, "held-out loss")):
            axes.set_ylabel(f"{title} (nats per target)")
            _tokens(axes)
        if len(runs) > len(COLOURS):
            # so many names would lie on the curves
            right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
        else:
            for axes in (left, right):
                if axes.lines:
                    axes.legend(frameon=False)
    return out


def _styles(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the line of a run looks, without marks and with them."""
    line = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}
    marked = {**line, "marker": MARKERS[number % len(MARKERS)]}
    if number >= len(COLOURS):
        # colours and markers begin anew: hollow ones
        marked["markerfacecolor"] = "white"
    return line, marked


def plot_against(folders: Sequence[Path], out: Path, peak_gib: Mapping[Path, float]) -> Path:
    """Several runs in the picture `out`: training loss against steps, held-out loss against time, and the last held-out loss
    against the peak of memory (`peak_gib` by folder), where a run stands lower and further left the better it is.

    Raises InputError naming a folder without records.
    """
    with drawing(out, width=16) as figure:
        by_step, by_time, by_memory = figure.subplots(1, 3)
        for number, (name, folder) in enumerate(zip(_short_names(folders), folders)):
            records = read(folder / "metrics.jsonl")
            if not records:
                raise InputError(f"runs: {folder} has no records in metrics.jsonl; give folders of runs that have logged at least once")
            line, marked = _styles(number)
            marked |= {"label": name, "markersize": 5}
            by_step.plot(*_curve(records, "train/loss", "step"), **line, linewidth=1.2)
            held_out = _held_out(records, "seconds")
            by_time.plot(*held_out, **marked)
            if folder in peak_gib and held_out[1]:
                by_memory.plot([peak_gib[folder]], held_out[1][-1:], **{**marked, "linestyle": "none", "markersize": 8})
        for axes, across, title in (
            (by_step, "steps", "training loss"),
            (by_time, "seconds of training", "held-out loss"),
            (by_memory, "peak of memory, GiB", "last held-out loss"),
        ):
            axes.set_ylabel(f"{title} (nats per target)")
            _plain(axes)
            axes.set_xlabel(across)
        by_memory.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return out


@contextmanager
def drawing(path: Path, width: float = 8.0) -> Iterator[Figure]:
    """A figure that is written to `path`. Neither the user's style nor the display plays a part."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context("default", after_reset=True):
        figure = Figure(figsize=(width, 5.0), dpi=120, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        # the version of the library must not change the bytes
        canvas.print_png(path, metadata={"Software": None})  # type: ignore[no-untyped-call]


def _losses(axes: Axes, records: list[Record], sources: list[str]) -> None:
    _smoothed(axes, _curve(records, "train/loss"), "training", color="#555555")
    for number, source in enumerate(sources):
        held_out = _curve(records, f"eval/{source}/loss")
        errors = dict(zip(*_curve(records, f"eval/{source}/standard_error")))
        axes.errorbar(
            *held_out,
            # one batch has no standard error, and no bar
            yerr=[error if math.isfinite(error := errors.get(at, math.nan)) else 0.0 for at in held_out[0]],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            capsize=3,
            label=f"held out: {source} (± standard error)",
        )
    axes.set_ylabel("loss (nats per target)")
    axes.legend(frameon=False)


def _single(axes: Axes, curve: Curve, label: str) -> None:
    axes.plot(*curve, color=COLOURS[0])
    axes.set_ylabel(label)
    positive = [value for value in curve[1] if value > 0]
    if label == "gradient norm" and positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _weights(axes: Axes, records: list[Record], sources: list[str]) -> None:
    for number, source in enumerate(sources):
        curve = _curve(records, f"data/weight/{source}")
        # a weight holds until it is moved
        axes.step(
            *curve, where="post", color=COLOURS[number % len(COLOURS)], linestyle=("-", "--", ":")[number // len(COLOURS) % 3], label=source
        )
    axes.set_ylabel("source weight")
    axes.set_ylim(0, None)
    axes.legend(frameon=False)


def _smoothed(axes: Axes, curve: Curve, label: str, **style: Any) -> None:
    """The curve; a long one pale, under its centred running mean."""
    tokens, values = curve
    reach = len(values) // 100
    if reach == 0:
        axes.plot(tokens, values, **style, linewidth=1.2, label=label)
        return
    axes.plot(tokens, values, **style, linewidth=0.6, alpha=0.3)
    means = []
    for centre in range(len(values)):
        near = [value for value in values[max(0, centre - reach) : centre + reach + 1] if math.isfinite(value)]
        means.append(math.fsum(near) / len(near) if near else math.nan)
    axes.plot(tokens, means, **style, linewidth=1.5, label=f"{label}, running mean")


def _tokens(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(lambda value, position: short(value))
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(records: list[Record], name: str, across: str = "tokens") -> Curve:
    points = [(record[across], record[name]) for record in records if name in record]
    return [at for at, _ in points], [value for _, value in points]


def _finite(curve: Curve) -> bool:
    return any(math.isfinite(value) for value in curve[1])


def _held_out(records: list[Record], across: str = "tokens") -> Curve:
    places, means = [], []
    for record in records:
        losses = [value for name, value in record.items() if name.startswith("eval/") and name.endswith("/loss")]
        if losses:
            places.append(record[across])
            means.append(math.fsum(losses) / len(losses))
    return places, means


def _names(records: list[Record], start: str, end: str = "") -> list[str]:
    """What stands between `start` and `end` in the names of metrics, in order of appearance."""
    found: Mapping[str, None] = {name: None for record in records for name in record if name.startswith(start) and name.endswith(end)}
    return [name.removeprefix(start).removesuffix(end) for name in found]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart.

    >>> _short_names([Path("runs/a/galore"), Path("runs/b/galore")])
    ['a/galore', 'b/galore']
    """
    parts = [folder.parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)} ({number})" for number, part in enumerate(parts, start=1)]

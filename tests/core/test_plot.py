"""Figures are drawn from what was logged, look the same every time, and show the curves."""

import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from lm_core import sinks
from lm_core.errors import InputError
from lm_core.metrics import Metrics
from lm_core.plot import COLOURS, _styles, plot_against, plot_run, plot_runs
from lm_core.progress import Progress, Size


def log(folder, steps: int = 40, sources=("docs", "code"), weights: bool = False):
    metrics = Metrics([sinks.JsonLines(folder / "metrics.jsonl")])
    progress = Progress()
    metrics.start(progress)
    for step in range(1, steps + 1):
        progress = progress.after(Size(8, 4096, 4000), seconds=0.5)
        values = {f"data/weight/{source}": 0.5 for source in sources} if weights else {}
        metrics.flush(progress, {"train/loss": 2 + 4 / step, "optim/lr": 1e-3 / step, "optim/grad_norm": 100.0 / step**2, **values})
        if step % 10 == 0:
            losses = {f"eval/{source}/loss": 2.2 + 5 / step for source in sources}
            metrics.log(progress, {**losses, **{name.replace("loss", "standard_error"): float("nan") for name in losses}})
    metrics.close()
    return folder


def has_colour(path, colour: str) -> bool:
    wanted = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)])
    return bool((np.abs(image.imread(path)[..., :3] * 255 - wanted).max(-1) < 2).any())


def test_a_run_is_drawn_into_its_figures(tmp_path):
    paths = plot_run(log(tmp_path, weights=True))
    assert [path.relative_to(tmp_path / "figures").name for path in paths] == [
        "loss.png",
        "lr.png",
        "grad_norm.png",
        "speed.png",
        "weights.png",
    ]
    assert has_colour(paths[0], COLOURS[0])
    assert has_colour(paths[0], COLOURS[1])


def test_only_what_was_logged_is_drawn(tmp_path):
    assert [path.name for path in plot_run(log(tmp_path / "run"))] == ["loss.png", "lr.png", "grad_norm.png", "speed.png"]
    assert plot_run(tmp_path / "empty") == []


def test_runs_are_drawn_against_steps_time_and_memory(tmp_path):
    folders = [log(tmp_path / name) for name in ("adamw", "galore")]
    # without a peak a run is missing from the third part only
    path = plot_against(folders, tmp_path / "out.png", {folders[0]: 2.0})
    assert all(has_colour(path, colour) for colour in COLOURS[:2])
    again = plot_against(folders, tmp_path / "again.png", {folders[0]: 2.0})
    assert path.read_bytes() == again.read_bytes()
    with pytest.raises(InputError, match="empty has no records"):
        plot_against([*folders, tmp_path / "empty"], tmp_path / "out.png", {})


def test_the_same_records_give_the_same_bytes(tmp_path):
    folder = log(tmp_path, steps=250)
    first = [path.read_bytes() for path in plot_run(folder)]
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 30}):
        assert [path.read_bytes() for path in plot_run(folder)] == first
    command = f"from pathlib import Path; from lm_core.plot import plot_run; plot_run(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", command], check=True, env={**os.environ, "MPLBACKEND": "svg", "PYTHONHASHSEED": "7"})
    assert {path.read_bytes() for path in (folder / "figures").iterdir()} == set(first)


def test_runs_share_one_picture(tmp_path):
    folders = [log(tmp_path / name / "same", steps=steps) for name, steps in (("a", 40), ("b", 250), ("c", 20))]
    path = plot_runs(folders, tmp_path / "out" / "all.png")
    assert all(has_colour(path, colour) for colour in COLOURS[:3])
    before = path.read_bytes()
    assert plot_runs(folders, path).read_bytes() == before


def test_no_two_of_many_runs_look_alike():
    looks = [_styles(number)[1] for number in range(14)]
    assert all(one != other for at, one in enumerate(looks) for other in looks[:at])


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(InputError, match=r"runs: .*nothing has no records"):
        plot_runs([log(tmp_path / "run"), tmp_path / "nothing"], tmp_path / "all.png")

"""What `mdm-scaling bench` measures."""

from __future__ import annotations

import pytest

from mdm_scaling import bench
from mdm_scaling.options import BenchConfig


def test_stratified_levels_keep_the_bound_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    # the trained model is measured by the bench; here it is trained for a moment
    monkeypatch.setattr(bench.trained_on_runs, "__defaults__", (1, 64))
    *_, figure = bench.spread(BenchConfig())
    assert figure.passed, figure.what


def test_losses_of_masked_tokens_agree_and_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOKENS": 64, "WIDTH": 16, "VOCABULARY": 90, "PADDED": 96}.items():
        monkeypatch.setattr(bench, name, value)
    figures = list(bench.head(BenchConfig()))
    assert len(figures) == 5
    assert [figure.floor is None for figure in figures] == ["memory" in figure.what for figure in figures]


@pytest.mark.bench
def test_targets_of_time_and_memory() -> None:
    """With a fifth more than the specification asks for."""
    for measurement in (bench.head, bench.noise, bench.sampler):
        for figure in measurement(BenchConfig()):
            assert figure.target is None or figure.value <= 1.2 * figure.target, figure.what

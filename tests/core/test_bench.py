"""The benchmark compares like with like."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lm_core.bench import WARM_UP, WINDOW, BenchConfig, bench, measure, summary


@pytest.mark.slow
def test_the_three_loops_train_alike() -> None:
    settings = BenchConfig(quick=True, pairs=1)
    measured = measure(settings)
    core, bare, trainer = (measured["losses"][name] for name in ("core", "bare", "trainer"))
    assert len(bare) == settings.steps == WARM_UP + WINDOW + 1
    # the first step, the mean of the next nine
    means = [bare[0], sum(bare[1:WINDOW]) / (WINDOW - 1)]
    assert core[:2] == pytest.approx(means, rel=1e-5)
    assert trainer[:2] == pytest.approx(means, rel=1e-3)


@pytest.mark.slow
def test_the_report_is_one_object() -> None:
    result = CliRunner().invoke(bench, ["--quick", "--pairs", "1", "--precision", "bf16", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["milliseconds"].keys() == {"core", "bare", "trainer"}
    assert found["core_over"].keys() == {"bare", "trainer"}
    assert found["conditions"]["precision"] == "bf16"


@pytest.mark.bench
def test_core_costs_little_more_than_a_bare_loop_and_less_than_the_trainer() -> None:
    real, quick = BenchConfig(pairs=3), BenchConfig(quick=True, pairs=20)
    over = summary(measure(real)["pairs"])["core_over"]
    assert over["bare"]["processor"]["median"] <= 1.03
    # where a step takes milliseconds, the loops themselves can be seen
    over = summary(measure(quick)["pairs"])["core_over"]
    assert over["bare"]["processor"]["median"] <= 1.06
    assert over["trainer"]["processor"]["median"] <= 1

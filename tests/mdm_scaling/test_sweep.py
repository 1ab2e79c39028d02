from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lm_core.config import build
from lm_core.errors import ConfigError, InputError, Interrupted
from mdm_scaling import commands, plots, sizes, study, sweep
from mdm_scaling.analysis import AdviseConfig, ChinchillaConfig, CrossoverConfig, PlanConfig, PlotConfig, StartConfig, StudyConfig
from mdm_scaling.config import PretrainConfig
from mdm_scaling.fit import chinchilla
from mdm_scaling.fit.laws import BUILT_IN, Law
from mdm_scaling.fit.points import Point, write_table

BASE: dict[str, Any] = {"data": ["synthetic:markov"], "tokenizer": "bytes", "max_length": 32, "micro_batch_size": 4, "global_batch_size": 4}


def test_grids_are_complete_configurations_in_a_fixed_order() -> None:
    entries = sweep.grid("isoflop", BASE, flops=[1e9, 3e9], presets=["20k", "40k"], seeds=[1, 2])
    assert len(entries) == 2 * 2 * 2 * 2
    assert len({entry["id"] for entry in entries}) == 16
    assert entries == sweep.grid("isoflop", BASE, flops=[1e9, 3e9], presets=["20k", "40k"], seeds=[1, 2])
    for entry in entries:
        assert sweep.run_id(build(PretrainConfig, entry["config"])) == entry["id"]


def test_data_value_keeps_the_budget_and_cuts_the_data() -> None:
    entries = sweep.grid("data-value", BASE, flops=[1e10], epochs=[1, 4, 100], presets=["40k"], objectives=["mdm"])
    tokens = int(1e10 // (6 * sizes.ALL["40k"].nominal))
    assert [entry["config"]["unique_tokens"] for entry in entries] == [tokens, tokens // 4, tokens // 100]
    assert [entry["config"]["epochs"] for entry in entries] == [1, 4, 100]


def test_learning_rates_end_at_a_tenth() -> None:
    configs = [entry["config"] for entry in sweep.grid("lr", BASE, flops=[1e10], presets=["40k"], objectives=["ar"])]
    assert [config["lr"] for config in configs] == list(sweep.PEAKS)
    assert all(config["min_lr"] == pytest.approx(config["lr"] / 10) for config in configs)


def test_hidden_dropout_follows_attention_dropout_where_it_is_swept() -> None:
    for swept in (False, True):
        entries = sweep.grid("experiment", {**BASE, "hidden_dropout": 0.1}, flops=[1e12], presets=["tiny"], sweep_hidden=swept)
        pairs = {(entry["config"]["attention_dropout"], entry["config"]["hidden_dropout"]) for entry in entries}
        assert {(p, p if swept else 0.1) for p in (0.0, 0.05, 0.2, 0.3, 0.5)} <= pairs


def test_where_a_run_is_written_does_not_change_its_id(tmp_path: Path) -> None:
    values = {**BASE, "objective": "ar", "model": "20k", "budget": "8 steps"}
    ids = {
        sweep.run_id(build(PretrainConfig, {**values, **more}))
        for more in ({}, {"output_dir": tmp_path}, {"resume": "auto"}, {"tensorboard": False})
    }
    assert len(ids) == 1
    assert sweep.run_id(build(PretrainConfig, {**values, "lr": 1e-3})) not in ids
    # a default that is written out is no other run
    assert sweep.run_id(build(PretrainConfig, {**values, "mask_eps": 1e-3, "objective": "mdm"})) == sweep.run_id(
        build(PretrainConfig, {**values, "objective": "mdm"})
    )


def test_a_manifest_reads_back_and_its_damage_is_named(tmp_path: Path) -> None:
    entries = sweep.grid("isoflop", BASE, flops=[1e9], presets=["20k"])
    sweep.write(tmp_path / "m.jsonl", [*entries, *entries])
    assert sweep.read(tmp_path / "m.jsonl") == entries
    (tmp_path / "m.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"m\.jsonl:1 is no run"):
        sweep.read(tmp_path / "m.jsonl")


def test_parts_of_a_manifest_are_disjoint_and_all_of_it() -> None:
    entries = list(range(10))
    shares = [entries[StartConfig(part=f"{number}/4").share()] for number in range(4)]
    assert shares[1] == [1, 5, 9]
    assert sorted(entry for share in shares for entry in share) == entries
    with pytest.raises(ConfigError, match="part: '4/4' is no share"):
        StartConfig(part="4/4")


def test_a_run_that_is_stopped_ends_the_manifest_and_the_same_command_goes_on(tmp_path: Path) -> None:
    values = {**BASE, "objective": "ar", "model": "20k", "budget": "2 steps", "eval_every": "never", "stop_every": 1, "tensorboard": False}
    entries = [{"id": f"{number}", "config": values} for number in range(2)]
    with pytest.raises(Interrupted, match="was stopped and saved"):
        sweep.start(entries, tmp_path)
    assert [sweep.status(tmp_path / entry["id"]) for entry in entries] == ["preempted", ""]
    assert sweep.start(entries[:1], tmp_path) == {"0": "done"}


def test_what_failed_is_made_again_unless_only_stopped_runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"0": "done", "1": "failed", "2": "killed", "3": "preempted", "4": ""}
    for name, state in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"status": state}))
    entries = [{"id": name, "config": {}} for name in states]
    made: list[str] = []
    monkeypatch.setattr(sweep, "_execute", lambda entry, folder: made.append(entry["id"]) or "done")
    monkeypatch.setattr(sweep, "_tell", lambda *words: None)
    assert sweep.start(entries, tmp_path, retry="preempted") == {**dict.fromkeys(states, "done"), "1": "failed", "2": "killed"}
    assert made == ["3", "4"]
    made.clear()
    sweep.start(entries, tmp_path)
    assert made == ["1", "2", "3", "4"]


@pytest.mark.parametrize("preset", study.GRIDS)
def test_single_epoch_runs_of_a_study_are_of_the_budgets_it_names(preset: str) -> None:
    """Whole updates move a run's FLOPs, by less than what makes another budget."""
    points = []
    for entry in study.manifest(preset, "synthetic:markov"):
        config = build(PretrainConfig, entry["config"])
        if config.objective == "ar" and not config.unique_tokens:
            tokens = config.limits().limits["samples"] * config.max_length
            points.append(Point("ar", config.count, tokens, tokens, 6 * config.count * tokens, 1.0, math.nan))
    groups = chinchilla.budgets(points)
    assert [len(group) for group in groups] == [len(names) for _, names in study.GRIDS[preset].single]


def test_a_report_prints_constants_that_no_float_holds() -> None:
    law = Law("wild", a=1985.0, b=3.0, e=-2909.0, alpha=200.0, beta=0.2, about={"r2": 0.9, "n_points": 12})
    assert study._row(law) == "| ar | 1e-1263 | 1e+862 | 20.1 | 200 | 0.2 | inf | inf | 0.900 | 12 |"
    assert math.isfinite(law.factor)


def test_a_law_that_says_less_than_the_mean_is_not_drawn() -> None:
    good, bad = (Law(name, a=1.0, b=1.0, e=0.0, alpha=0.3, beta=0.3, about={"r2": r2}) for name, r2 in (("ar", 0.9), ("mdm", -46.5)))
    assert study._drawn({"ar": good, "mdm": bad}) == [good]


@pytest.mark.slow
def test_a_study_trains_fits_draws_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("20k", "40k", "80k")
    tiny = study.Grid(((2e8, names), (4e8, names)), (study.Repeats(1024, (2, 4), ("20k", "40k")),))
    monkeypatch.setitem(study.GRIDS, "quick", tiny)
    monkeypatch.setattr(study, "BASE", {**study.BASE, "max_length": 32, "micro_batch_size": 4, "global_batch_size": 4, "eval_iters": 2})
    result = study.run(StudyConfig(preset="quick", out=tmp_path, jobs=1, data="synthetic:markov"))
    assert result["runs"] == 2 * (3 * 2 + 2 * 2)
    assert result["laws"] == ["ar", "mdm"]
    text = (tmp_path / "report.md").read_text()
    for name in ("isoflop", "frontier", "data_value", "data_value_end", "residuals", "crossover"):
        assert f"{name}.png" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert len((tmp_path / f"{name}.csv").read_text().splitlines()) > 1
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert {row["objective"] for row in rows} == {"ar", "mdm"}
    assert all(float(row["U"]) <= float(row["D"]) for row in rows)
    # a run that is gone is made again, the others are left alone
    victim = tmp_path / "runs" / rows[0]["run_id"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    (victim / "result.json").unlink()
    study.run(StudyConfig(preset="quick", out=tmp_path, jobs=2, data="synthetic:markov"))
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert [path.parent for path in changed] == [victim]


def table(path: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for objective, law in (("ar", BUILT_IN["chinchilla"]), ("mdm", BUILT_IN["epoch2024"])):
        for C in (1e18, 1e19):
            best = law.optimum(C)[0]
            rows += [
                {
                    "objective": objective,
                    "N": N,
                    "D": C / 6 / N,
                    "U": C / 6 / N,
                    "best_loss": float(law.loss(N, C / 6 / N)),
                    "loss_se": 0.01,
                }
                for N in (best / 2, best, best * 2)
            ]
        rows += [{"objective": objective, "N": 1e8, "D": 1e8 * e, "U": 1e8, "best_loss": 3.0 - 0.1 * e, "loss_se": 0.01} for e in (2, 4, 8)]
    write_table(path, rows)
    return path


@pytest.mark.parametrize("kind", ["isoflop", "frontier", "data-value", "crossover", "residuals"])
def test_figures_have_equal_bytes_for_equal_runs(kind: str, tmp_path: Path) -> None:
    runs, seen = table(tmp_path / "runs.csv"), set()
    for number in range(2):
        out = tmp_path / f"{number}.png"
        commands.plot(kind, PlotConfig(out=out, law=["chinchilla"] if kind == "residuals" else []), runs)
        seen.add((out.read_bytes(), out.with_suffix(".csv").read_bytes()))
    assert len(seen) == 1


def test_a_contour_needs_one_law_and_one_amount(tmp_path: Path) -> None:
    commands.plot("contour", PlotConfig(out=tmp_path / "c.png", law=["datablations-c4"], unique_tokens=[10**9]), None)
    assert (tmp_path / "c.png").exists()
    with pytest.raises(ConfigError, match="a contour shows one --law"):
        commands.plot("contour", PlotConfig(out=tmp_path / "c.png"), None)


def test_masked_losses_are_called_bounds() -> None:
    assert "upper bound" in plots.label("mdm")
    assert "bound" not in plots.label("ar")


def test_approach_2_from_a_table(tmp_path: Path) -> None:
    result = commands.fit_chinchilla(ChinchillaConfig(objective="ar", approach=2, out=tmp_path / "law.json"), table(tmp_path / "runs.csv"))
    assert result["exponent"] == pytest.approx(0.28 / 0.62, rel=0.02)
    assert json.loads((tmp_path / "law.json").read_text()) == result


def test_advice_without_laws_is_the_published_one() -> None:
    little, much = (commands.advise(AdviseConfig(flops=flops, unique_tokens=10**8)) for flops in (1e19, 1e20))
    assert (little["objective"], much["objective"]) == ("ar", "mdm")
    assert "no fitted law was given" in little["source"]
    assert little["epochs"] == pytest.approx(76.6, rel=1e-3)


def test_advice_from_laws_takes_the_lower_loss(tmp_path: Path) -> None:
    from dataclasses import replace

    for name, objective, more in (("ar", "ar", 0.0), ("mdm", "mdm", -0.1)):
        law = BUILT_IN["datablations-c4"]
        (tmp_path / f"{name}.json").write_text(replace(law, name=name, objective=objective, e=law.e + more).to_json())
    laws = [str(tmp_path / "ar.json"), str(tmp_path / "mdm.json")]
    assert commands.advise(AdviseConfig(flops=1e19, unique_tokens=10**8, law=laws))["objective"] == "mdm"
    found = commands.fit_crossover(CrossoverConfig(law=laws, unique_tokens=[10**8]))
    assert found["crossings"][0]["flops"] is None
    with pytest.raises(ConfigError, match="one of ar and one of mdm"):
        commands.advise(AdviseConfig(flops=1e19, unique_tokens=10**8, law=laws[:1]))


def test_a_plan_prints_and_returns_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = commands.plan_run(PlanConfig(objective="ar", flops=1e19))
    assert (result["preset"], result["steps"], result["name"]) == ("217M", 14615, "c4_7B6")
    assert "c4_7B6" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean 117M"):
        commands.plan_run(PlanConfig(objective="ar", flops=1e19, preset="117"))


@pytest.mark.real
def test_a_plan_of_a_real_model_counts_it_exactly() -> None:
    result = commands.plan_run(PlanConfig(objective="mdm", preset="smollm2-135m", flops=3e13, max_length=256, global_batch_size=8))
    assert result["count"] == 134_515_008
    assert result["tokens"] == 3 * 10**13 // (6 * 134_515_008)

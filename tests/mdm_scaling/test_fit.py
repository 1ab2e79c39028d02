"""Laws are recovered from their own values, and agree with independent writings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_core.errors import ConfigError, InputError
from mdm_scaling.analysis import ChinchillaConfig
from mdm_scaling.fit import chinchilla, constrained, crossover
from mdm_scaling.fit.laws import BUILT_IN, Law, published_critical_flops, read_law
from mdm_scaling.fit.points import Point, read_points, write_table
from mdm_scaling.fit.solver import DELTA, Dense, huber, minimise, numeric

CHINCHILLA, C4 = BUILT_IN["chinchilla"], BUILT_IN["datablations-c4"]


def point(law: Law, N: float, D: float, U: float | None = None, noise: float = 0.0) -> Point:
    return Point(law.objective, N, D, U or D, 6 * N * D, float(law.loss(N, D, U)) * math.exp(noise), 0.0)


def single(law: Law, noise: float = 0.0, seed: int = 0, budgets: int = 6, spread: int = 5) -> list[Point]:
    random = np.random.default_rng(seed)
    found = []
    for C in np.geomspace(1e18, 1e21, budgets):
        sizes = np.geomspace(0.25, 4, spread) * law.optimum(C)[0]
        found += [point(law, float(N), float(C / 6 / N), noise=noise * random.standard_normal()) for N in sizes]
    return found


# --- formulas ---


def by_hand(law: Law, N: float, D: float, U: float) -> float:
    """The law in plain arithmetic."""
    A, B, E = math.exp(law.a), math.exp(law.b), math.exp(law.e)
    G = (law.alpha * A / (law.beta * B)) ** (1 / (law.alpha + law.beta))
    U_N = min(N, (U * G) ** (law.beta / law.alpha) * G)
    worth_D = U + U * law.K_D * (1 - math.exp(-(D / U - 1) / law.K_D))
    worth_N = U_N + U_N * law.K_N * (1 - math.exp(-(N / U_N - 1) / law.K_N))
    return E + A / worth_N**law.alpha + B / worth_D**law.beta


def test_published_values() -> None:
    for N, D, expected in ((6.34e9, 242e9, 2.2256440889984), (8.67e9, 178e9, 2.2269634075088)):
        assert float(C4.loss(N, D, 25e9)) == pytest.approx(expected, rel=1e-12)
        assert by_hand(C4, N, D, 25e9) == pytest.approx(expected, rel=1e-12)
    assert published_critical_flops(1e8) == pytest.approx(4.72e19, rel=2e-3)


@given(st.floats(1e6, 1e11), st.floats(1e7, 1e13), st.floats(0.0001, 1))
def test_law_is_its_formula(N: float, D: float, share: float) -> None:
    assert float(C4.loss(N, D, D * share)) == pytest.approx(by_hand(C4, N, D, D * share), rel=1e-9)


def test_limits_of_the_law() -> None:
    plain = Law("x", C4.a, C4.b, C4.e, C4.alpha, C4.beta)
    slow = Law("x", C4.a, C4.b, C4.e, C4.alpha, C4.beta, 1e9, 1e9)
    assert float(slow.loss(1e9, 1e11, 1e9)) == pytest.approx(float(plain.loss(1e9, 1e11)), rel=1e-6)
    # data that is seen once is worth itself
    best = plain.optimum(6 * 1e8 * 1e12)[0]
    assert float(C4.loss(min(1e8, best), 1e12, 1e12)) == pytest.approx(float(plain.loss(1e8, 1e12)), rel=1e-12)
    assert np.isfinite(C4.loss(1e9, 1e13, 1e9))
    assert float(C4.loss(1e9, 1e13, 1e9)) <= float(C4.loss(1e9, 1e11, 1e9))


@pytest.mark.parametrize("law", BUILT_IN.values(), ids=lambda law: law.name)
def test_optimum_is_lowest_on_its_budget(law: Law) -> None:
    for C in (1e18, 1e21):
        N, D = law.optimum(C)
        assert pytest.approx(C) == 6 * N * D
        assert all(float(law.loss(N, D)) < float(law.loss(N * x, D / x)) for x in (0.97, 1.03))
        plain = Law("x", law.a, law.b, law.e, law.alpha, law.beta)
        assert plain.allocate(C)[0] == pytest.approx(N, rel=1e-5)


def test_little_data_moves_compute_from_repeats_to_nothing_better_than_the_minimum() -> None:
    N, D, loss = C4.allocate(1e22, 25e9)
    assert pytest.approx(1e22) == 6 * N * D
    assert all(loss <= float(C4.loss(N * x, D / x, 25e9)) for x in (0.5, 0.9, 0.999, 1.001, 1.1, 2))


def test_a_law_survives_its_file(tmp_path: Path) -> None:
    for law in BUILT_IN.values():
        (tmp_path / "law.json").write_text(law.to_json())
        assert read_law(str(tmp_path / "law.json")) == law
    with pytest.raises(InputError, match="neither a file"):
        read_law("nothing")


# --- fits ---


def test_parametric_fit_recovers_a_law() -> None:
    law = chinchilla.parametric(single(CHINCHILLA), objective="ar", bootstrap=0)
    for name in chinchilla.NAMES:
        assert getattr(law, name) == pytest.approx(getattr(CHINCHILLA, name), rel=1e-6)
    assert law.about["share_of_starts_at_best"] > 0.2
    assert law.about["r2"] == pytest.approx(1.0)


def test_intervals_of_noisy_fits_hold_the_truth() -> None:
    """Of 25 intervals (five parameters of five data sets) nearly all."""
    truth = np.array([getattr(CHINCHILLA, name) for name in chinchilla.NAMES])
    inside = 0
    for seed in range(5):
        points = single(CHINCHILLA, noise=0.002, seed=seed, budgets=8, spread=8)
        predict, target = chinchilla.model(points, chinchilla.Free.of()), np.log([p.loss for p in points])
        best = minimise(predict, truth[None], target).parameters[0]
        found = chinchilla.intervals(chinchilla.resampled(predict, best, target, 200, seed))
        inside += sum(low <= value <= high for value, (low, high) in zip(truth, found.values()))
    assert inside >= 18


def test_a_fit_reports_how_far_single_runs_move_it() -> None:
    law = chinchilla.parametric(single(CHINCHILLA, noise=0.002), objective="ar", bootstrap=20)
    assert set(law.about["leave_one_out"]) == set(law.about["intervals"]) == set(chinchilla.NAMES)


def test_tied_and_fixed_parameters() -> None:
    points = single(C4)
    tied = chinchilla.parametric(points, objective="ar", tie=True, bootstrap=0)
    assert tied.alpha == tied.beta == pytest.approx(C4.alpha, rel=1e-6)
    fixed = chinchilla.parametric(points, objective="ar", fix={"alpha": C4.alpha, "e": C4.e}, bootstrap=0)
    assert (fixed.alpha, fixed.e) == (C4.alpha, C4.e)
    assert fixed.b == pytest.approx(C4.b, rel=1e-6)
    with pytest.raises(InputError, match="gamma is no parameter"):
        chinchilla.Free.of(fix={"gamma": 1})


def test_bounds_that_hold_nothing_change_nothing() -> None:
    points = single(CHINCHILLA, noise=0.01, seed=3)
    free = chinchilla.parametric(points, objective="ar", bootstrap=0)
    wide = chinchilla.parametric(points, objective="ar", bounds={"alpha": (0.01, 5.0)}, bootstrap=0)
    assert [getattr(wide, name) for name in chinchilla.NAMES] == pytest.approx([getattr(free, name) for name in chinchilla.NAMES], rel=1e-6)
    assert "at_bounds" not in wide.about


def test_a_fit_in_a_box_is_not_above_scipys_and_names_what_lies_at_its_end() -> None:
    from scipy.optimize import minimize

    points = single(CHINCHILLA, noise=0.01, seed=3)
    bounds = {"alpha": (0.36, 0.5), "e": (-math.inf, 0.4)}
    law = chinchilla.parametric(points, objective="ar", bounds=bounds, bootstrap=20)
    predict, target = chinchilla.model(points, chinchilla.Free.of()), np.log([p.loss for p in points])

    def value(theta: np.ndarray) -> float:
        return float(huber(predict(theta[None])[0][0] - target).sum())

    box = [bounds.get(name, (-math.inf, math.inf)) for name in chinchilla.NAMES]
    low, high = np.array(box).T
    theirs = min(minimize(value, start.clip(low, high), method="L-BFGS-B", bounds=box).fun for start in chinchilla.STARTS[::450])
    mine = np.array([getattr(law, name) for name in chinchilla.NAMES])
    assert value(mine) <= theirs * (1 + 1e-9)
    assert ((low <= mine) & (mine <= high)).all()
    at_end = [name for name, one, ends in zip(chinchilla.NAMES, mine, box) if one in ends]
    assert law.about["at_bounds"] == at_end != []
    for name, (least, most) in bounds.items():
        assert least <= law.about["intervals"][name][0] <= law.about["intervals"][name][1] <= most


def test_odd_bounds_are_refused() -> None:
    def options(text: str, **more: Any) -> ChinchillaConfig:
        return ChinchillaConfig(objective="ar", bounds=[text], **more)

    assert options("alpha=0.2:").bounded() == {"alpha": (0.2, math.inf)}
    for text in ("alpha", "alpha=1", "alpha=x:2"):
        with pytest.raises(ConfigError, match="is no NAME=LOW:HIGH"):
            options(text).bounded()
    with pytest.raises(ConfigError, match="bounds: only the parametric law"):
        options("alpha=0:1", approach=2)
    for bounds, fix, message in (
        ({"gamma": (0.0, 1.0)}, {}, "gamma is no parameter"),
        ({"alpha": (0.0, 1.0)}, {"alpha": 0.3}, "alpha is fixed, too"),
        ({"alpha": (1.0, 0.5)}, {}, "alpha has no room between 1 and 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            chinchilla.Free.of(fix=fix).box(bounds)


def test_the_optimum_is_stationary_and_not_above_scipy() -> None:
    from scipy.optimize import minimize

    points = single(CHINCHILLA, noise=0.01, seed=3)
    target = np.log([p.loss for p in points])
    law = chinchilla.parametric(points, objective="ar", bootstrap=0)
    free = chinchilla.Free.of()
    predict = chinchilla.model(points, free)

    def value(theta: np.ndarray) -> float:
        return float(huber(predict(theta[None])[0][0] - target).sum())

    theirs = min(minimize(value, start, method="L-BFGS-B").fun for start in chinchilla.STARTS[::450])
    mine = np.array([getattr(law, name) for name in chinchilla.NAMES])
    assert value(mine) <= theirs * (1 + 1e-9)
    gradient, _ = chinchilla._derivatives(points, free, target, np.zeros(5, dtype=bool))(mine)
    assert np.abs(gradient).max() <= 1e-9
    assert law.about["objective_value"] == pytest.approx(value(mine), rel=1e-12)


def test_huber_is_its_definition() -> None:
    residual = np.array([-2e-3, -1e-3, 0.0, 5e-4, 3e-3])
    expected = [0.5 * r * r if abs(r) <= DELTA else DELTA * (abs(r) - DELTA / 2) for r in residual]
    assert huber(residual).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("free", [chinchilla.Free.of(), chinchilla.Free.of(tie=True), chinchilla.Free.of(fix={"e": 0.5})])
def test_derivatives_and_their_sums_are_those_of_the_law(free: chinchilla.Free) -> None:
    points, random = single(CHINCHILLA), np.random.default_rng(0)
    predict, theta = chinchilla.model(points, free), free.starts(chinchilla.STARTS)[100:140:5]
    value, slopes = predict(theta)
    by_difference = numeric(lambda each: predict(each)[0])(theta)[1].dense()
    np.testing.assert_allclose(slopes.dense(), by_difference, atol=1e-6)
    weight, residual = random.random(value.shape), random.standard_normal(value.shape)
    for found, expected in zip(slopes.normal(weight, residual), Dense(slopes.dense()).normal(weight, residual)):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_wild_constants_give_numbers_without_a_warning() -> None:
    """A fit passes through constants whose powers no float holds; infinite is an answer, no number is none."""
    points = [replace(point, U=point.U / 4) for point in single(CHINCHILLA)]
    for a, b, alpha, beta in ((525.0, 3.3, 53.0, 0.19), (1.2, 17.7, 0.002, 1.85), (3.0, 500.0, 0.2, 50.0)):
        theta = np.array([[a, b, -600.0, alpha, beta, 1.0, 1.0]])
        assert np.isfinite(constrained.predictions(theta, points)).all()
        law = Law("wild", a, b, -600.0, alpha, beta, 2.7, 2.7)
        assert not np.isnan([law.loss(p.N, p.D, p.U) for p in points]).any()


def test_starts_are_solved_independently() -> None:
    """Together or alone, a start ends in the same place."""
    points = single(CHINCHILLA, noise=0.01)
    predict, target = chinchilla.model(points, chinchilla.Free.of()), np.log([p.loss for p in points])
    together = minimise(predict, chinchilla.STARTS[:20], target)
    alone = [minimise(predict, chinchilla.STARTS[at : at + 1], target).objective[0] for at in range(20)]
    assert together.objective.tolist() == pytest.approx(alone, rel=1e-6)


def test_parabolas_have_the_slope_of_the_law() -> None:
    found = chinchilla.parabolas(
        [point(CHINCHILLA, N, C / 6 / N) for C in (1e19, 1e20, 1e21) for N in np.geomspace(0.7, 1.4, 7) * CHINCHILLA.optimum(C)[0]]
    )
    assert [parabola.status for parabola in found] == ["ok"] * 3
    _, slope = chinchilla.power_law([p.C for p in found], [p.N for p in found if p.N])
    assert slope == pytest.approx(CHINCHILLA.beta / (CHINCHILLA.alpha + CHINCHILLA.beta), rel=1e-3)


def test_budgets_without_a_minimum_are_marked() -> None:
    best = CHINCHILLA.optimum(1e19)[0]
    outside = chinchilla.parabolas([point(CHINCHILLA, N, 1e19 / 6 / N) for N in np.geomspace(3, 9, 4) * best])
    assert outside[0].N is None
    assert outside[0].status.startswith("unbracketed")
    few = chinchilla.parabolas([point(CHINCHILLA, N, 1e19 / 6 / N) for N in (best, 2 * best)])
    assert few[0].status == "fewer than three sizes"


def test_approach_1_follows_the_lowest_curve(tmp_path: Path) -> None:
    import json

    points = []
    for number, N in enumerate((1e5, 1e6)):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokens = [int(D) for D in np.geomspace(1e6, 1e9 / N * 1e5, 40)]
        records = [{"step": s, "skipped": 0, "tokens": D, "eval/x/loss": float(CHINCHILLA.loss(N, D))} for s, D in enumerate(tokens)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        points.append(Point("ar", N, tokens[-1], tokens[-1], 6 * N * tokens[-1], 3.0, 0.0, str(folder)))
    found = chinchilla.frontier(points, 50)
    for C, N, D, _ in found:
        losses = {size: float(CHINCHILLA.loss(size, C / 6 / size)) for size in (1e5, 1e6) if 1e6 <= C / 6 / size <= 1e9 / size * 1e5}
        assert min(losses, key=lambda size: losses[size]) == N
        assert pytest.approx(6 * N * D) == C


@pytest.mark.parametrize("stage", ["two-step", "joint"])
def test_data_constrained_fit_recovers_its_decays(stage: str) -> None:
    # surplus parameters lose value even when data is seen once
    points = [point(C4, p.N, p.D, p.D) for p in single(C4, budgets=4, spread=4)]
    points += [point(C4, N, U * e, U) for U in (1e9, 1e10) for e in (2, 8, 30, 100) for N in (1e8, 1e9, 1e10)]
    law = constrained.fit(points, objective="ar", stage=stage, base=C4, bootstrap=0)  # type: ignore[arg-type]
    assert pytest.approx(C4.K_D, rel=1e-4) == law.K_D
    assert pytest.approx(C4.K_N, rel=1e-3) == law.K_N
    assert law.about["weakly_identified"] == []
    assert max(map(abs, law.about["residuals_by_epochs"].values())) < 1e-6


def test_a_decay_that_the_data_do_not_show_is_called_weak() -> None:
    points = single(C4, budgets=5, spread=4, noise=0.01) + [
        point(C4, 1e8, U * e, U, noise=0.02 * (-1) ** e) for U in (1e9, 1e10) for e in (2, 3)
    ]
    law = constrained.fit(points, objective="ar", base=C4, bootstrap=0)
    assert "K_N" in law.about["weakly_identified"]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (single(CHINCHILLA)[:5], "5 points are too few for 5 parameters"),
        ([point(CHINCHILLA, 1e9, D) for D in np.geomspace(1e9, 1e11, 9)], "all points have the same N"),
    ],
)
def test_data_that_identify_nothing_are_refused(points: list[Point], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chinchilla.parametric(points, objective="ar")


# --- crossover ---


def test_crossing_of_two_laws_is_where_their_minima_are_equal() -> None:
    mdm = Law("m", C4.a + 0.5, C4.b + 0.5, C4.e, C4.alpha, C4.beta, 500.0, 50.0, "mdm")
    found = crossover.between(C4, mdm, 1e8, 1e16, 1e24)
    assert found.flops is not None
    assert found.winner == "mdm"
    assert C4.allocate(found.flops, 1e8)[2] == pytest.approx(mdm.allocate(found.flops, 1e8)[2], rel=1e-8)
    worse = Law("m", C4.a, C4.b, C4.e + 0.1, C4.alpha, C4.beta, C4.K_D, C4.K_N, "mdm")
    never = crossover.between(C4, worse, 1e8, 1e16, 1e24)
    assert (never.flops, never.winner) == (None, "ar")


def test_power_law_of_crossings() -> None:
    crossings = [crossover.Crossing(U, published_critical_flops(U), "mdm") for U in (1e7, 1e8, 1e9)]
    found = crossover.power_law(crossings)
    assert found is not None
    assert found[1] == pytest.approx(2.174, rel=1e-9)
    assert crossover.power_law(crossings[:1]) is None


def test_measured_crossing_and_its_interval() -> None:
    def runs(objective: str, losses: list[float]) -> list[Point]:
        return [Point(objective, 1e5, 10.0**at, 100.0, 6e5 * 10**at, loss, 0.001) for at, loss in enumerate(losses, 2)]

    crossing = crossover.empirical(runs("ar", [3.0, 2.5, 2.4, 2.6]) + runs("mdm", [4.0, 3.0, 2.3, 2.0]), 100.0, bootstrap=200)
    assert crossing.winner == "mdm"
    assert crossing.flops is not None
    assert 6e8 < crossing.flops < 6e9
    none = crossover.empirical(runs("ar", [3.0, 2.5, 2.4, 2.3]) + runs("mdm", [4.0, 3.5, 3.0, 2.9]), 100.0, bootstrap=20)
    assert (none.flops, none.winner) == (None, "ar")


def test_crossing_of_last_losses_is_linear_in_log_compute() -> None:
    def runs(objective: str, losses: list[float], N: float = 1e5) -> list[Point]:
        return [Point(objective, N, 10.0**at, 100.0, 6 * N * 10.0**at, loss, 0.001) for at, loss in enumerate(losses, 2)]

    # the gap goes from -0.5 to 1 within a decade: a third of it lies before the crossing
    overfitting = runs("ar", [2.5, 2.5, 4.0]) + runs("mdm", [3.5, 3.0, 3.0])
    (found,) = crossover.at_the_end(overfitting, 100.0, bootstrap=100)
    assert found.flops == pytest.approx(6e5 * 10 ** (3 + 1 / 3))
    assert (found.winner, found.N, found.compared) == ("mdm", 1e5, pytest.approx(6e9))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.flops < found.high
    never = crossover.at_the_end(overfitting + runs("ar", [2.0, 2.0], 1e6) + runs("mdm", [3.0, 3.0], 1e6), 100.0, bootstrap=20)[1]
    assert (never.flops, never.winner, never.N) == (None, "ar", 1e6)
    # without a partner of the same compute nothing is compared
    assert crossover.at_the_end(runs("ar", [2.0, 2.0]), 100.0) == []


# --- tables ---


def test_a_table_reads_back(tmp_path: Path) -> None:
    write_table(
        tmp_path / "runs.csv", [{"objective": "ar", "N": 10, "D": 100, "U": 50, "best_loss": 2.0, "final_loss": 2.5, "loss_se": 0.1}]
    )
    assert read_points(tmp_path / "runs.csv")[0] == Point("ar", 10, 100, 50, 6000, 2.0, 0.1)
    assert read_points(tmp_path / "runs.csv", "ar", "final")[0].loss == 2.5
    with pytest.raises(InputError, match="no run of objective mdm"):
        read_points(tmp_path / "runs.csv", "mdm")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"best_loss": -1}, "not a number above 0"),
        ({"best_loss": "nan"}, "not a number above 0"),
        ({"U": 200}, "at most D"),
        ({"N": "x"}, "lacks a number"),
        ({"N": 0}, "above 0"),
    ],
)
def test_bad_rows_are_named(row: dict[str, object], message: str, tmp_path: Path) -> None:
    write_table(tmp_path / "runs.csv", [{"objective": "ar", "N": 10, "D": 100, "U": 50, "best_loss": 2.0, **row}])
    with pytest.raises(InputError, match=message):
        read_points(tmp_path / "runs.csv")

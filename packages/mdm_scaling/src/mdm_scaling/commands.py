"""What the commands that plan runs and make sense of finished ones do."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_core import deepspeed_settings
from lm_core.deepspeed_settings import engine_kind
from lm_core.errors import ConfigError, InputError
from mdm_scaling import planner, sizes, sweep
from mdm_scaling.analysis import (
    AdviseConfig,
    ChinchillaConfig,
    ConstrainedConfig,
    CrossoverConfig,
    LawOptions,
    PlanConfig,
    PlotConfig,
    SweepConfig,
)
from mdm_scaling.config import DeepSpeedConfig, settled
from mdm_scaling.fit import chinchilla, constrained, crossover
from mdm_scaling.fit.crossover import Crossing
from mdm_scaling.fit.laws import Law, published_critical_flops, read_law
from mdm_scaling.fit.points import Point, read_points


def ds_config(config: DeepSpeedConfig) -> dict[str, Any]:
    """DeepSpeed's settings, the batch fields filled in."""
    options = settled(config)
    if engine_kind(options) != "deepspeed":
        raise ConfigError(f"engine: this run takes the {engine_kind(options)} engine, which reads no such file; add --zero-stage 1, 2 or 3")
    world = int(os.environ.get("WORLD_SIZE") or options.num_processes)
    made = {
        **deepspeed_settings.settings(options, world),
        "gradient_accumulation_steps": options.accumulate,
        "train_batch_size": options.global_batch_size,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{config.out}: ZeRO stage {made['zero_optimization']['stage']}")
    return {"out": str(config.out), "settings": made}


def plan_run(config: PlanConfig) -> dict[str, Any]:
    """One run: tokens, samples, steps, warm-up, corpus, time."""
    flops = config.flops or (config.flops_factor * 1e18 if config.flops_factor else None)
    preset = config.preset
    if preset == "optimal":
        if flops is None:
            raise ConfigError("preset: optimal sizes belong to budgets in FLOPs; give --flops, or name a preset")
        preset = planner.optimal(flops, config.objective)
    count = sizes.ALL[preset].nominal if preset in sizes.ALL else _count(preset)
    made = planner.plan(
        config.objective, preset, count, flops=flops, unique_tokens=int(config.unique_tokens) if config.unique_tokens else None,
        epochs=config.epochs, length=config.max_length, batch=config.global_batch_size, corpus=config.tokens_per_doc,
    )  # fmt: skip
    hours = planner.hours(made.flops, peak=config.peak_flops, mfu=config.mfu, devices=config.devices)
    result = {**asdict(made), "hours": hours, "devices": config.devices}
    for name, value in result.items():
        if name == "advice":
            for line in value:
                print(f"advice          {line}")
        else:
            print(
                f"{name:15} {value:,}"
                if isinstance(value, int)
                else f"{name:15} {value:.6g}"
                if isinstance(value, float)
                else f"{name:15} {value}"
            )
    return result


def _count(model: str) -> int:
    """Parameters of a model that is no preset; a name that looks like one is answered with near names."""
    if not Path(model).exists() and "/" not in model and model[:1].isdigit():
        sizes.named(model)
    return planner.count_of(model)


def plan_sweep(config: SweepConfig) -> dict[str, Any]:
    """Write a manifest."""
    entries = sweep.grid(
        config.kind, sweep.base_of(config.base), flops=config.flops, epochs=config.epochs, presets=config.presets, seeds=config.seeds,
        objectives=config.objectives, sweep_hidden=config.sweep_hidden,
    )  # fmt: skip
    sweep.write(config.out, entries)
    total = sum(_flops(entry["config"]) for entry in entries)
    print(f"{config.out}: {len(entries)} runs, {total:.3g} FLOPs in all")
    return {"out": str(config.out), "runs": len(entries), "flops": total}


def _flops(values: dict[str, Any]) -> float:
    from lm_core.config import build
    from mdm_scaling.config import PretrainConfig

    made = build(PretrainConfig, values)
    return 6.0 * made.count * (made.samples or 0) * made.max_length


def advise(config: AdviseConfig) -> dict[str, Any]:
    """Objective, size, tokens and epochs for a budget and an amount of data."""
    C, U = config.flops, float(config.unique_tokens)
    if not config.law:
        critical = published_critical_flops(U)
        objective = "mdm" if critical < C else "ar"
        near = min({budget for budget, _ in planner.OPTIMAL}, key=lambda budget: abs(budget / C - 1))
        size = planner.OPTIMAL[near, objective]
        tokens = planner.tokens_for(C, sizes.SIZES[size].nominal)
        result: dict[str, Any] = {
            "objective": objective, "critical_flops": critical, "N": sizes.SIZES[size].nominal, "preset": size, "D": tokens, "epochs": tokens / U,
            "source": f"published critical compute (Prabhudesai et al. 2025) and the optimal size at {near:g} FLOPs; no fitted law was given",
        }  # fmt: skip
    else:
        ar, mdm = _pair(config.law)
        plans = {law.objective: law.allocate(C, U) for law in (ar, mdm)}
        objective = min(plans, key=lambda name: plans[name][2])
        crossing = crossover.between(ar, mdm, U)
        N, D, loss = plans[objective]
        result = {
            "objective": objective, "critical_flops": crossing.flops, "N": N, "D": D, "epochs": max(1.0, D / U), "loss": loss,
            "losses": {name: plan[2] for name, plan in plans.items()}, "intervals": {law.objective: law.about.get("intervals", {}) for law in (ar, mdm)},
            "source": f"laws {ar.name} and {mdm.name}",
        }  # fmt: skip
    for name, value in result.items():
        print(f"{name:15} {value:.6g}" if isinstance(value, float) else f"{name:15} {value}")
    return result


def _pair(names: list[str]) -> tuple[Law, Law]:
    """The law of each objective."""
    laws = {law.objective: law for law in map(read_law, names)}
    if len(names) != 2 or set(laws) != {"ar", "mdm"}:
        raise ConfigError(f"law: {len(names)} laws of {', '.join(laws)}; give one of ar and one of mdm")
    return laws["ar"], laws["mdm"]


def fit_chinchilla(config: ChinchillaConfig, runs: Path) -> dict[str, Any]:
    """Fit runs of one epoch."""
    points = [point for point in read_points(runs, config.objective, config.loss) if point.epochs <= constrained.SINGLE_EPOCH]
    points = sorted(points, key=lambda point: point.loss)[: len(points) - config.drop_highest] if config.drop_highest else points
    if config.approach == 3:
        law = chinchilla.parametric(
            points,
            objective=config.objective,
            tie=config.tie,
            fix=config.fixed(),
            bounds=config.bounded(),
            bootstrap=config.bootstrap,
            seed=config.seed,
            name=_name(config),
        )
        return _report(law, config)
    if config.approach == 2:
        found = chinchilla.parabolas(points)
        for parabola in found:
            print(f"C {parabola.C:.3e}  N {f'{parabola.N:.4g}' if parabola.N else '-'}  {parabola.status}")
        pairs = [(parabola.C, parabola.N) for parabola in found if parabola.N]
    else:
        pairs = [(C, N) for C, N, _, _ in chinchilla.frontier(points)]
    if len(pairs) < 2:
        raise InputError(f"runs: {len(pairs)} budgets have a minimum inside their sizes; a power law needs two, so add sizes")
    factor, exponent = chinchilla.power_law(*zip(*pairs))
    print(f"N_opt = {factor:.4g} C^{exponent:.4f}")
    result = {"approach": config.approach, "objective": config.objective, "factor": factor, "exponent": exponent, "budgets": len(pairs)}
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _name(config: LawOptions) -> str:
    return config.out.stem if config.out else f"fit-{config.objective}"


def fit_constrained(config: ConstrainedConfig, runs: Path) -> dict[str, Any]:
    """Fit runs that repeat their data."""
    points = read_points(runs, config.objective, config.loss)
    law = constrained.fit(
        points, objective=config.objective, stage=config.stage, base=read_law(config.base) if config.base else None, name=_name(config),
        tie=config.tie, bootstrap=config.bootstrap, seed=config.seed,
    )  # fmt: skip
    return _report(law, config)


def _report(law: Law, config: LawOptions) -> dict[str, Any]:
    values = {name: getattr(law, name) for name in ("a", "b", "e", "alpha", "beta", "K_D", "K_N")}
    spread = law.about.get("intervals", {})
    weak = law.about.get("weakly_identified", [])
    for name, value in values.items():
        low_high = f"  [{spread[name][0]:.4g}, {spread[name][1]:.4g}]" if name in spread else ""
        print(f"{name:6} {value:.6g}{low_high}{'  weakly identified' if name in weak else ''}")
    print(
        f"objective {law.about['objective_value']:.4g}  R2 {law.about['r2']:.4f}  points {law.about['n_points']}  best from {law.about['share_of_starts_at_best']:.0%} of the starts"
    )
    for name in law.about.get("at_bounds", []):
        print(f"{name:6} lies at a bound")
    for rival in [*law.about.get("other_minima", []), *law.about.get("minima_within_1_percent", [])[1:]]:
        print("other minimum  " + "  ".join(f"{name} {value:.4g}" for name, value in rival.items()))
    for epochs, residual in law.about.get("residuals_by_epochs", {}).items():
        print(f"epochs {epochs:>6}  log measured - log predicted {residual:+.4f}")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(law.to_json())
    return {"law": json.loads(law.to_json())}


def fit_crossover(config: CrossoverConfig) -> dict[str, Any]:
    """Critical compute for amounts of unique data."""
    found: list[Crossing] = []
    if config.runs is not None:
        points = read_points(config.runs)
        found = [crossover.empirical(points, float(U), config.bootstrap) for U in config.unique_tokens]
    else:
        ar, mdm = _pair(config.law)
        found = [crossover.between(ar, mdm, float(U)) for U in config.unique_tokens]
    for crossing in found:
        where = f"C {crossing.flops:.3e}, then {crossing.winner}" if crossing.flops else f"none: {crossing.winner} wins all over"
        spread = f"  [{crossing.low:.3e}, {crossing.high:.3e}]" if crossing.low and crossing.high else ""
        print(f"U {crossing.U:.3g}  {where}{spread}")
    law = crossover.power_law(found)
    if law is not None:
        print(f"log10 C = {law[0]:.3f} + {law[1]:.3f} log10 U")
    result = {"crossings": [asdict(crossing) for crossing in found], "power_law": law}
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def plot(kind: str, config: PlotConfig, runs: Path | None) -> dict[str, Any]:
    """Draw one figure."""
    from mdm_scaling import plots

    laws = [read_law(name) for name in config.law]
    points: list[Point] = read_points(runs, None, config.loss) if runs is not None else []
    if not points and kind not in ("crossover", "contour"):
        raise ConfigError(f"runs: a figure of kind {kind} shows runs; name the table that `runs collect` wrote")
    if kind == "contour":
        if len(laws) != 1 or len(config.unique_tokens) != 1:
            raise ConfigError("law: a contour shows one --law for one --unique-tokens")
        plots.contour(laws[0], float(config.unique_tokens[0]), config.out)
    elif kind == "crossover":
        amounts = [float(U) for U in config.unique_tokens] or sorted({float(f"{point.U:.2g}") for point in points})
        if laws:
            ar, mdm = _pair(config.law)
            found = [crossover.between(ar, mdm, U) for U in amounts]
        else:
            found = [crossover.empirical(points, U) for U in amounts]
        if not found:
            raise ConfigError("unique_tokens: none given; say for how much unique data, as --unique-tokens 100M,1B")
        plots.crossing(found, config.out)
    elif kind == "residuals":
        if not laws:
            raise ConfigError("law: residuals are those of a law; give --law")
        plots.residuals(points, laws, config.out)
    elif kind == "data-value":
        plots.data_value(points, config.out, laws)
    else:
        {"isoflop": plots.isoflop, "frontier": plots.frontier}[kind](points, config.out)
    print(f"{config.out} and {config.out.with_suffix('.csv')}")
    return {"out": str(config.out)}

"""Options of the commands that plan runs and make sense of finished ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from lm_core.config import Count, config, opt
from lm_core.errors import ConfigError


@config
class PlanConfig:
    """One run, planned from a budget."""

    objective: Literal["ar", "mdm"] = opt(help="Autoregressive, or masked diffusion.")
    preset: str = opt(
        "optimal", "A size of `presets list`, a model that brings its own sizes, or optimal.", flags=("--model", "--init-from")
    )
    flops: float | None = opt(None, "Training FLOPs, 6 N D.", gt=0)
    flops_factor: float | None = opt(None, "The same in units of 1e18.", gt=0)
    unique_tokens: Count | None = opt(None, "Tokens of one epoch.", ge=1)
    epochs: float = opt(1.0, "Passes over them.", gt=0)
    max_length: int = opt(2048, "Tokens per sequence.", flags=("--seq-length",), ge=2)
    global_batch_size: int = opt(256, "Sequences per update.", ge=1)
    tokens_per_doc: str = opt("c4", "Mean tokens of a document: c4, slimpajama, oscar or a number.")
    devices: int = opt(8, "Devices to estimate the time for.", ge=1)
    peak_flops: float = opt(989e12, "FLOP/s of one device; default: an H100 in bf16.", gt=0)
    mfu: float = opt(0.4, "Share of the peak that training reaches.", gt=0, le=1)

    def check(self) -> None:
        if self.flops and self.flops_factor:
            raise ConfigError("flops: --flops-factor is given, too; use one of them")
        if not (self.flops or self.flops_factor or self.unique_tokens):
            raise ConfigError("flops: no budget; give --flops, --flops-factor, or --unique-tokens with --epochs")
        if (self.flops or self.flops_factor) and self.unique_tokens and self.epochs != 1:
            raise ConfigError("epochs: follow from --flops and --unique-tokens; drop one of the three")


@config
class SweepConfig:
    """A grid of runs."""

    kind: Literal["isoflop", "data-value", "experiment", "lr"] = opt(
        help="What varies: size and budget, epochs at a budget, the knobs of the experiments, or the learning rate."
    )
    base: Path | None = opt(None, "YAML file with the options that do not vary.")
    flops: list[float] = opt(help="Budgets, as 1e13,3e13.", factory=list, gt=0)
    epochs: list[float] = opt(help="Epochs of kind data-value.", factory=lambda: [1.0, 2.0, 4.0, 10.0, 20.0, 50.0, 100.0], gt=0)
    presets: list[str] = opt(help="Sizes; default: the model of the base.", factory=list)
    seeds: list[int] = opt(help="Seeds; every run is made with each.", factory=lambda: [1234], ge=0)
    sweep_hidden: bool = opt(
        False, "In kind experiment vary --hidden-dropout with --attention-dropout, which else stays at that of the base."
    )
    objectives: list[Literal["ar", "mdm"]] = opt(help="Objectives.", factory=lambda: ["ar", "mdm"], min_length=1)
    out: Path = opt(help="Manifest to write, one JSON object per run.")


@config
class StartConfig:
    """Run a manifest."""

    out: Path = opt(Path("runs/sweep"), "Folder of the runs, each in one named by its id.")
    jobs: int = opt(1, "Runs at a time, each in a process of its own.", ge=1)
    retry: Literal["all", "preempted"] = opt(
        "all", "Which runs that ended before they were done to make again, beside those that have not begun."
    )
    part: str = opt("0/1", "Which share of the runs to make, as I/N: every Nth one, from the Ith on, counted from 0.")

    def share(self) -> slice:
        """The runs of this part."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(f"part: {self.part!r} is no share; write for example 0/4, which is the first of four")
        return slice(int(match[1]), None, int(match[2]))

    def check(self) -> None:
        self.share()


@config
class CollectConfig:
    """Gather finished runs."""

    out: Path = opt(Path("runs.csv"), "Table to write.")


@config
class AdviseConfig:
    """Which objective to choose."""

    flops: float = opt(help="Training FLOPs.", gt=0)
    unique_tokens: Count = opt(help="Unique tokens there are.", ge=1)
    law: list[str] = opt(help="Files of `fit`, one for each objective; default: the published critical compute.", factory=list)


@config
class LawOptions:
    objective: Literal["ar", "mdm"] = opt(help="Runs to fit.")
    loss: Literal["best", "final"] = opt("best", "Held-out loss of a run.")
    tie: bool = opt(False, "Give both exponents one value.")
    bootstrap: int = opt(1000, "Resamples for intervals; 0 leaves them out.", ge=0)
    seed: int = opt(0, "Address of the resamples.", ge=0)
    out: Path | None = opt(None, "Law file (JSON) to write.")


@config
class ChinchillaConfig(LawOptions):
    """A law of runs that see their data once."""

    approach: Literal[1, 2, 3] = opt(3, "Frontier of the curves (1), iso-FLOP parabolas (2), or the parametric law (3).")
    fix: list[str] = opt(help="Hold a parameter: a=VALUE, also b, e, alpha, beta; repeatable.", factory=list)
    bounds: list[str] = opt(
        help="Keep a parameter between two values: alpha=0.2:0.5, one of them may be left out; repeatable.", factory=list
    )
    drop_highest: int = opt(0, "Leave out this many runs with the highest loss.", ge=0)

    def fixed(self) -> dict[str, float]:
        """The parameters that are held."""
        found = {}
        for text in self.fix:
            name, _, value = text.partition("=")
            try:
                found[name.strip()] = float(value)
            except ValueError:
                raise ConfigError(f"fix: {text!r} is no NAME=VALUE; write for example --fix alpha=0.34") from None
        return found

    def bounded(self) -> dict[str, tuple[float, float]]:
        """Between which values parameters are kept."""
        found = {}
        for text in self.bounds:
            name, _, pair = text.partition("=")
            low, colon, high = pair.partition(":")
            try:
                found[name.strip()] = float(low or "-inf"), float(high or "inf")
                if not colon:
                    raise ValueError
            except ValueError:
                raise ConfigError(f"bounds: {text!r} is no NAME=LOW:HIGH; write for example --bounds alpha=0.2:0.5") from None
        return found

    def check(self) -> None:
        if self.approach != 3 and (self.bounds or self.fix or self.tie):
            name = "bounds" if self.bounds else "fix" if self.fix else "tie"
            raise ConfigError(f"{name}: only the parametric law has such parameters; drop it, or use --approach 3")


@config
class ConstrainedConfig(LawOptions):
    """A law of runs that repeat their data."""

    stage: Literal["two-step", "joint"] = opt("two-step", "Fit the decays after the single-epoch constants, or everything at once.")
    base: str | None = opt(None, "Law with the single-epoch constants; default: fitted to the runs of one epoch.")


@config
class CrossoverConfig:
    """Where masked diffusion begins to win."""

    runs: Path | None = opt(None, "Table of runs, for the measured crossing.")
    law: list[str] = opt(help="One law file for each objective, for the crossing of laws.", factory=list)
    unique_tokens: list[Count] = opt(help="Amounts of unique data, as 100M,1B.", min_length=1, ge=1)
    bootstrap: int = opt(1000, "Resamples for the interval of a measured crossing.", ge=0)
    out: Path | None = opt(None, "JSON file to write.")

    def check(self) -> None:
        if bool(self.runs) == bool(self.law):
            raise ConfigError("law: give two law files, or --runs, one of the two")


@config
class PlotConfig:
    """A figure, and its numbers as CSV beside it."""

    law: list[str] = opt(help="Law files or names of built-in laws.", factory=list)
    unique_tokens: list[Count] = opt(help="Unique tokens of a contour or of crossings.", factory=list, ge=1)
    loss: Literal["best", "final"] = opt("best", "Held-out loss of a run.")
    out: Path = opt(help="PNG file to write.")


@config
class StudyConfig:
    """A whole study: a grid of runs, laws, figures and a report."""

    preset: Literal["laptop", "quick"] = opt("laptop", "Minutes on two cores, or about three.")
    out: Path = opt(Path("study"), "Folder of runs, tables, figures and the report.")
    jobs: int = opt(2, "Runs at a time.", ge=1)
    data: str = opt("builtin:python-docs", "Corpus, by bytes.")

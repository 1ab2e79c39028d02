"""What a package's `bench` command measures: figures beside their targets, both sides of a ratio in one process and in turns.

Times are those of the processor over all threads, so that other work on the machine disturbs them little.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lm_core import record
from lm_core.errors import ConfigError


@dataclass(frozen=True)
class Figure:
    """One measured number and its bound: an upper one unless `least`, none for a number that is only told.

    `floor` is what the number would be if nothing took time but the operations that no way around exists for, by the same run.
    """

    name: str
    what: str
    value: float
    target: float | None = None
    least: bool = False
    floor: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        if self.target is None:
            return True
        return self.value >= self.target if self.least else self.value <= self.target

    @property
    def line(self) -> str:
        what = self.what if self.floor is None else f"{self.what}; floor {self.floor:.4g}"
        if self.target is None:
            return f"      {self.name:12} {self.value:8.4f} {'':10} {what}"
        sign = ">=" if self.least else "<="
        return f"{'pass' if self.passed else 'FAIL'}  {self.name:12} {self.value:8.4f} {sign} {self.target:<7g} {what}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "what": self.what, "value": self.value, "target": self.target, "least": self.least, "pass": self.passed,
            "floor": self.floor, **self.details,
        }  # fmt: skip


def in_turns(
    functions: Sequence[Callable[[], Any]], repeats: int, warm: int = 3, chosen: Callable[[Sequence[float]], float] = median
) -> list[float]:
    """Processor seconds of each function, called one after the other `repeats` times behind `warm` calls that do not count."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(warm + repeats):
        for function, found in zip(functions, times):
            began = time.process_time()
            function()
            if turn >= warm:
                found.append(time.process_time() - began)
    return [chosen(found) for found in times]


def ratio(one: Callable[[], Any], other: Callable[[], Any], repeats: int, warm: int = 3) -> float:
    """Median processor time of `one` over that of `other`, called in turns."""
    ours, theirs = in_turns([one, other], repeats, warm)
    return ours / theirs


def optional(module: str) -> Any:
    """A library that serves as a yardstick only, or None."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def report(
    measurements: Mapping[str, Callable[[Any], Iterator[Figure]]], config: Any, *, only: Sequence[str], threads: int
) -> dict[str, Any]:
    """Make the measurements named in `only` (all where it is empty), print each figure as it is found, and return them.

    Several names may share a function, which then runs once. Raises ConfigError for a name that is none.
    """
    import torch

    if unknown := [name for name in only if name not in measurements]:
        raise ConfigError(f"only: {unknown[0]} is no measurement; choose from {', '.join(measurements)}")
    wanted = list(only) or list(measurements)
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    here = record.describe(config)
    conditions = {
        "processor": here["platform"]["processor"],
        "threads": threads,
        "commit": (here["git"] or {}).get("commit"),
        "torch": torch.__version__,
    }
    print("; ".join(f"{name} {value}" for name, value in conditions.items()))
    found: list[Figure] = []
    for measurement in dict.fromkeys(measurements[name] for name in wanted):
        for figure in measurement(config):
            if figure.name in wanted:
                found.append(figure)
                print(figure.line, flush=True)
    absent = [name for name in wanted if name not in {figure.name for figure in found}]
    if absent:
        print(f"not measured, since what it needs is not here: {', '.join(absent)}")
    conditions["load"] = [load, os.getloadavg()[0]]
    return {"conditions": conditions, "figures": [figure.as_dict() for figure in found], "not_measured": absent}

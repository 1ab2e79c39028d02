"""How far a run is, when it ends, and what is due on the way. Free of torch.

`tokens` are real (not padding) input positions, `targets` labelled positions, `samples` rows; all of them count
the global batch. A rule is a function of the progress that gives the reason to stop, or None.
"""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import FrameType, MappingProxyType, TracebackType
from typing import Any, Literal

from lm_core.errors import ConfigError
from lm_core.values import read_count


@dataclass(frozen=True)
class Size:
    """What one step consumes, over all ranks."""

    samples: int = 0
    tokens: int = 0
    targets: int = 0


@dataclass(frozen=True)
class Progress:
    """What a run has done. `seconds` add up over resumes; with a limit in hours they must be the same on every rank."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    skipped: int = 0

    def after(self, size: Size, *, skipped: bool = False, seconds: float = 0.0, flops: float = 0.0) -> Progress:
        """Progress after one more step. A skipped one takes its time, but moves neither budget nor schedule.

        >>> Progress(steps=1, tokens=512).after(Size(samples=2, tokens=512)).tokens
        1024
        """
        spent = replace(self, seconds=self.seconds + seconds, flops=self.flops + flops)
        if skipped:
            return replace(spent, skipped=self.skipped + 1)
        return replace(
            spent,
            steps=self.steps + 1,
            samples=self.samples + size.samples,
            tokens=self.tokens + size.tokens,
            targets=self.targets + size.targets,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        return cls(**{field.name: values[field.name] for field in fields(cls)})


UNITS = ("steps", "samples", "tokens", "targets", "epochs", "hours")
_LIMIT = re.compile(r"\s*(?P<number>.*?[\d\s])\s*(?P<unit>[A-Za-z]+)\s*")


@dataclass(frozen=True)
class Reason:
    """Why a run ends: `kind` for machines, `text` for people."""

    kind: Literal["budget", "data", "loss", "killed", "interrupted"]
    text: str

    def __str__(self) -> str:
        return self.text


Rule = Callable[[Progress], Reason | None]


@dataclass(frozen=True)
class Budget:
    """One or more limits by unit; the first one reached ends the run. The unit of the budget is that of the first limit."""

    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        unknown = [unit for unit in self.limits if unit not in UNITS]
        assert not unknown, f"unknown units: {unknown}"
        if not self.limits or not all(limit > 0 and math.isfinite(limit) for limit in self.limits.values()):
            raise ConfigError(f"budget: {dict(self.limits)} needs at least one limit, and every limit must be above 0")
        object.__setattr__(self, "limits", MappingProxyType(dict(self.limits)))

    @classmethod
    @lru_cache  # every step asks for its learning rate by the budget
    def parse(cls, text: str) -> Budget:
        """Read `100M tokens, 2 hours`: numbers with a unit, separated by commas.

        >>> dict(Budget.parse("100M tokens, 1.5 hours").limits)
        {'tokens': 100000000, 'hours': 1.5}

        Raises ConfigError naming `budget`.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = _LIMIT.fullmatch(part)
            unit = match["unit"].lower() if match else ""
            unit = unit if unit.endswith("s") else unit + "s"
            if match is None or unit not in UNITS:
                raise ConfigError(
                    f"budget: {part.strip()!r} is not a number with a unit; write for example '100M tokens' ({', '.join(UNITS)})"
                )
            if unit in limits:
                raise ConfigError(f"budget: {text!r} limits {unit} twice; give one limit per unit")
            limit = _number(match["number"].strip(), "budget")
            if limit <= 0:
                raise ConfigError(f"budget: {part.strip()!r} leaves nothing to do; use a number above 0")
            if unit not in ("epochs", "hours") and not float(limit).is_integer():
                raise ConfigError(f"budget: {part.strip()!r} is not a whole number of {unit}; round it")
            limits[unit] = limit
        return cls(limits)

    def __str__(self) -> str:
        return ", ".join(f"{short(limit)} {unit if limit != 1 else unit[:-1]}" for unit, limit in self.limits.items())

    @property
    def unit(self) -> str:
        return next(iter(self.limits))

    def shares(self, progress: Progress, size: Size | None = None, epoch_samples: int | None = None) -> dict[str, float]:
        """Done over limit, by unit, counting the step of `size` that is about to run (its seconds are not known)."""
        after = progress if size is None else progress.after(size)
        return {unit: _done(after, unit, epoch_samples) / limit for unit, limit in self.limits.items()}

    def fraction(self, progress: Progress, size: Size | None = None, epoch_samples: int | None = None) -> float:
        """The largest share, at most 1; with equal steps it is above 0 at the first step and exactly 1 at the last.

        >>> Budget.parse("4 steps").fraction(Progress(steps=3), Size())
        1.0

        Raises ConfigError where a limit in epochs meets data of unknown length (`epoch_samples` is None).
        """
        return min(1.0, max(self.shares(progress, size, epoch_samples).values()))

    def rule(self, epoch_samples: int | None = None) -> Rule:
        """Stop as soon as one limit is reached."""

        def reached(progress: Progress) -> Reason | None:
            for unit, share in self.shares(progress, None, epoch_samples).items():
                if share >= 1:
                    return Reason("budget", f"budget of {Budget({unit: self.limits[unit]})} reached")
            return None

        return reached


def _done(progress: Progress, unit: str, epoch_samples: int | None) -> float:
    if unit == "hours":
        return progress.seconds / 3600
    if unit == "epochs":
        if not epoch_samples:
            raise ConfigError("budget: a limit in epochs needs data of known length; use samples, tokens or steps")
        return progress.samples / epoch_samples
    return float(getattr(progress, unit))


def _number(text: str, name: str) -> float:
    try:
        return read_count(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {text!r} is not a number; write for example 1000, 10_000, 100M or 1.5B") from error


def short(number: float) -> str:
    """A number as people say it.

    >>> [short(n) for n in (340, 12_300, 20_000_000, 1.5e9, 0.25)]
    ['340', '12.3k', '20.0M', '1.5B', '0.25']
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (size if letter != 'k' else 1e3):.1f}{letter}"
    return f"{number:g}"


@dataclass(frozen=True)
class Every:
    """Something that recurs: after so many steps, a fraction of the budget, at the end of epochs, or (all 0) never."""

    steps: int = 0
    fraction: float = 0.0
    epochs: int = 0

    @classmethod
    def parse(cls, text: str, name: str = "every") -> Every:
        """Read `1000`, `10k`, `0.1`, `epoch` or `never`; errors name the option `name`. `1.0` is the whole budget, `1` a step.

        >>> Every.parse("0.1"), Every.parse("1.0")
        (Every(steps=0, fraction=0.1, epochs=0), Every(steps=0, fraction=1.0, epochs=0))
        """
        text = text.strip()
        if text == "never":
            return cls()
        if text == "epoch":
            return cls(epochs=1)
        try:
            number = _number(text, name)
        except ConfigError:
            number = 0
        if 0 < number < 1 or (number == 1 and "." in text):
            return cls(fraction=float(number))
        if number < 1 or not float(number).is_integer():
            raise ConfigError(f"{name}: {text!r} is no interval; write steps (1000), a fraction of the budget (0.1), epoch or never")
        return cls(steps=int(number))

    def due(self, before: Progress, after: Progress, budget: Budget, epoch_samples: int | None = None) -> bool:
        """Whether a multiple of the interval lies in the step from `before` (exclusive) to `after` (inclusive).

        >>> Every(steps=10).due(Progress(steps=9), Progress(steps=10), Budget({"steps": 100}))
        True
        """
        return self._times(after, budget, epoch_samples) > self._times(before, budget, epoch_samples)

    def _times(self, progress: Progress, budget: Budget, epoch_samples: int | None) -> int:
        if self.steps:
            return progress.steps // self.steps
        if self.epochs:
            if not epoch_samples:
                raise ConfigError("epoch: this data has no known length; give the interval in steps or as a fraction of the budget")
            return progress.samples // (self.epochs * epoch_samples)
        if self.fraction:
            # 0.3 / 0.1 is 2.999...: what is a multiple but for rounding counts as one
            return math.floor(budget.fraction(progress, None, epoch_samples) / self.fraction + 1e-9)
        return 0


def any_of(*rules: Rule, agree: Callable[[Reason | None], Reason | None] | None = None) -> Rule:
    """The first rule that speaks.

    `agree` makes ranks stop at the same step: every rank calls it once per step with its own reason or None, and
    it returns the same on all of them (`lm_core.dist.agree`). Rules that see only what is equal on all ranks do
    not need it; signals and files do.
    """

    def first(progress: Progress) -> Reason | None:
        reason = next((reason for rule in rules if (reason := rule(progress)) is not None), None)
        return reason if agree is None else agree(reason)

    return first


class LossBelow:
    """Stop when the mean of the last `window` losses is below `threshold`, not before step `after`.

    The loop calls `add` with the loss of each step. The window is state: a resumed run restores it.
    """

    def __init__(self, threshold: float, window: int = 20, after: int = 0) -> None:
        self.threshold = threshold
        self.after = after
        self.losses: deque[float] = deque(maxlen=window)

    def add(self, loss: float) -> None:
        self.losses.append(loss)

    def __call__(self, progress: Progress) -> Reason | None:
        if len(self.losses) < (self.losses.maxlen or 0) or progress.steps < self.after:
            return None
        mean = math.fsum(self.losses) / len(self.losses)
        if not mean < self.threshold:
            return None
        return Reason("loss", f"mean loss {mean:.4g} of the last {len(self.losses)} steps is below {self.threshold:g}")

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.clear()
        self.losses.extend(state["losses"])


def kill_file(path: Path, every_seconds: float = 1.0) -> Rule:
    """Stop once `path` exists; looked for at most once in `every_seconds`, since it may lie on a slow file system."""
    next_look = -math.inf

    def killed(progress: Progress) -> Reason | None:
        nonlocal next_look
        if time.monotonic() < next_look:
            return None
        next_look = time.monotonic() + every_seconds
        return Reason("killed", f"{path} exists") if path.exists() else None

    return killed


def time_limit(minutes: float) -> Rule:
    """Stop once `minutes` have gone by since this call."""
    end = time.monotonic() + 60 * minutes
    return lambda progress: Reason("interrupted", f"{minutes:g} minutes have passed") if time.monotonic() >= end else None


def pause(steps: int) -> Rule:
    """Stop at each multiple of `steps` beyond the place where the rule was first asked.

    >>> rule = pause(10)
    >>> rule(Progress(steps=10)), rule(Progress(steps=20))
    (None, Reason(kind='interrupted', text='20 steps are a multiple of 10'))
    """
    start: int | None = None

    def paused(progress: Progress) -> Reason | None:
        nonlocal start
        start = progress.steps if start is None else start
        if progress.steps == start or progress.steps % steps:
            return None
        return Reason("interrupted", f"{progress.steps} steps are a multiple of {steps}")

    return paused


class Signals:
    """A rule that stops after SIGTERM, SIGINT or SIGUSR1; a second SIGINT aborts at once with KeyboardInterrupt.

    A context manager: handlers are installed on entry and put back on exit. Outside the main thread, where Python
    allows no handlers, it never speaks. Within `grace_seconds` of the first, another SIGINT is taken for the same:
    a launcher passes on what the terminal has sent to everyone already.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, grace_seconds: float = 0.5) -> None:
        self.received: signal.Signals | None = None
        self.grace_seconds = grace_seconds
        self._interrupted = math.inf
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Signals:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in self.NUMBERS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # None: a handler that Python did not install and cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def __call__(self, progress: Progress) -> Reason | None:
        return None if self.received is None else Reason("interrupted", f"{self.received.name} received")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked data worker. Ctrl-C and schedulers signal the whole group: workers live on until the parent has
            # saved, and end without an error code, which the parent would take for a crash.
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if number == signal.SIGINT:
            if time.monotonic() >= self._interrupted + self.grace_seconds:
                raise KeyboardInterrupt
            self._interrupted = min(self._interrupted, time.monotonic())
        self.received = self.received or signal.Signals(number)

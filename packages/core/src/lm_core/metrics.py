"""Sums in, means out: what the loop and the method measure, reduced once per log step and given to the sinks.

A record is a flat mapping. Its axes are step, samples, tokens, targets, epoch, flops, seconds and skipped; every other name
has a slash: `train/loss`, `eval/<source>/loss`, `optim/lr`, `data/weight/<source>`, `speed/tokens_per_second`, `memory/gib`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_core import dist, sinks
from lm_core.progress import Budget, Progress
from lm_core.sinks import Record, Sink

if TYPE_CHECKING:
    from lm_core.engine.base import Engine
    from lm_core.method import Method
    from lm_core.options import RunConfig


class Shares:
    """Sums of which every rank holds a part, as pairs (sum, count) by name, until `reduce` adds them up."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine = engine
        self.device = torch.device("cpu") if engine is None else engine.device
        self.world = dist.world() if engine is None else engine.data_world
        self._pairs: dict[str, Tensor] = {}
        self._known: list[str] = []

    def add(self, name: str, total: Tensor, count: float) -> None:
        """`total` is a scalar, this rank's part of a sum over its own `count`; or a pair that brings its own count.

        It stays on its device; nothing is waited for.
        """
        pair = total.detach().to(self.device, torch.float64)
        if pair.dim() == 0:
            pair = torch.stack([pair, torch.full_like(pair, count)])
        assert pair.shape == (2,), f"{name}: a metric is a scalar or a pair (sum, count), not of shape {tuple(total.shape)}"
        self._pairs[name] = self._pairs[name] + pair if name in self._pairs else pair

    def reduce(self) -> dict[str, tuple[float, float]]:
        """(sum, count) over all ranks by name, and a fresh start; ranks may hold different names.

        One reduction, but for the first time that any rank brings a name: then names are exchanged, too.
        """
        pairs, self._pairs = self._pairs, {}
        num_new = self._pair(float(len(pairs.keys() - set(self._known))))
        *sums, (any_new, _) = self._sum([*self._pick(pairs, self._known), num_new])
        if any_new > 0:
            added = sorted(set().union(*dist.gather_objects(list(pairs))) - set(self._known))
            sums += self._sum(self._pick(pairs, added))
            self._known += added
        return {name: (total, count) for name, (total, count) in zip(self._known, sums)}

    def _pair(self, total: float) -> Tensor:
        return torch.tensor([total, 0.0], dtype=torch.float64, device=self.device)

    def _pick(self, pairs: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
        return [pairs[name] if name in pairs else self._pair(0.0) for name in names]

    def _sum(self, pairs: list[Tensor]) -> list[list[float]]:
        return dist.all_sum(torch.stack(pairs), self.engine).tolist()


class Metrics:
    """Collects over one log interval. Every rank makes the same calls; `sinks` matter on rank 0 alone."""

    def __init__(self, sinks: Iterable[Sink] = (), *, engine: Engine | None = None, epoch_samples: int | None = None) -> None:
        self.sinks = list(sinks) if dist.rank() == 0 else []
        self.epoch_samples = epoch_samples
        self._shares = Shares(engine)
        self._averages: dict[str, tuple[float, float]] = {}
        self._last = Progress()

    @classmethod
    def open(
        cls, folder: Path, config: RunConfig, budget: Budget, epoch_samples: int | None, method: Method, engine: Engine | None = None
    ) -> Metrics:
        """With the sinks that `config` asks for and those of the method."""
        chosen: list[Sink] = []
        if dist.rank() == 0:
            chosen += [sinks.Console(budget, epoch_samples), sinks.JsonLines(folder / "metrics.jsonl")]
            if config.tensorboard:
                chosen.append(sinks.TensorBoard(folder / "runs"))
            if config.wandb != "off":
                chosen.append(sinks.Wandb(folder, config))
            chosen += method.sinks(folder)
        return cls(chosen, engine=engine, epoch_samples=epoch_samples)

    def start(self, progress: Progress) -> None:
        """Begin, or go on after a resume: sinks drop what they hold from after `progress`."""
        self._last = progress
        for sink in self.sinks:
            if hasattr(sink, "start"):
                sink.start(progress)

    def close(self) -> None:
        for sink in self.sinks:
            if hasattr(sink, "close"):
                sink.close()

    def add(self, name: str, total: Tensor, count: float | None = None) -> None:
        """Add this rank's part of a sum over `count` targets of the whole global batch, or a pair (sum, count) of its own.

        A pair is for what only some targets have; ranks may then differ in names. A scalar is added by every rank.
        """
        assert count is not None or total.dim() == 1, f"{name}: a scalar needs the count it is a sum over"
        # every rank carries its part of the common count, so that one sum serves both kinds
        self._shares.add(name, total, (count or 0) / self._shares.world)

    def average(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add a value that is the same on every rank; the record holds the weighted mean."""
        total, count = self._averages.get(name, (0.0, 0.0))
        self._averages[name] = (total + value * weight, count + weight)

    def flush(self, progress: Progress, values: Mapping[str, float] | None = None) -> Record:
        """The means since the last flush, with `values` as they are, as one record to every sink; a single reduction.

        A name without any targets in the interval is left out.
        """
        means = {**self._averages, **self._shares.reduce()}
        measured = {name: total / count for name, (total, count) in means.items() if count > 0}
        seconds = progress.seconds - self._last.seconds
        if seconds > 0:
            measured["speed/tokens_per_second"] = (progress.tokens - self._last.tokens) / seconds
        self._averages, self._last = {}, progress
        return self.log(progress, {**measured, **(values or {})})

    def log(self, progress: Progress, values: Mapping[str, float]) -> Record:
        """Give `values` to every sink at once, beside the interval; evaluations go this way."""
        record: Record = {"step" if name == "steps" else name: value for name, value in progress.to_dict().items()}
        if self.epoch_samples:
            record["epoch"] = progress.samples / self.epoch_samples
        record.update(values)
        for sink in self.sinks:
            sink(record)
        return record

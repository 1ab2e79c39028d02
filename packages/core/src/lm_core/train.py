"""The loop. A run is understood by reading this file and the method's `method.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_core.dist import all_sum
from lm_core.errors import RunFailed
from lm_core.method import Batch, Method
from lm_core.progress import Progress, Size

if TYPE_CHECKING:
    from lm_core.data.loader import Loader
    from lm_core.engine.base import Engine
    from lm_core.run import Run


@dataclass(frozen=True)
class Report:
    """What one step did. `loss` is the mean over all targets of the global batch; `sums` travel to the metrics."""

    size: Size
    lr: float
    loss: float
    grad_norm: float
    skipped: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)


def measure(engine: Engine, method: Method, batches: Sequence[Batch]) -> Size:
    """Samples, tokens and targets of the whole global batch; one small reduction, before any forward."""
    samples = sum(int((batch.index >= 0).sum()) for batch in batches)
    tokens = sum(method.tokens(batch) for batch in batches)
    targets = sum(method.targets(batch) for batch in batches)
    counted = all_sum(torch.tensor([samples, tokens, targets]), engine).tolist()
    return Size(samples=counted[0], tokens=counted[1], targets=counted[2])


def train_step(
    engine: Engine, method: Method, batches: Sequence[Batch], lr: float | Callable[[Size], float], nonfinite: str = "stop"
) -> Report:
    """One update over `batches`, this rank's share of the global batch.

    Losses arrive as sums and are divided by the targets of the whole global batch, so every
    target weighs the same however a batch is split over ranks and micro-batches. `lr` may be a
    function of the step's size, since schedules may count tokens.

    Raises RunFailed when the loss or the gradient norm is not finite and `nonfinite` is "stop";
    with "drop" the gradients are forgotten and the report says `skipped`.
    """
    size = measure(engine, method, batches)
    rate = lr(size) if callable(lr) else lr
    if size.targets == 0:
        return Report(size=size, lr=rate, loss=math.nan, grad_norm=0.0, skipped=True)
    engine.start(rate)
    sums = engine.accumulate(method, batches, size.targets)
    loss = float(all_sum(sums.loss.double(), engine)) / size.targets
    if not math.isfinite(loss):
        engine.drop()
        if nonfinite == "stop":
            raise RunFailed(f"loss: {loss} at sample {int(batches[0].index[0])}; lower --lr, or go on with --nonfinite drop")
        return Report(size=size, lr=rate, loss=loss, grad_norm=math.nan, skipped=True)
    norm = engine.step()
    return Report(size=size, lr=rate, loss=loss, grad_norm=math.nan if norm is None else norm, skipped=norm is None, sums=sums.metrics)


def train(run: Run, method: Method, engine: Engine, data: Loader) -> Progress:
    """Steps until a stop rule speaks, with evaluations and checkpoints on the way."""
    progress = run.resume(engine, method, data)
    while not (reason := run.stop(progress)):
        report = train_step(engine, method, next(data), lr=run.schedule(progress), nonfinite=run.config.nonfinite)
        progress = run.advance(progress, report)
        run.log(progress, report)
        if run.eval_due(progress):
            scores = run.evaluate(engine, method)
            method.after_eval(scores, data)
            run.log_scores(progress, scores)
            run.keep_best(progress, engine, method)
        if run.save_due(progress):
            run.save(progress, engine, method, data)
    return run.finish(progress, reason, engine, method, data)

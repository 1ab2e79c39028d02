"""Held-out losses per source: target-weighted means with standard errors, the same for any world size and batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lm_core.counter import reseed
from lm_core.data.loader import eval_batches
from lm_core.dist import all_sum
from lm_core.engine.base import Sums
from lm_core.errors import InputError
from lm_core.method import Batch
from lm_core.metrics import Shares

if TYPE_CHECKING:
    from lm_core.data import Rows
    from lm_core.engine.base import Engine
    from lm_core.method import Method


@dataclass(frozen=True)
class Score:
    """One source. `loss` and `metrics` are means over `targets`; `standard_error` is NaN when a single batch holds them all."""

    loss: float
    standard_error: float
    targets: int
    tokens: int
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Scores(dict[str, Score]):
    """Scores by source."""

    @property
    def mean(self) -> float:
        """The loss over all targets of all sources; every target weighs the same."""
        return math.fsum(score.loss * score.targets for score in self.values()) / sum(score.targets for score in self.values())

    def record(self) -> dict[str, float]:
        """The metrics that are logged: `eval/<source>/loss`, `eval/<source>/standard_error` and those of the method."""
        values: dict[str, float] = {}
        for source, score in self.items():
            values[f"eval/{source}/loss"] = score.loss
            values[f"eval/{source}/standard_error"] = score.standard_error
            values |= {f"eval/{source}/{name}": value for name, value in score.metrics.items()}
        return values


def evaluate(engine: Engine, method: Method, eval_data: Mapping[str, Rows], *, micro_batch: int, tokens: int = 0) -> Scores:
    """Losses of `method` on every source, over its first `tokens` tokens (0: all of them), without gradients.

    Every rank calls it and gets the same scores. The model is in evaluation mode meanwhile.
    Raises InputError for a source without a single target.
    """
    with _evaluating(engine.model):
        return Scores({source: _score(engine, method, source, rows, micro_batch, tokens) for source, rows in eval_data.items()})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # module by module: a frozen part that was in evaluation mode must not come back in training mode
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _score(engine: Engine, method: Method, source: str, rows: Rows, micro_batch: int, tokens: int) -> Score:
    losses: list[Tensor] = []
    counts: list[tuple[int, int, int]] = []
    shares = Shares(engine)
    batches = eval_batches(rows, micro_batch=micro_batch, rank=engine.data_rank, world=engine.data_world, tokens=tokens)
    for position, batch in enumerate(batches):
        # a method that draws from torch's own generator sees the same numbers at every evaluation
        reseed(engine.seed, batch.step, position, engine.data_rank)
        sums = _sums(engine, method, batch)
        losses.append(sums.loss)
        counts.append(_count(method, batch))
        for name, total in sums.metrics.items():
            shares.add(name, total, counts[-1][0])
    if not losses:
        raise InputError(f"eval_data: {source} holds no sample; give longer or more held-out documents")
    loss = torch.stack(losses)
    count = torch.tensor(counts, dtype=torch.float64, device=engine.device)
    target = count[:, 0]
    moments = torch.stack([loss.sum(), loss @ loss, loss @ target, target @ target, (target > 0).sum(), *count.sum(0)])
    total, squares, products, target_squares, num_batches, num_targets, num_tokens, num_samples = all_sum(moments, engine).tolist()
    if num_targets == 0:
        raise InputError(f"eval_data: {source} holds no position with a label; give longer or more held-out documents")
    mean = total / num_targets
    residual = max(0.0, squares - 2 * mean * products + mean * mean * target_squares)
    return Score(
        loss=mean,
        standard_error=standard_error(residual, int(num_batches), num_targets),
        targets=int(num_targets),
        tokens=int(num_tokens),
        samples=int(num_samples),
        metrics=method.metrics({name: value / count for name, (value, count) in shares.reduce().items() if count > 0}),
    )


def _count(method: Method, batch: Batch) -> tuple[int, int, int]:
    """Targets, tokens and samples, without the rows that only fill up the last batches of some ranks."""
    real = batch.index >= 0
    if not real.all():
        batch = Batch({name: tensor[real] for name, tensor in batch.items()}, index=batch.index[real], step=batch.step)
    return (method.targets(batch), method.tokens(batch), len(batch.index)) if real.any() else (0, 0, 0)


def _sums(engine: Engine, method: Method, batch: Batch) -> Sums:
    """Everything that the method yields for one batch, in float64."""
    sums = Sums(loss=torch.zeros((), dtype=torch.float64, device=engine.device))
    with engine.autocast():
        for loss in method.losses(engine.model, batch.to(engine.device)):
            sums.loss += loss.total
            for name, value in loss.metrics.items():
                sums.metrics[name] = sums.metrics.get(name, 0) + value.double()
    return sums


def standard_error(residual: float, num_batches: int, num_targets: float) -> float:
    """Standard error of a ratio of sums, from batches as clusters.

    With loss sum L_i and n_i targets in batch i of m, the mean is R = sum L_i / sum n_i, and its variance is
    m / (m - 1) * sum (L_i - R n_i)^2 / (sum n_i)^2 (linearised ratio estimator; Cochran, Sampling Techniques,
    3rd ed., section 6.4); `residual` is that sum of squares. Targets within a batch may be as dependent as they like,
    which a standard error over single targets would ignore. Other batch sizes estimate the same quantity from
    fewer or more clusters.

    >>> standard_error(residual=8.0, num_batches=2, num_targets=4)
    1.0
    """
    if num_batches < 2:
        return math.nan
    return math.sqrt(residual * num_batches / (num_batches - 1)) / num_targets

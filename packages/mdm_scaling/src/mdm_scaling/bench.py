"""`mdm-scaling bench`: the loss, the noise, the fit, the estimate and the sampler, each figure beside its target."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kernels_cuda.bench import measure
from kernels_cuda.head import linear_cross_entropy
from lm_core.config import build
from lm_core.figures import Figure, in_turns, optional, report
from lm_core.method import Batch
from lm_core.run import make_loader
from mdm_scaling.config import PretrainConfig, settled
from mdm_scaling.fit import chinchilla
from mdm_scaling.fit.points import Point
from mdm_scaling.fit.solver import huber, minimise
from mdm_scaling.losses import Estimator, Predictor, bounds, masked_total
from mdm_scaling.method import Pretrain
from mdm_scaling.model import Scorer, fresh
from mdm_scaling.noise import Noise, levels, masks
from mdm_scaling.options import BenchConfig
from mdm_scaling.sampling import fill
from mdm_scaling.sizes import shape

# the width and vocabulary of SmolLM2-135M, its vocabulary padded
TOKENS, WIDTH, VOCABULARY, PADDED = 4096, 576, 49152, 49280
IGNORED = -100


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def head(config: BenchConfig) -> Iterator[Figure]:
    """The loss of half the tokens, forward and backward: time, and memory beyond the gradients."""
    hidden, weight = numbers(TOKENS, WIDTH).requires_grad_(), (numbers(PADDED, WIDTH, seed=1) / WIDTH**0.5).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(2))
    masked = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)) < 0.5
    rows, labels = masked.nonzero()[:, 0], targets.where(masked, IGNORED)

    def ours() -> Tensor:
        return linear_cross_entropy(hidden[rows], weight, targets[rows], vocabulary=VOCABULARY)

    def every() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight[:VOCABULARY]), labels, ignore_index=IGNORED, reduction="sum")

    def gathered() -> Tensor:
        return F.cross_entropy(F.linear(hidden[rows], weight[:VOCABULARY]), targets[rows], reduction="sum")

    def stock() -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight[:VOCABULARY], labels, ignore_index=IGNORED, reduction="sum", options=options)

    def both(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss() / TOKENS, [hidden, weight])

    losses = {"all logits": every, "masked logits": gathered}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        losses["F.linear_cross_entropy"] = stock
    with torch.no_grad():
        expected = float(every())
        assert all(math.isclose(float(loss()), expected, rel_tol=1e-5) for loss in (ours, *losses.values()))
    # the three products that any exact loss makes of the rows that count
    logits, products = torch.empty(len(rows), VOCABULARY), [hidden.detach()[rows], weight.detach()[:VOCABULARY]]

    def floor() -> None:
        torch.mm(products[0], products[1].t(), out=logits)
        torch.mm(logits, products[1])
        torch.mm(logits.t(), products[0])

    jobs = [both(loss) for loss in (ours, *losses.values())]
    fast, *times, least_seconds = in_turns([*jobs, floor], 3, warm=1)
    gradients = 4 * (hidden.numel() + weight.numel())
    least, *peaks = (measure(job).peak_bytes - gradients for job in jobs)
    bounds_of = {"all logits": (0.60, 0.15), "masked logits": (1.05, 0.25), "F.linear_cross_entropy": (0.35, None)}
    for (name, (of_time, of_memory)), seconds, peak in zip(bounds_of.items(), times, peaks):
        what = f"masked loss over {name}, time, {1e3 * fast:.0f} of {1e3 * seconds:.0f} ms, its three products {1e3 * least_seconds:.0f}"
        yield Figure("head", what, fast / seconds, of_time, floor=least_seconds / seconds)
        if of_memory is not None:
            what = f"masked loss over {name}, memory beyond gradients, {least / 2**20:.0f} of {peak / 2**20:.0f} MiB"
            yield Figure("head", what, least / peak, of_memory)


def noise(config: BenchConfig) -> Iterator[Figure]:
    """Reading, masking and gathering of a training step beside the whole step."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "objective": "mdm", "num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "kv_channels": 64, "data": ["builtin:python-docs"],
            "tokenizer": "bytes", "max_length": 256, "micro_batch_size": 4, "global_batch_size": 4, "train_samples": 400, "precision": "fp32",
            "output_dir": Path(folder) / "run",
        }  # fmt: skip
        settings = settled(build(PretrainConfig, options))
        method = Pretrain(settings)
        loader = make_loader(settings, method.data(method.tokenizer()), rank=0, world=1)
        module = method.build().train()

        def step() -> None:
            for batch in next(loader):
                for loss in method.losses(module, batch):
                    loss.total.backward()

        def data() -> None:
            for batch in next(loader):
                masked(batch)

        def masked(batch: Batch) -> None:
            ids, labels, _ = method.cut(batch)
            for hidden, _, _ in method.masks(batch, labels != IGNORED):
                ids.masked_fill(hidden, method.mask_id)

        part, whole = in_turns([data, step], config.repeats, warm=1)
    what = f"noise and batch over a step of 4 layers of width 256, 4 x 256 tokens, {1e3 * part:.1f} of {1e3 * whole:.0f} ms"
    yield Figure("noise", what, part / whole, 0.02)


def grid(law: tuple[float, ...] = (6.0, 6.7, 0.5, 0.34, 0.28)) -> list[Point]:
    """240 points of a law with noise of a part in a hundred."""
    a, b, e, alpha, beta = law
    noise_ = 0.01 * np.random.default_rng(0).standard_normal((15, 16))
    points = []
    for i, size in enumerate(np.geomspace(1e7, 1e10, 15)):
        for j, tokens in enumerate(np.geomspace(1e8, 1e11, 16)):
            loss = float((np.exp(a) / size**alpha + np.exp(b) / tokens**beta + np.exp(e)) * np.exp(noise_[i, j]))
            points.append(Point("mdm", size, tokens, tokens, 6 * size * tokens, loss, math.nan))
    return points


def fit(config: BenchConfig) -> Iterator[Figure]:
    """All starts of approach 3 at once beside a loop of L-BFGS-B over some of them."""
    library = optional("scipy.optimize")
    if library is None:
        return
    points, free = grid(), chinchilla.Free.of()
    target = np.log([point.loss for point in points])
    predict, starts = chinchilla.model(points, free), chinchilla.STARTS
    some = starts[:: len(starts) // 100][:100]
    lowest: dict[str, float] = {}

    def value(theta: Any) -> tuple[float, Any]:
        log_loss, slopes = predict(theta[None])
        residual = log_loss[0] - target
        return float(huber(residual).sum()), np.clip(residual, -1e-3, 1e-3) @ slopes.dense()[0]

    def ours() -> None:
        lowest["ours"] = float(minimise(predict, starts, target).objective.min())

    def theirs(gradient: bool) -> Callable[[], None]:
        def run() -> None:
            function = value if gradient else lambda theta: value(theta)[0]
            options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10}
            with np.errstate(all="ignore"):
                found = [library.minimize(function, start, jac=gradient, method="L-BFGS-B", options=options).fun for start in some]
            lowest[str(gradient)] = float(min(found))

        return run

    fast, numeric, exact = in_turns([ours, theirs(False), theirs(True)], 1, warm=0)
    numeric, exact = (seconds * len(starts) / len(some) for seconds in (numeric, exact))
    what = (
        f"approach 3, 240 points, {len(starts)} starts together over L-BFGS-B one by one (from {len(some)}), {fast:.1f} of {numeric:.0f} s"
    )
    yield Figure("fit", what, fast / numeric, 1 / 20)
    yield Figure("fit", f"the same, where L-BFGS-B is given our exact gradient, {fast:.1f} of {exact:.0f} s", fast / exact)
    yield Figure("fit", "its lowest objective less that of L-BFGS-B", lowest["ours"] - lowest["True"], 1e-9)


def spread(config: BenchConfig) -> Iterator[Figure]:
    """How much a bound varies with the seed of its noise, stratified and not: a trained model, and the exact predictor of a periodic source."""
    for symbols, steps in SOURCES:
        began = time.process_time()
        model, ids = trained_on_runs(symbols, steps)
        spent, predict = time.process_time() - began, Scorer(model).eval()
        what = (
            f"a model of 2 layers of width 64, trained for {spent:.0f} s on {symbols} tokens that are repeated about {RUN} times, "
            f"1 x {ids.shape[1]} tokens"
        )
        yield _spread(predict, ids, symbols, 12, what)

    copies, period = 4, 256

    def exact(noisy_BS: Tensor, targets_M: Tensor, rows_M: Tensor, *_: Any, reduction: str) -> Tensor:
        """A token is known where a copy of it is visible, and uniform elsewhere."""
        known_BP = (noisy_BS.view(len(noisy_BS), copies, period) != period).any(1)
        return math.log(period) * (~known_BP.repeat(1, copies)).flatten()[rows_M].double()

    what = f"the exact predictor of a periodic source, {copies} x {period} tokens"
    yield _spread(exact, torch.arange(period).repeat(copies)[None], period, 60, what)


def _spread(predict: Predictor, ids: Tensor, mask_id: int, count: int, what: str) -> Figure:
    def estimates(how: Estimator) -> Tensor:
        return torch.cat([bounds(predict, ids, how, num_mc=32, seed=seed, noise=Noise(), mask_id=mask_id) for seed in range(count)])

    stratified, independent = estimates("stratified"), estimates("iid")
    what = (
        f"sd of the stratified bound over that of independent levels, {what}, 32 draws, {count} seeds: "
        f"{float(stratified.std()):.1f} of {float(independent.std()):.1f} nats in {float(stratified.mean()):.0f}"
    )
    return Figure("spread", what, float(stratified.std() / independent.std()), 0.3)


# a source whose tokens say much about their neighbours: what one costs depends on how many of these are masked
SOURCES, RUN = ((64, 500), (256, 300)), 8


def of_runs(symbols: int, rows: int, size: int, seed: int) -> Tensor:
    """Sequences (rows x size) in which a token is the one before it with a chance of 1 - 1/RUN, and else any."""
    generator = torch.Generator().manual_seed(seed)
    fresh_ = torch.rand(rows, size, generator=generator) < 1 / RUN
    drawn = torch.randint(symbols, (rows, size), generator=generator)
    place = torch.where(fresh_, torch.arange(size), 0).cummax(1).values
    return drawn.gather(1, place)


def trained_on_runs(symbols: int, steps: int, size: int = 1024) -> tuple[PreTrainedModel, Tensor]:
    """A masked model of that source, and a sequence that it has not seen."""
    model = fresh(
        "mdm", shape(2, 64, 4, 16), symbols, tied=True, positions=size, theta=10000.0, eps=1e-5, std=0.05, divisible_by=8, restrict_logits=True,
        seed=0,
    )  # fmt: skip
    scorer = Scorer(model).train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / steps)
        # mostly short ones, which cost less: what a token needs to see lies next to it
        rows, length = (4, size) if step % 20 == 19 else (8, size // 8)
        index, ids = torch.arange(rows) + 8 * step, of_runs(symbols, rows, length, seed=step + 1)
        t = levels("stratified", 0, "noise", step, torch.arange(rows), index, rows)
        masked, weight = masks(Noise(), t, torch.ones_like(ids, dtype=torch.bool), 0, "noise", index)
        (masked_total(scorer, ids, masked, weight, symbols) / ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, of_runs(symbols, 1, size, seed=0)


def sampler(config: BenchConfig) -> Iterator[Figure]:
    """128 tokens by confidence in 16 steps beside 128 steps."""
    model: Any = fresh(
        "mdm", shape(4, 128, 4, 32), 257, tied=True, positions=256, theta=10000.0, eps=1e-5, std=0.05, divisible_by=8, restrict_logits=True,
        seed=0,
    )  # fmt: skip
    model.train(False)
    ids = torch.cat([torch.arange(64), torch.full((128,), 257)])[None]

    def run(steps: int) -> Callable[[], Any]:
        return lambda: fill(lambda noisy: model(input_ids=noisy).logits, ids, 257, steps, index=torch.zeros(1, dtype=torch.int64))

    fast, slow = in_turns([run(16), run(128)], config.repeats, warm=1)
    what = f"confidence sampler, 128 tokens in 16 steps over 128 steps, {1e3 * fast:.0f} of {1e3 * slow:.0f} ms"
    yield Figure("sampler", what, fast / slow, 0.16)


MEASUREMENTS: dict[str, Callable[[BenchConfig], Iterator[Figure]]] = {
    "head": head,
    "noise": noise,
    "fit": fit,
    "spread": spread,
    "sampler": sampler,
}


def run(config: BenchConfig) -> dict[str, Any]:
    """Print each figure with its target as it is measured."""
    return report(MEASUREMENTS, config, only=config.only, threads=config.threads)

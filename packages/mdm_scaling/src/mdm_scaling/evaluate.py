"""Likelihood of a corpus: next-token loss of a causal model, bounds of a masked one, each with its standard error."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_core import checkpoint, dist
from lm_core.config import build, leaves
from lm_core.engine import make_engine
from lm_core.errors import InputError
from lm_core.export import export
from lm_core.models import load_tokenizer
from lm_core.run import make_loader
from mdm_scaling import losses
from mdm_scaling.config import PARTS, SHAPE_OPTIONS, PretrainConfig
from mdm_scaling.data import pathfile
from mdm_scaling.data.corpus import open_held_out
from mdm_scaling.data.tokens import Part
from mdm_scaling.model import Scorer, checkpoint_folder, load_network, objective_of, vocabulary_of
from mdm_scaling.noise import Noise
from mdm_scaling.options import EvalConfig

logger = logging.getLogger(__name__)


def corpus_loss(config: EvalConfig) -> dict[str, Any]:
    """Loss per token by source: mean, standard error over sequences, tokens, estimator, perplexity."""
    model = load_network(config.checkpoint)
    objective = objective_of(model)
    if config.objective not in (None, objective):
        raise InputError(
            f"objective: {config.checkpoint} is a model of {objective}, not {config.objective}; drop --objective, or make it one with `mdm-scaling import`"
        )
    tokenizer = load_tokenizer(checkpoint_folder(config.checkpoint))
    positions = int(model.config.max_position_embeddings)
    if config.max_length > positions:
        raise InputError(
            f"max_length: {config.max_length} is beyond the {positions} positions of {config.checkpoint}; use at most {positions}"
        )
    parts = open_held_out(config.data, tokenizer, text_column=config.text_column)
    scorer = Scorer(model).eval()
    results: dict[str, Any] = {}
    for part in parts:
        rows = windows(part, config.max_length, config.limit)
        if not len(rows):
            raise InputError(
                f"data: {part.name} has {part.tokens} tokens, too few for one sequence of {config.max_length} and its successor"
            )
        if objective == "ar":
            sums = ar_sums(scorer, rows, config.micro_batch_size)
            name = "ar"
        else:
            noise = Noise(mode="fixed-count" if config.estimator == "fixed-count" else "bernoulli", eps=config.mask_eps)
            sums = losses.bounds(
                scorer, rows[:, :-1], config.estimator, num_mc=config.num_mc, seed=config.eval_seed, noise=noise,
                mask_id=vocabulary_of(model), micro_batch=config.micro_batch_size,
            )  # fmt: skip
            name = config.estimator
        results[part.name] = summary(
            sums / config.max_length, len(rows) * config.max_length, name, config.num_mc if name in losses.SAMPLED else 1
        )
        print(line(part.name, results[part.name], bound=objective == "mdm" and name != "chain"))
    return {"objective": objective, "checkpoint": config.checkpoint, "max_length": config.max_length, "sources": results}


def held_out_loss(config: PretrainConfig) -> dict[str, Any]:
    """What `--skip-train` does: export the newest checkpoint of a run and score its held-out corpora."""
    texts = pathfile.read(config.valid_data_path_file) if config.valid_data_path_file else config.eval_data
    run = config.run_folder() if config.resume in ("auto", "none") else Path(config.resume)
    return corpus_loss(
        build(
            EvalConfig,
            {
                "checkpoint": str(exported(config, run)), "data": pathfile.weighted(texts)[0], "text_column": config.text_column,
                "num_mc": config.num_mc, "mask_eps": config.mask_eps, "eval_seed": config.eval_seed, "max_length": config.max_length,
                "limit": config.eval_iters * config.global_batch_size, "micro_batch_size": config.micro_batch_size,
            },
        )
    )  # fmt: skip


def exported(config: PretrainConfig, run: Path) -> Path:
    """The folder `final` of a run, written from its newest checkpoint where it is missing or older; any other model as it is."""
    newest, final = checkpoint.latest(run), run / "final"
    written = (final / "config.json").stat().st_mtime if (final / "config.json").exists() else 0.0
    if newest is None or (newest / "state.json").stat().st_mtime <= written:
        return run
    from mdm_scaling.method import Pretrain

    # files of the replicated engine hold whole tensors, however a model was spread over processes
    config = replace(config, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    # what decides samples and updates does not matter any more
    free = {leaf.path for leaf in leaves(PretrainConfig)} - {"objective", "model", *SHAPE_OPTIONS, *PARTS}
    device, method = dist.init(config.device), Pretrain(config)
    tokenizer = method.tokenizer()
    data = method.data(tokenizer)
    engine = make_engine(config, method, method.build(), device)
    loader = make_loader(config, data, engine.data_rank, engine.data_world)
    progress = checkpoint.resume(newest, engine=engine, method=method, data=loader, config=config, allow=free | {"data"})
    export(engine, method, final, tokenizer=tokenizer)
    print(f"{final}: step {progress.steps} of the run, which has not ended")
    return run


def windows(part: Part, size: int, limit: int | None) -> Tensor:
    """The first sequences of a corpus in file order (R x size + 1): neighbours share one token."""
    count = (part.tokens - 1) // size
    count = count if limit is None else min(limit, count)
    ends = np.cumsum(part.length)
    rows = [part.gather(None, ends, k * size, k * size + size + 1) for k in range(count)]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, size + 1, dtype=torch.int64)


def ar_sums(scorer: Scorer, rows: Tensor, micro_batch: int) -> Tensor:
    """Negative log-likelihood of each sequence's last S tokens given what stands before them (R, float64)."""
    sums = []
    with torch.no_grad():
        for batch in chunks(rows, micro_batch):
            nll = scorer(batch[:, :-1], batch[:, 1:].flatten(), reduction="none")
            sums.append(nll.double().view(len(batch), -1).sum(1))
    return torch.cat(sums)


def chunks(rows: Tensor, size: int) -> Iterator[Tensor]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def summary(means: Tensor, tokens: int, estimator: str, num_mc: int) -> dict[str, Any]:
    """Mean and standard error of per-sequence losses; no error for a single one."""
    loss = float(means.mean())
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return {
        "loss": loss,
        "standard_error": error,
        "ppl": math.exp(min(20.0, loss)),
        "tokens": tokens,
        "sequences": len(means),
        "estimator": estimator,
        "num_mc": num_mc,
    }


def line(name: str, result: dict[str, Any], *, bound: bool) -> str:
    """One result for people."""
    error = "" if math.isnan(result["standard_error"]) else f" ± {result['standard_error']:.4f}"
    kind = f"upper bound ({result['estimator']}, mc={result['num_mc']})" if bound else result["estimator"]
    return f"{name}  loss {result['loss']:.4f}{error} nats/token  ppl {result['ppl']:.2f}  {kind}  {result['sequences']} sequences, {result['tokens']} tokens"

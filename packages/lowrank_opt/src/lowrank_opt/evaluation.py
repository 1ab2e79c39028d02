"""`lowrank-opt eval`: held-out losses of a checkpoint."""

from __future__ import annotations

import math
from typing import Any

from lm_core.config import explicit
from lm_core.evaluate import evaluate
from lm_core.options import DataOptions
from lowrank_opt import saved
from lowrank_opt.commands import EvalConfig
from lowrank_opt.resolve import resolved


def run(config: EvalConfig) -> dict[str, Any]:
    """Loss, perplexity and tokens by source, as training with these options would report them."""
    checkpoint = saved.newest(config.checkpoint)
    given = {name: getattr(config, name) for name in explicit(config) if name in DataOptions.__dataclass_fields__}
    options = resolved(saved.options(checkpoint, {**given, "device": config.device}))
    engine, method = saved.load(checkpoint, options)
    data = method.data(method.tokenizer())
    scores = evaluate(engine, method, data.valid, micro_batch=config.micro_batch_size, tokens=int(config.eval_tokens))
    found: dict[str, Any] = {"checkpoint": str(checkpoint), "step": saved.progress(checkpoint)["steps"], "sources": {}}
    for source, score in scores.items():
        numbers = dict(score.metrics) if options.classifies() else {"perplexity": score.perplexity, **score.metrics}
        more = "".join(f"  {name} {value:.4f}" for name, value in numbers.items())
        error = f" ± {score.standard_error:.4f}" if math.isfinite(score.standard_error) else ""
        print(f"{source}  loss {score.loss:.4f}{error}{more}  tokens {score.tokens:,}")
        found["sources"][source] = {
            "loss": score.loss,
            "standard_error": score.standard_error,
            "tokens": score.tokens,
            "targets": score.targets,
            **numbers,
        }
    return found

"""Held-out loss of a model by source: what `moe-cpt eval` prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kernels_cuda.head import linear_cross_entropy
from lm_core import dist
from lm_core.data import eval_rows
from lm_core.engine.base import Engine
from lm_core.evaluate import Scores, evaluate
from lm_core.method import Batch, Loss, Method
from lm_core.models import CausalLoss, load_model, load_tokenizer
from moe_cpt import model as _registers_the_mixture  # noqa: F401
from moe_cpt.data import expanded
from moe_cpt.models import PRESETS
from moe_cpt.options.checks import EvalConfig


class NextToken(Method):
    """The loss of a model as it is."""

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        inputs = {name: batch[name] for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in batch}
        yield Loss(total=model(**inputs))


class Inference(Engine):
    """A model that is only run."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str) -> None:
        self.model, self.device, self.precision = model.to(device), device, precision
        self.data_rank, self.data_world = dist.rank(), dist.world()

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()


def score(config: EvalConfig) -> Scores:
    """Loss, standard error and counts of every source."""
    from lm_core.data.vocab import byte_tokenizer

    device = dist.init(config.device)
    tokenizer = byte_tokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer or config.model)
    changed: Any = replace(config, eval_data=expanded(config.eval_data))
    rows = eval_rows(changed, tokenizer)
    engine = Inference(CausalLoss(load_model(config.model, presets=PRESETS), loss=linear_cross_entropy), device, config.precision)
    return evaluate(engine, NextToken(config), rows, micro_batch=config.micro_batch_size, tokens=int(config.eval_tokens))  # type: ignore[arg-type]

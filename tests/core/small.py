"""A small LLaMA on synthetic text, as a function and as a command: what the tests of whole runs train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_core.cli import command_group, configured
from lm_core.config import build
from lm_core.method import Batch, Loss, Method
from lm_core.models import CausalLoss, load_model
from lm_core.options import RunConfig
from lm_core.run import run

PRESETS = {
    "small": {
        "model_type": "llama",
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
}


class NextToken(Method):
    """Next-token prediction with random initial weights."""

    def build(self) -> nn.Module:
        return CausalLoss(load_model(self.config.model, presets=PRESETS, init="random", seed=self.config.seed))

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        yield Loss(model(**batch))


cli = command_group("Small runs.")


@cli.command()
@configured(RunConfig)
def train(config: RunConfig) -> dict[str, Any]:
    """Train."""
    torch.set_num_threads(1)
    return run(config, NextToken(config))


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    """Options of a run of seconds; `changed` wins."""
    return {
        "model": "small",
        "tokenizer": "bytes",
        "data": ["synthetic:markov"],
        "output_dir": folder,
        "budget": "8 steps",
        "max_length": 32,
        "micro_batch_size": 4,
        "lr": 5e-3,
        "device": "cpu",
        "log_every": 1,
        "save_every": "4",
        "eval_every": "0.5",
        "eval_tokens": 256,
        "tensorboard": False,
        **changed,
    }


def small_run(folder: Path, **changed: Any) -> dict[str, Any]:
    """The run in this process."""
    config = build(RunConfig, options(folder, **changed))
    return run(config, NextToken(config))

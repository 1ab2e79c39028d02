"""The only thing a method author must know: a model, and the losses of one batch.

A method yields sums over targets; the loop divides by the targets of the whole global batch,
so every target weighs the same however a batch is split over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_core.data import Data
    from lm_core.data.loader import Loader
    from lm_core.engine.base import Engine
    from lm_core.evaluate import Scores
    from lm_core.options import RunConfig
    from lm_core.sinks import Sink

IGNORE = -100


class Batch(Mapping[str, Tensor]):
    """One micro-batch: named tensors of B rows, the global sample number of each row, and the step.

    `index` (int64, B; -1 for a padding row) and `step` are the address of every random draw, so
    a sample sees the same noise on any rank, device or restart.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, index: Tensor, step: int) -> None:
        self._tensors = dict(tensors)
        self.index = index
        self.step = step

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def to(self, device: torch.device) -> Batch:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors.items()}
        return Batch(moved, index=self.index.to(device), step=self.step)


@dataclass(frozen=True)
class Loss:
    """A scalar summed over targets with its graph, and further sums over the same targets.

    A metric that only some targets have is a tensor of two: its sum and its own count. Metrics are logged as `train/<name>`,
    or under their own name where it has a slash.
    """

    total: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """How parameters whose name matches `pattern` (a regular expression, searched) are trained."""

    pattern: str
    trained: bool = True
    lr_scale: float = 1.0
    weight_decay: float | None = None


class Method:
    """A training method. `build` and `losses` are required; everything else has a default."""

    # options of the package that a resumed run may change, beside those that core knows (budget, logging, saving, evaluation)
    resumable: frozenset[str] = frozenset()
    # whether a resumed run takes over weights and place in the data, and begins with an empty optimizer (replicated engine)
    fresh_optimizer: bool = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def build(self) -> nn.Module:
        """The module to train, in float32 on the CPU; also called under the meta device for estimates."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        """Losses of one micro-batch; each is back-propagated as it is yielded, then its graph is freed.

        Only `model(...)` may be called, never its parts: sharded engines gather weights inside it.
        """
        raise NotImplementedError

    def targets(self, batch: Batch) -> int:
        """Number of labelled positions, known before the forward pass."""
        return int((batch["labels"] != IGNORE).sum())

    def tokens(self, batch: Batch) -> int:
        """Number of real (not padding) input positions."""
        real, mask = batch.index >= 0, batch.get("attention_mask")
        return int(real.sum()) * batch["input_ids"].shape[1] if mask is None else int(mask[real].sum())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run: the one the options name, else the model's own."""
        from lm_core.data.vocab import build_tokenizer

        return build_tokenizer(self.config)

    def data(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        """Rows to train on and rows held out, by source; default: next-token rows of `--data`."""
        from lm_core.data import build_data

        return build_data(self.config, tokenizer)

    def param_rules(self) -> list[Rule]:
        """First match wins; a parameter that no rule matches is trained with the configured settings."""
        return []

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """An optimizer over `groups` (each with `params`, `names`, `lr_scale`, `weight_decay`)."""
        from lm_core.optim import adamw

        return adamw(groups, self.config)

    def engine(self, model: nn.Module, device: torch.device) -> Engine | None:
        """An engine that the package brings (tensor parallelism); None takes the one that `--engine` names."""
        return None

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """What an evaluation of one source reports, from the means of the metrics that `losses` gave; called once, on every rank."""
        return means

    def after_eval(self, scores: Scores, data: Loader) -> None:
        """Called after each evaluation; a method may move the source weights here."""

    def measured(self) -> Mapping[str, float]:
        """What was measured since the last log record, beside the metrics of the losses; every rank calls it before each record."""
        return {}

    def sinks(self, folder: Path) -> list[Sink]:
        """Functions of one logged record (`lm_core.sinks`), called on rank 0 beside the console and the files of the run folder."""
        return []

    def flops_per_token(self, model: nn.Module) -> float:
        """Training FLOPs (forward and backward) per token."""
        from lm_core.estimate import flops_per_token

        return flops_per_token(model, self.config.max_length)

    def hf_model(self, model: nn.Module) -> PreTrainedModel:
        """The Hugging Face model inside `model`: checkpoints use its tensor names and its config."""
        from lm_core.models import hf_model

        return hf_model(model)

    def final_model(self, model: nn.Module) -> PreTrainedModel:
        """What `final/` holds: the Hugging Face model inside `model`, or one made from it (adapters merged, say)."""
        return self.hf_model(model)

    def write_beside(self, checkpoint: Path) -> None:
        """Add files to a checkpoint, so that its folder is a model by itself; called on rank 0."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

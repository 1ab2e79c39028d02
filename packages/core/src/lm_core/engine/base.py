"""One contract, four engines: any number of backwards, then one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import Tensor, nn

from lm_core.errors import ConfigError

if TYPE_CHECKING:
    from lm_core.estimate import Parameters
    from lm_core.method import Batch, Loss, Method


@dataclass
class Sums:
    """Detached sums of one rank over one step: the loss, and whatever else the method yields."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        self.loss += loss.total.detach()
        for name, value in loss.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0) + value.detach()


class Engine:
    """Where gradients are reduced and weights updated.

    The loop calls `start`, then `accumulate` (which calls `backward` any number of times), then
    exactly one of `step` and `drop`. Losses arrive already divided by the targets of the global
    batch, so ranks are summed, never averaged.
    """

    # family of checkpoints: a checkpoint is resumed by the kind that wrote it
    kind: str
    # files of a checkpoint (glob patterns) without which it can no longer be resumed, only read
    optimizer_files: tuple[str, ...] = ("optimizer*", "optimizer/*")
    model: nn.Module
    # of the whole model, where the engine leaves a process only some of its layers
    counts: Parameters | None = None
    # whether one process can run the model without the others
    alone: bool = False
    optimizer: torch.optim.Optimizer
    device: torch.device
    seed: int = 0
    data_rank: int = 0
    data_world: int = 1
    # ranks that see different data; None means all of them
    data_group: torch.distributed.ProcessGroup | None = None

    def start(self, lr: float) -> None:
        """Set the learning rate, times each group's `lr_scale`, before the first backward."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that forward passes run in, for training and evaluation alike."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        raise NotImplementedError

    def step(self) -> float | None:
        """Reduce, clip, update, clear; the gradient norm before clipping, or None for a skipped update (fp16)."""
        raise NotImplementedError

    def drop(self) -> None:
        """Forget this step's gradients, on every rank."""
        raise NotImplementedError

    def accumulate(self, method: Method, batches: Sequence[Batch], targets: int) -> Sums:
        """Back-propagate every loss of this rank's micro-batches, divided by the global `targets`."""
        from lm_core.counter import reseed

        sums = Sums(loss=torch.zeros((), device=self.device))
        for position, batch in enumerate(batches):
            # torch's own generator (dropout) has an address too, so a resumed run needs no saved state
            reseed(self.seed, batch.step, position, self.data_rank)
            losses = iter(method.losses(self.model, batch.to(self.device)))
            while True:
                with self.autocast():
                    loss = next(losses, None)
                if loss is None:
                    break
                self.backward(loss.total / targets)
                sums.add(loss)
        return sums

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into `folder`; every rank calls it."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, for any world size where the engine allows it."""
        raise NotImplementedError

    def load_weights(self, folder: Path) -> None:
        """Restore the weights alone of what `save` wrote; ConfigError where the engine does not keep them apart."""
        raise ConfigError(f"engine: checkpoints of the {self.kind} engine are restored as a whole; use --engine replicated")

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state dict, whole and on the CPU, one at a time; every rank iterates."""
        raise NotImplementedError

"""LoRA-GA: adapters that begin along the gradient of the whole weights (Wang et al. 2024, arXiv:2407.05000).

With G = U S V^T the mean gradient of some batches, peft makes A from the first r rows of V^T and B from the next r columns of U S, and
takes scaling B A from the weight, so that the model computes what it did before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm_core.method import Batch

if TYPE_CHECKING:
    from lm_core.data import Data
    from lowrank_opt.method import LowRank

log = logging.getLogger("lowrank_opt")


def initialise(method: LowRank, module: nn.Module, data: Data, device: torch.device) -> None:
    """Adapters and base weights of `module`, whose adapters add nothing yet, from the first `lora_ga_batches` micro-batches of `data`.

    Every process takes the same batches, so a run's start does not depend on how many there are.
    """
    from peft import LoraGAConfig

    parts: list[Any] = list(module.modules())
    adapters = [part for part in parts if hasattr(part, "lora_ga_init") and "default" in part.lora_A]
    # convolutions have no matrix here, and keep adapters that add nothing
    layers = {part: part.get_base_layer().weight for part in adapters if part.get_base_layer().weight.ndim == 2}
    count = method.config.lora.lora_ga_batches
    log.info("lora_ga: the gradient of %d weights from %d batches", len(layers), count)
    gradients = mean_gradients(method, module.to(device), list(layers.values()), islice(batches(method, data), count), device)
    for part, weight in layers.items():
        part.get_base_layer()._peft_loraga_grad = gradients[weight]
        part.lora_ga_init("default", LoraGAConfig())
    module.cpu()


def batches(method: LowRank, data: Data) -> Iterator[Batch]:
    """The micro-batches of a run of one process, in its order."""
    from lm_core.run import make_loader

    for step in make_loader(method.config, data, rank=0, world=1):
        yield from step


def mean_gradients(
    method: LowRank, module: nn.Module, weights: list[Any], taken: Iterator[Batch], device: torch.device
) -> dict[Any, Tensor]:
    """Float32 gradients of the loss per target with respect to `weights`; the module is left as it was."""
    sums = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
    trained = {parameter: parameter.requires_grad for parameter in module.parameters()}
    training, targets = module.training, 0
    module.train()
    for parameter in trained:
        parameter.requires_grad_(parameter in sums)
    for batch in taken:
        targets += method.targets(batch)
        for loss in method.losses(module, batch.to(device)):
            loss.total.backward()
        for weight, total in sums.items():
            total += weight.grad
            weight.grad = None
    for parameter, was in trained.items():
        parameter.requires_grad_(was)
    module.train(training)
    return {weight: total / max(1, targets) for weight, total in sums.items()}

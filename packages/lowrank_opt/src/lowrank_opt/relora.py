"""ReLoRA: adapters that are merged into the weights every some updates and begin again (Lialin et al. 2023, arXiv:2307.05695)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lm_core import counter
from lowrank_opt.base import BaseOptimizer
from lowrank_opt.quant import MOMENTS

# the share of each moment that stays
KEPT = 0.01


def attach(optimizer: BaseOptimizer, module: nn.Module, every: int, seed: int) -> None:
    """Let `optimizer` restart the adapters of `module` behind every update whose number `every` divides."""
    parts: list[Any] = list(module.modules())
    adapters = [part for part in parts if hasattr(part, "get_delta_weight") and "default" in getattr(part, "lora_A", ())]

    def after_step(*_: Any) -> None:
        step = next((state["step"] for part in adapters if (state := optimizer.state.get(part.lora_A["default"].weight))), 0)
        if step and step % every == 0:
            for number, part in enumerate(adapters):
                restart(part, optimizer, torch.Generator().manual_seed(counter.derive(seed, "init", step, number) >> 1))

    optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def restart(part: Any, optimizer: BaseOptimizer, generator: torch.Generator) -> None:
    """W <- W + scaling B A in float32, new A as peft draws it, B = 0, and all but the largest of their moments 0."""
    base, a, b = (layer.weight for layer in (part.get_base_layer(), part.lora_A["default"], part.lora_B["default"]))
    base.copy_(base.float() + part.get_delta_weight("default").float())
    fresh = torch.empty(a.shape)
    nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
    a.copy_(fresh)
    b.zero_()
    for parameter in (a, b):
        for name in MOMENTS:
            prune_(optimizer.state[parameter][name])


def prune_(moment: Tensor) -> None:
    """Set all but the largest hundredth of the magnitudes to 0."""
    kept = max(1, round(KEPT * moment.numel()))
    least = moment.abs().flatten().topk(kept).values[-1]
    moment.masked_fill_(moment.abs() < least, 0)

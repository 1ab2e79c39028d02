"""Engines: where weights, gradients and optimizer state live. `make_engine` picks one from the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_core.engine.base import Engine, Sums
from lm_core.engine.deepspeed_settings import asks_for_deepspeed
from lm_core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lm_core.method import Method
    from lm_core.options import RunConfig

__all__ = ["Engine", "Sums", "make_engine"]


def make_engine(config: RunConfig, method: Method, model: nn.Module, device: torch.device) -> Engine:
    """The engine that `config` names, around `model` (built in full on every rank), with the method's optimizer.

    `auto` is replicated, unless a ZeRO stage above 0, an offload or a DeepSpeed file asks for deepspeed. Raises ConfigError for a combination
    that cannot work.
    """
    kind = config.engine
    if kind == "auto":
        kind = "deepspeed" if asks_for_deepspeed(config) else "replicated"
    if kind == "deepspeed" and config.zero_stage == 0:
        if config.offload != "none":
            raise ConfigError(f"offload: {config.offload} needs ZeRO stage 1 to 3, not 0; use --zero-stage 2")
        kind = "replicated"
    if kind == "deepspeed":
        from lm_core.engine.deepspeed import DeepSpeed

        return DeepSpeed(config, method, model, device)
    if kind == "sharded":
        from lm_core.engine.sharded import Sharded

        return Sharded(config, method, model, device)
    from lm_core.engine.replicated import Replicated

    return Replicated(config, method, model, device)

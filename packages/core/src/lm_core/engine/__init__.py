"""Engines: where weights, gradients and optimizer state live. `make_engine` picks one from the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_core import dist
from lm_core.deepspeed_settings import engine_kind, settings
from lm_core.engine.base import Engine, Sums

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
    kind = engine_kind(config)
    if kind == "replicated" and config.deepspeed_config is not None:
        # a file of stage 0 configures nothing, but what it says must hold
        settings(config, dist.world())
    if (own := method.engine(model, device)) is not None:
        return own
    if kind == "deepspeed":
        from lm_core.engine.deepspeed import DeepSpeed

        return DeepSpeed(config, method, model, device)
    if kind == "sharded":
        from lm_core.engine.sharded import Sharded

        return Sharded(config, method, model, device)
    from lm_core.engine.replicated import Replicated

    return Replicated(config, method, model, device)

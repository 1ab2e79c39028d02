"""A model for inference beside the one that is trained: a teacher. It belongs to no engine and to no checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from lm_core.engine.replicated import broadcast


def freeze(model: nn.Module, sharded: bool, device: torch.device | None = None) -> nn.Module:
    """`model`, frozen and in eval mode on `device` (default: where it is), equal on every rank.

    With `sharded` every rank keeps its share of each layer's weights (FSDP2, beside any engine), and all ranks must call the
    model equally often. Keep it outside the module that is trained (`object.__setattr__`, a list), else it is saved with it.
    """
    device = next(model.parameters()).device if device is None else device
    model = model.requires_grad_(False).eval()
    broadcast(model)
    if not sharded:
        return model.to(device)
    from lm_core.engine.sharded import shard

    return shard(model, device, keep_root=False)

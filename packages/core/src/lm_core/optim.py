"""Which parameters are trained and how: groups from rules, and the default optimizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lm_core.errors import ConfigError

if TYPE_CHECKING:
    from lm_core.method import Rule
    from lm_core.options import OptimOptions


def _rule(name: str, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if re.search(rule.pattern, name)), None)


def freeze(model: nn.Module, rules: Sequence[Rule]) -> None:
    """Stop gradients of every parameter whose first matching rule says `trained=False`."""
    for name, parameter in model.named_parameters():
        rule = _rule(name, rules)
        if rule is not None and not rule.trained:
            parameter.requires_grad_(False)


def param_groups(model: nn.Module, rules: Sequence[Rule], config: OptimOptions) -> list[dict[str, Any]]:
    """Optimizer groups {params, names, lr_scale, weight_decay} of the trained parameters, in the model's order.

    The first rule whose pattern is found in a name decides; a tied parameter counts once, under its first name.
    Without a rule of its own, weight decay spares biases and everything with fewer than two dimensions (norms, scales).
    Parameters that arrive frozen stay frozen. Raises ConfigError when nothing is left to train.
    """
    freeze(model, rules)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = _rule(name, rules)
        scale = 1.0 if rule is None else rule.lr_scale
        if rule is not None and rule.weight_decay is not None:
            decay = rule.weight_decay
        else:
            decay = 0.0 if parameter.ndim < 2 or name.endswith("bias") else config.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ConfigError("parameters: none is trained; the rules and the model freeze every one of them, so unfreeze at least one")
    return list(groups.values())


def adamw(groups: list[dict[str, Any]], config: OptimOptions) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay; the fused implementation, which makes one pass over memory per update."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lm_core.errors import ConfigError
from lm_core.method import Rule
from lm_core.optim import adamw, param_groups

CONFIG: Any = SimpleNamespace(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight


def test_decay_spares_biases_and_norms_and_counts_tied_weights_once() -> None:
    groups = param_groups(Tiny(), [], CONFIG)
    assert {group["weight_decay"]: group["names"] for group in groups} == {
        0.1: ["embed.weight"],
        0.0: ["norm.weight", "norm.bias", "head.bias"],
    }


def test_the_first_matching_rule_wins() -> None:
    rules = [Rule(r"norm\.bias", trained=False), Rule("norm", lr_scale=2.0, weight_decay=0.5), Rule("norm", lr_scale=9.0)]
    model = Tiny()
    groups = {tuple(group["names"]): (group["lr_scale"], group["weight_decay"]) for group in param_groups(model, rules, CONFIG)}
    assert groups == {("embed.weight",): (1.0, 0.1), ("norm.weight",): (2.0, 0.5), ("head.bias",): (1.0, 0.0)}
    assert not model.norm.bias.requires_grad


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="parameters: none is trained"):
        param_groups(Tiny(), [Rule("", trained=False)], CONFIG)


def test_adamw_equals_the_plain_implementation() -> None:
    torch.manual_seed(0)
    model, twin = Tiny(), Tiny()
    twin.load_state_dict(model.state_dict())
    optimizer = adamw(param_groups(model, [], CONFIG), CONFIG)
    plain = torch.optim.AdamW(param_groups(twin, [], CONFIG), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for _ in range(5):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        optimizer.step()
        plain.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)

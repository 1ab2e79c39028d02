from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lm_core.errors import ConfigError, InputError, RunFailed
from lowrank_opt import (
    AdamW,
    AdamW8bit,
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    MuonWithAdamW,
    attach_per_layer,
    build_param_groups,
)


class Tied(nn.Module):
    """A tiny language model whose head is its embedding."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def loss(self, seed):
        ids = torch.randint(0, 20, (8,), generator=torch.Generator().manual_seed(seed))
        return nn.functional.cross_entropy(self.lm_head(self.body(self.embed(ids))).float(), ids.roll(1))


def build(kind, dtype=torch.float32, **settings):
    model = Tied(dtype)
    rank = None if kind in (AdamW, AdamW8bit) else 4
    gap = {} if kind in (AdamW, AdamW8bit, MuonWithAdamW) else {"update_proj_gap": 3}
    return model, kind(build_param_groups(model, rank, **gap), lr=1e-2, weight_decay=0.1, **settings)


def ordinary(model, optimizer, steps, micro=1, clip=None):
    norms = []
    for step in steps:
        for part in range(micro):
            (model.loss(step * micro + part) / micro).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def per_layer(model, optimizer, steps, micro=1, **settings):
    layers = attach_per_layer(optimizer, model, accumulation=micro, **settings)
    norms = []
    for step in steps:
        for part in range(micro):
            (model.loss(step * micro + part) / micro).backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return norms, layers


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdamW, AdamW8bit, GaLoreAdamW, GaLoreAdamW8bit, ApolloAdamW, FiraAdamW, MuonWithAdamW])
def test_one_backward_per_step_is_bit_for_bit_the_ordinary_step(kind, dtype):
    plain, layered = build(kind, dtype), build(kind, dtype)
    expected = ordinary(*plain, range(7))
    norms, _ = per_layer(*layered, range(7))
    assert equal(plain[0], layered[0])
    assert norms == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert layered[1].grad_norm_kind == "full"
    assert layered[1].param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("kind", [AdamW, GaLoreAdamW, GaLoreAdamW8bit, ApolloAdamW, FiraAdamW, MuonWithAdamW])
def test_accumulation_is_the_sum_of_projected_gradients(kind):
    plain, layered = build(kind), build(kind)
    if kind in (GaLoreAdamW, GaLoreAdamW8bit):
        # the basis comes from the first micro-batch here and from the sum there, so both get the same one
        for model, optimizer in (plain, layered):
            for number in (0, 2):
                weight = model.body[number].weight
                optimizer.set_basis(weight, torch.eye(4, min(weight.shape)))
            optimizer.param_groups[0]["update_proj_gap"] = 1000
            for state in optimizer.state.values():
                state["next_refresh"] = 1000
    ordinary(*plain, range(5), micro=3)
    per_layer(*layered, range(5), micro=3)
    for a, b in zip(plain[0].parameters(), layered[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_the_basis_comes_from_the_first_micro_batch_of_the_step():
    model, optimizer = build(GaLoreAdamW)
    reference = Tied()
    reference.loss(0).backward()
    per_layer(model, optimizer, range(1), micro=2)
    vectors = torch.linalg.svd(reference.body[0].weight.grad).Vh[:4]
    found = optimizer.state[model.body[0].weight]["proj"]
    torch.testing.assert_close((found @ vectors.t()).abs(), torch.eye(4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("micro", [1, 3])
def test_only_one_gradient_lives_at_a_time(micro):
    model, optimizer = build(GaLoreAdamW)
    low_rank = set(optimizer.param_groups[0]["params"])
    live = []

    def count(_):
        live.append([p for p in model.parameters() if p.grad is not None])

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    layers = attach_per_layer(optimizer, model, accumulation=micro)
    for part in range(micro):
        model.loss(part).backward()
        left = [p for p in model.parameters() if p.grad is not None]
        assert not low_rank.intersection(left)
        assert bool(left) == (part < micro - 1), "dense gradients wait for the last micro-batch"
        if part < micro - 1:
            assert sorted((low.dtype, tuple(low.shape)) for low in layers.low.values()) == [(torch.float32, (4, 24))] * 2
    if micro == 1:
        assert max(len(parameters) for parameters in live) == 1
    else:
        assert sum(low.numel() for low in layers.low.values()) == 0
    optimizer.step()


def test_clipping_uses_the_norm_of_the_step_before():
    model, optimizer = build(AdamW)
    layers = attach_per_layer(optimizer, model, clip=0.1)
    used = []
    original = layers._clip_factor
    layers._clip_factor = lambda *arguments: used.append(original(*arguments)) or used[-1]
    norms = []
    for step in range(3):
        used.clear()
        model.loss(step).backward()
        optimizer.step()
        if step:
            assert used == [min(1.0, 0.1 / (norms[-1] + 1e-6))] * len(used)
        norms.append(optimizer.grad_norm)
    assert norms[0] > 0.1, "the true norm is reported, not the clipped one"


def test_clipping_per_parameter_limits_each_to_its_share():
    model, optimizer = build(AdamW)
    elements = sum(p.numel() for p in model.parameters())
    layers = attach_per_layer(optimizer, model, clip=0.01, clip_mode="per_param")
    weight = model.body[0].weight
    factor = layers._clip_factor(optimizer.param_groups[0], weight, 5.0)
    assert factor * 5.0 == pytest.approx(0.01 * math.sqrt(weight.numel() / elements), rel=1e-5)


def test_delayed_clipping_survives_a_resume():
    whole = build(GaLoreAdamW)
    per_layer(*whole, range(6), clip=0.05)
    model, optimizer = build(GaLoreAdamW)
    per_layer(model, optimizer, range(3), clip=0.05)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, fresh = build(GaLoreAdamW)
    resumed.load_state_dict(model.state_dict())
    layers = attach_per_layer(fresh, resumed, clip=0.05)
    fresh.load_state_dict(saved)
    for step in range(3, 6):
        resumed.loss(step).backward()
        fresh.step()
    assert equal(whole[0], resumed)
    layers.detach()


def test_parameters_that_a_micro_batch_does_not_reach_are_updated_at_the_step():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    optimizer = GaLoreAdamW(build_param_groups(model, rank=2), lr=1e-2)
    attach_per_layer(optimizer, model, accumulation=2)
    before = [p.detach().clone() for p in model.parameters()]
    inputs = torch.randn(3, 6)
    model[1](model[0](inputs)).square().sum().backward()
    model[0](inputs).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.grad_norm_kind == "projected"


def test_detaching_restores_ordinary_steps():
    plain, layered = build(GaLoreAdamW), build(GaLoreAdamW)
    ordinary(*plain, range(6))
    _, layers = per_layer(*layered, range(3))
    layers.detach()
    assert not layered[1].per_layer
    ordinary(*layered, range(3, 6))
    assert equal(plain[0], layered[0])


def test_misuse_is_refused_by_name():
    model, optimizer = build(GaLoreAdamW)
    other = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="weight, bias"):
        attach_per_layer(optimizer, other)
    with pytest.raises(ConfigError, match="accumulation"):
        attach_per_layer(optimizer, model, accumulation=0)
    with pytest.raises(ConfigError, match="delayed, per_param"):
        attach_per_layer(optimizer, model, clip=1.0, clip_mode="global")
    attach_per_layer(optimizer, model)
    with pytest.raises(ConfigError, match="attached already"):
        attach_per_layer(optimizer, model)
    with pytest.raises(InputError, match="no gradient arrived"):
        optimizer.step()
    model.loss(0).backward()
    with pytest.raises(InputError, match="under way"):
        optimizer.state_dict()
    with pytest.raises(InputError, match="2 times"):
        model.loss(1).backward()


def test_a_non_finite_gradient_stops_at_its_parameter():
    model, optimizer = build(AdamW)
    attach_per_layer(optimizer, model)
    with pytest.raises(RunFailed, match=r"body\.2\.(weight|bias).*not finite"):
        (model.loss(0) * math.nan).backward()


def test_needing_whole_gradients_is_said(caplog):
    model, optimizer = build(ApolloAdamW)
    with caplog.at_level("WARNING"):
        attach_per_layer(optimizer, model, accumulation=2)
    assert "needs whole gradients" in caplog.text

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_core.errors import ConfigError
from lowrank_opt import GaLoreAdamW, build_param_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 16, bias=False)
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.classifier = nn.Sequential(nn.Linear(8, 8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def names(groups, *, low_rank):
    return sorted(name for group in groups if (group["rank"] is not None) == low_rank for name in group["param_names"])


def test_auto_takes_the_matrices_of_the_body():
    groups = build_param_groups(Model(), rank=2, scale=0.5)
    assert names(groups, low_rank=True) == ["attention.weight", "conv.weight", "mlp.weight"]
    dense = [
        "attention.bias",
        "classifier.0.bias",
        "classifier.0.weight",
        "conv.bias",
        "embed.weight",
        "lm_head.weight",
        "norm.bias",
        "norm.weight",
    ]
    assert names(groups, low_rank=False) == dense
    assert groups[0]["scale"] == 0.5


def test_biases_and_norms_are_not_decayed():
    groups = build_param_groups(Model(), rank=2, weight_decay=0.1)
    undecayed = [name for group in groups if group["weight_decay"] == 0 for name in group["param_names"]]
    assert sorted(undecayed) == ["attention.bias", "classifier.0.bias", "conv.bias", "norm.bias", "norm.weight"]
    assert {group["weight_decay"] for group in build_param_groups(Model(), rank=2, weight_decay=0.1, no_decay=False)} == {0.1}


def test_patterns_select_and_exclude_by_parameter_name():
    groups = build_param_groups(Model(), rank=2, target_modules=["attention", "lm_head"])
    assert names(groups, low_rank=True) == ["attention.weight", "lm_head.weight"]
    groups = build_param_groups(Model(), rank=2, exclude_modules=["mlp", "conv"])
    assert names(groups, low_rank=True) == ["attention.weight"]
    assert names(build_param_groups(Model(), rank=None), low_rank=True) == []


def test_a_pattern_without_a_match_names_the_nearest():
    with pytest.raises(ConfigError, match=r"target_modules: 'atention' matches no matrix.*attention\.weight"):
        build_param_groups(Model(), rank=2, target_modules=["atention"])
    with pytest.raises(ConfigError, match="regular expression"):
        build_param_groups(Model(), rank=2, target_modules=["("])


def test_tied_heads_stay_dense_and_stand_once():
    model = Model()
    model.lm_head.weight = model.embed.weight
    groups = build_param_groups(model, rank=2)
    assert sum(p is model.embed.weight for group in groups for p in group["params"]) == 1
    assert "embed.weight" in names(groups, low_rank=False)


def test_conv1d_of_transformers_is_a_linear_map():
    gpt2 = pytest.importorskip("transformers")
    model = gpt2.GPT2LMHeadModel(gpt2.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    groups = build_param_groups(model, rank=2)
    assert [name.split("h.0.")[1] for name in names(groups, low_rank=True)] == [
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ]


def test_groups_train_a_model_in_any_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = GaLoreAdamW(build_param_groups(model, rank=2, update_proj_gap=10, scale=1.0), lr=1e-2)
    inputs, targets = torch.randn(64, 8), torch.randint(0, 4, (64,))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_core.errors import ConfigError
from lm_core.models import lora
from lowrank_opt import (
    AdamW,
    AdamW8bit,
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    LDAdamW,
    MuonWithAdamW,
    QGaLoreAdamW8bit,
    build_param_groups,
    estimate_memory,
)
from lowrank_opt.apollo import MINI
from lowrank_opt.memory import model_of, workspace_bytes
from lowrank_opt.models import PRESETS

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
NAMES = ["adamw", "adamw8bit", "galore", "galore8bit", "apollo", "apollo-mini", "qgalore", "muon"]
# bytes of state with bfloat16 weights, at the rank of the second column; section 14 of the specification
ANCHORS = [
    ("llama_60m", 128, [464588800, 215805952, 320147456, 184623104, 312807424, 262608896, 179175424, 363401216]),
    ("llama_350m", 256, [2943754240, 943321088, 1217536000, 570785792, 1129455616, 527051776, 505413632, 1734221824]),
    ("llama_1b", 512, [10712662016, 3111778816, 3817521152, 1624121344, 3465199616, 1054097216, 1362632704, 5881020416]),
    ("llama_7b", 1024, [53907324928, 14469742720, 16930340864, 6483001472, 15051292672, 2111930368, 5088395392, 28003303424]),
    ("roberta", 8, [997177360, 486703120, 325662736, 316861456, 324778000, 318584848, 316204816, 657438736]),
    (SMOLLM2, 128, [1076120064, 442427904, 464177664, 305846784, 439110144, 228432384, 287241984, 651446784]),
]


@pytest.mark.parametrize(("model", "rank", "expected"), ANCHORS, ids=lambda value: value if isinstance(value, str) else "")
def test_state_bytes_of_known_models(model, rank, expected):
    model = model_of(model)
    assert [estimate_memory(model, name, rank=rank, dtype=torch.bfloat16).states for name in NAMES] == expected


def small(name, dtype=torch.float32):
    """A test preset with weights, rebuilt from its shapes."""
    model = model_of(name).to_empty(device="cpu").to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("_test")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("optimizer", "build", "settings"),
    [
        ("adamw", AdamW, {}),
        ("adamw8bit", AdamW8bit, {}),
        ("adamw8bit", AdamW8bit, {"min_8bit_size": 64, "block_size": 100}),
        ("galore8bit", GaLoreAdamW8bit, {}),
        ("fira", FiraAdamW, {}),
        ("apollo", ApolloAdamW, {}),
        ("apollo-mini", ApolloAdamW, MINI),
        ("qgalore", QGaLoreAdamW8bit, {}),
        ("qgalore", QGaLoreAdamW8bit, {"proj_type": "full", "min_8bit_size": 1}),
        ("ldadam", LDAdamW, {}),
        ("ldadam", LDAdamW, {"error_feedback": False}),
        ("muon", MuonWithAdamW, {}),
        ("galore8bit", GaLoreAdamW8bit, {"min_8bit_size": 1}),
        ("galore", GaLoreAdamW, {}),
        ("galore", GaLoreAdamW, {"proj_type": "full"}),
        ("galore", GaLoreAdamW, {"proj_type": "reverse_std", "proj_dtype": "bf16"}),
        ("galore", GaLoreAdamW, {"rank": 64}),
        ("galore", GaLoreAdamW, {"rank": 0.5, "full_rank_policy": "rotate"}),
    ],
)
def test_measured_state_equals_the_formula(name, dtype, optimizer, build, settings):
    model, settings = small(name, dtype), dict(settings)
    rank = settings.pop("rank", 8)
    groups = build_param_groups(model, None if optimizer.startswith("adamw") else rank)
    built = build(groups, **settings)
    predicted = built.predicted_state_bytes()
    built.step()
    known = {key: value for key, value in settings.items() if not key.startswith("scale")}
    assert built.state_bytes() == predicted == estimate_memory(model, optimizer, rank=rank, **known).states


def test_rows_add_up():
    memory = estimate_memory("llama_test", "galore", rank=8, tokens=256)
    rows = memory.as_dict()
    assert memory.total == sum(rows[key] for key in ("weights", "gradients", "moments", "bases", "workspace", "activations_rough"))
    assert memory.weights == memory.gradients == 4 * memory.parameters
    assert memory.low_rank_states < memory.states
    checkpointed = estimate_memory("llama_test", "galore", rank=8, tokens=256, gradient_checkpointing=True)
    assert checkpointed.activations_rough < memory.activations_rough


def test_per_layer_updates_keep_one_gradient():
    whole = estimate_memory("llama_7b", "galore8bit", rank=1024, dtype=torch.bfloat16)
    one = estimate_memory("llama_7b", "galore8bit", rank=1024, dtype=torch.bfloat16, per_layer=True)
    assert one.gradients == 2 * 32000 * 4096
    gib = (one.weights + one.states) / 2**30
    assert gib == pytest.approx(18.6, abs=0.05)
    accumulated = estimate_memory("llama_7b", "galore8bit", rank=512, dtype=torch.bfloat16, per_layer=True, accumulate=4)
    dense = 2 * (one.parameters - 6_476_005_376)
    accumulators = accumulated.gradients - one.gradients - dense
    assert (accumulated.weights + accumulated.states + accumulators) / 2**30 == pytest.approx(19.2, abs=0.05)
    assert whole.gradients == 2 * whole.parameters


def test_workspace_follows_the_method():
    shape = (1000, 3000)
    assert workspace_bytes(shape, 100, "left", "gram", 16, True) == 12 * 1000**2
    assert workspace_bytes(shape, 100, "left", "gram", 16, False) == 12 * 1000**2 + 4 * 3_000_000
    assert workspace_bytes(shape, 100, "left", "rsvd", 16, True) == 4 * 4000 * 116
    # with that many columns A A^T is computed once
    assert workspace_bytes(shape, 400, "left", "rsvd", 16, True) == 4 * 4000 * 416 + 4 * 1000**2
    assert workspace_bytes(shape, 100, "left", "svd", 16, True) == 4 * (3_000_000 + 1000 * 4000) + 12 * 1000**2


def test_adapters_are_counted_and_frozen_weights_have_no_state():
    pytest.importorskip("peft")
    model = lora(model_of("llama_test"), r=4, target_modules=["q_proj", "v_proj"])
    memory = estimate_memory(model, "lora")
    # two layers, two matrices, A and B of 4 x 64
    assert memory.trained == 2 * 2 * 2 * 4 * 64
    assert memory.adapters == memory.gradients == 4 * memory.trained
    assert memory.states == 8 * memory.trained


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="did you mean galore"):
        estimate_memory("llama_test", "galor")
    with pytest.raises(ConfigError, match="llama_60m"):
        estimate_memory("llama_600m", "galore")

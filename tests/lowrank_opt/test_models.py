from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lm_core.config import build, to_dict
from lowrank_opt import build_param_groups
from lowrank_opt.config import TrainConfig
from lowrank_opt.memory import model_of
from lowrank_opt.method import method_for
from lowrank_opt.models import HUB_IDS, HUB_MODELS, LLAMA_PRESETS, PRESETS, RANKS, default_tokenizer

# name, parameters, elements and number of low-rank matrices
SIZES = [
    ("llama_60m", 58_073_600, 25_296_896, 56),
    ("llama_130m", 134_105_856, 84_934_656, 84),
    ("llama_350m", 367_969_280, 302_383_104, 168),
    ("llama_1b", 1_339_082_752, 1_207_910_400, 168),
    ("llama_7b", 6_738_415_616, 6_476_005_376, 224),
    ("roberta", 124_647_170, 84_934_656, 72),
    ("gpt2", 124_441_344, 84_934_656, 48),
]


@pytest.mark.parametrize(("name", "parameters", "elements", "matrices"), SIZES)
def test_sizes_are_exact(name, parameters, elements, matrices):
    model = model_of(name)
    low_rank = build_param_groups(model, rank=1)[0]["params"]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (sum(p.numel() for p in low_rank), len(low_rank)) == (elements, matrices)


@pytest.mark.parametrize("name", [*PRESETS, *HUB_MODELS])
def test_special_ids_are_in_range(name):
    config = model_of(name).config
    assert all(0 <= i < config.vocab_size for i in (config.pad_token_id, config.bos_token_id, config.eos_token_id))


def test_test_sizes_are_small_and_every_recipe_has_a_model():
    assert all(sum(p.numel() for p in model_of(name).parameters()) < 250_000 for name in PRESETS if name.endswith("_test"))
    assert set(RANKS) - {"smollm2-135m"} <= set(LLAMA_PRESETS)


def test_the_table_needs_no_torch_and_the_package_nothing_heavy():
    code = """
import sys
import lowrank_opt, lowrank_opt.models
assert "torch" not in sys.modules
assert "GaLoreAdamW" in dir(lowrank_opt)
lowrank_opt.GaLoreAdamW, lowrank_opt.estimate_memory
loaded = {"transformers", "deepspeed", "wandb", "datasets", "peft", "bitsandbytes", "galore_torch"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_of_the_package_are_attribute_errors():
    import lowrank_opt

    with pytest.raises(AttributeError, match="GaLoreAdamX"):
        lowrank_opt.GaLoreAdamX  # noqa: B018


@pytest.mark.parametrize("name", HUB_MODELS)
def test_models_of_the_hub_are_named_as_in_the_guide(name):
    config = build(TrainConfig, {"mode": "finetuning", "task": "sst2", "optimizer": "galore", "model": name, "max_length": 64})
    method = method_for(config)
    assert method.source() == {"name": HUB_IDS[name], "presets": PRESETS, "init": "pretrained"}
    assert default_tokenizer(name) == HUB_IDS[name]
    # sizes are known without the hub: for estimates, and from random weights
    with torch.device("meta"):
        loaded = method_for(config).load(torch.float32)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model_of(name).parameters())
    random = build(TrainConfig, {**to_dict(config), "init": "random"})
    assert method_for(random).source()["init"] == "random"
    assert name in method_for(random).source()["presets"]

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lm_core.config import build
from lm_core.errors import ConfigError
from lm_core.models import load_model
from lm_core.run import run
from moe_cpt.adapters import adapted, targets_of
from moe_cpt.config import TrainConfig
from moe_cpt.export import export
from moe_cpt.inspection import load_mixture
from moe_cpt.method import MoeCPT
from moe_cpt.options.conversion import ExportConfig
from tests.moe_cpt.small import mixture_folder, tokens

OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0}


def train(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    options = {
        "model": str(model), "data": ["synthetic:markov"], "tokenizer": "bytes", "max_length": 32, "warmup": 0.0, "lr": 5e-3, "precision": "fp32",
        "mode": "lora", "trainable": "q_proj,gate_proj,down_proj", "lora_dropout": 0.0, "tensorboard": False, "eval_every": "never",
        "output_dir": str(folder), "max_steps": 4, "micro_batch_size": 2, "schedule": "constant",
    }  # fmt: skip
    config = build(TrainConfig, {name: value for name, value in {**options, **changes}.items() if value is not None})
    return run(config, MoeCPT(config))


def test_adapters_of_experts_add_a_product_of_low_rank_to_every_expert(tmp_path: Path) -> None:
    model = load_mixture(str(mixture_folder(tmp_path, num_selects=2)))
    before = model(tokens()).logits
    wrapped = adapted(model, trainable=["up_proj", "down_proj"], **OPTIONS).eval()
    assert torch.equal(wrapped(tokens()).logits, before)
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("mlp.")[2].partition(".")[0] for name in trained} == {"experts", "router"}
    for number, parameter in enumerate(trained.values()):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
    changed = wrapped(tokens()).logits
    original = load_mixture(str(tmp_path / "moe")).blocks()[0].experts.gate_up_proj
    merged: Any = wrapped.merge_and_unload()
    assert (changed - before).abs().max() > 1e-2
    assert_close(merged(tokens()).logits, changed, rtol=1e-4, atol=1e-5)
    for delta in merged.blocks()[0].experts.gate_up_proj.detach() - original.detach():
        assert torch.linalg.matrix_rank(delta, atol=1e-6) == 4


def test_names_that_match_nothing_are_all_listed(tmp_path: Path) -> None:
    model = load_mixture(str(mixture_folder(tmp_path)))
    with pytest.raises(ConfigError, match="trainable: the model has no query, gate; choose from q_proj, k_proj"):
        adapted(model, trainable=["q_proj", "query", "gate"], **OPTIONS)
    with pytest.raises(ConfigError, match="modules_to_save: the model has no heads"):
        adapted(model, trainable=["q_proj"], modules_to_save=["heads"], **OPTIONS)
    assert targets_of(model, ["gate_proj", "up_proj", "v_proj"]) == (["v_proj"], ["mlp.experts.gate_up_proj"])


def test_dropout_acts_on_linear_layers_beside_stacked_tensors(tmp_path: Path) -> None:
    wrapped = adapted(load_mixture(str(mixture_folder(tmp_path))), trainable=["q_proj", "down_proj"], rank=4, alpha=8.0, dropout=0.3)
    assert {part.p for part in wrapped.modules() if isinstance(part, torch.nn.Dropout)} == {0.3}


@pytest.mark.slow
def test_adapters_are_resumed_bit_for_bit_and_loaded(tmp_path: Path) -> None:
    model = mixture_folder(tmp_path, num_selects=2)
    train(tmp_path / "whole", model)
    train(tmp_path / "parts", model, max_steps=2)
    train(tmp_path / "parts", model, resume="auto")
    expected, resumed = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert any("router" in name for name in expected)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    # the folder of an adapter is a model, and can be trained on
    merged = load_model(str(tmp_path / "whole" / "final")).train(False)
    assert (merged(tokens()).logits - load_mixture(str(model))(tokens()).logits).abs().max() > 1e-3
    exported = build(
        ExportConfig,
        {"model": str(model), "peft_path": tmp_path / "whole" / "final", "format": "llama_moe", "save_path": tmp_path / "out"},
    )
    assert export(exported)["difference"] < 1e-4
    assert torch.allclose(load_mixture(str(tmp_path / "out"))(tokens()).logits, merged(tokens()).logits, atol=1e-4)
    changes = {"trainable": "q_proj,v_proj", "lora_dropout": 0.1}
    on = {"trainable": None, "lora_dropout": None, "peft_path": tmp_path / "whole" / "final"}
    for name, options in (("other", changes), ("on", on)):
        assert train(tmp_path / name, model, max_steps=1, **options)["progress"]["steps"] == 1


def test_options_of_adapters_belong_to_lora(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora_rank: 4 belongs to --mode lora"):
        build(TrainConfig, {"model": "x", "data": ["y"], "lora_rank": 4})
    with pytest.raises(ConfigError, match="trainable: the adapter in old has its own"):
        build(TrainConfig, {"model": "x", "data": ["y"], "mode": "lora", "trainable": "q_proj", "peft_path": "old"})

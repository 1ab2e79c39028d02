from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_core.errors import ConfigError, InputError
from moe_cpt.inspection import load_mixture
from moe_cpt.legacy import import_legacy
from moe_cpt.split.legacy import read_legacy
from moe_cpt.tensors import ModelTensors
from tests.moe_cpt.small import dense_folder, mixture_folder, tokens
from tests.moe_cpt.test_commands import call


def as_legacy(source: Path, target: Path, **changes: Any) -> Path:
    """The checkpoint that the original code would have written for a mixture."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    experts, size = config["num_experts"], config["intermediate_size"] // config["num_experts"]
    names = {"router.fc1": "gate.gate_network.0", "router.fc2": "gate.gate_network.2", "router.proj": "gate.gate_network"}
    old: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        prefix, _, inner = name.partition(".mlp.")
        if inner == "experts.gate_up_proj":
            half = tensor.shape[1] // 2
            for expert in range(experts):
                old[f"{prefix}.mlp.calculator.experts.weight_gate.{expert}"] = tensor[expert, :size].clone()
                old[f"{prefix}.mlp.calculator.experts.weight_up.{expert}"] = tensor[expert, half : half + size].clone()
        elif inner == "experts.down_proj":
            for expert in range(experts):
                old[f"{prefix}.mlp.calculator.experts.weight_down.{expert}"] = tensor[expert, :, :size].clone()
        elif inner:
            inner = inner.replace("router.noise", "gate.weight_noise")
            for ours, theirs in names.items():
                inner = inner.replace(ours, theirs)
            old[f"{prefix}.mlp.{inner}"] = tensor
        else:
            old[name] = tensor
    save_file(old, target / "model.safetensors", metadata={"format": "pt"})
    original = {
        "gate_type": "TopKBalancedNoisyGate", "calculator_type": "UniversalCalculator", "add_weight_norm": False, "drop_tokens": True,
        "dropped_padding": "zero", "capacity_factor": 1.25, "size_experts": [[size] * experts] * config["num_hidden_layers"],
        "score_scale_factor": [config["score_scale_factor"]] * config["num_hidden_layers"],
    }  # fmt: skip
    for name in ("experts_backend", "balance_scope", "num_shared_experts", "shared_scale_factor"):
        config.pop(name)
    (target / "config.json").write_text(json.dumps({**config, **original, **changes}))
    return target


@pytest.mark.parametrize("network", ["mlp", "linear"])
def test_an_imported_checkpoint_gives_equal_logits(network: str, tmp_path: Path) -> None:
    source = mixture_folder(tmp_path, gate_network=network, num_selects=2)
    old = as_legacy(source, tmp_path / "old")
    import_legacy(old, tmp_path / "new")
    ids = tokens()
    assert torch.equal(load_mixture(str(tmp_path / "new"))(ids).logits, load_mixture(str(source))(ids).logits)
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == set(load_file(source / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_type": "BestGate"}, "gate_type: 'BestGate' is not known"),
        ({"add_weight_norm": True}, "add_weight_norm True of the checkpoint is not supported"),
        ({"size_experts": [[8, 16]]}, "size_experts: \\[1, 2\\] sizes; give 8 for each of 2 layers"),
    ],
)
def test_what_cannot_be_imported_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    old = as_legacy(mixture_folder(tmp_path), tmp_path / "old", **changes)
    with pytest.raises(ConfigError, match=message):
        import_legacy(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_every_tensor_is_used_or_refused(tmp_path: Path) -> None:
    old = as_legacy(mixture_folder(tmp_path), tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.gate.other": torch.ones(1)}, old / "model.safetensors")
    with pytest.raises(InputError, match=r"gate\.other is not known"):
        import_legacy(old, tmp_path / "new")
    tensors.pop("model.layers.1.mlp.calculator.experts.weight_up.3")
    save_file(tensors, old / "model.safetensors")
    with pytest.raises(InputError, match="has 23 of 24 expert tensors"):
        import_legacy(old, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe", "old"]


def test_lists_of_the_original_splits_are_read(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    labels = [[(neuron * 7 + layer) % 8 for neuron in range(64)] for layer in range(2)]
    for name, content in (
        ("labels", labels),
        ("indices", [[[neuron for neuron in range(64) if of[neuron] == expert] for expert in range(8)] for of in labels]),
    ):
        (tmp_path / name).mkdir()
        for layer, lists in enumerate(content):
            torch.save(lists, tmp_path / name / f"layers.{layer}.mlp.up_proj.weight")
        split = read_legacy(tmp_path / name, ModelTensors(source), 2, 64)
        assert split.partition
        assert [[sorted(neurons.tolist()) for neurons in split.layer(layer)[0]] for layer in range(2)] == [
            [[neuron for neuron in range(64) if of[neuron] == expert] for expert in range(8)] for of in labels
        ]
    words = ("convert", "--model_path", source, "--split_file_path", tmp_path / "labels", "--num_selects", 2, "-o", tmp_path / "moe")
    assert call(*words)["active"] > 0
    torch.save([0, 1, 2], tmp_path / "labels" / "layers.1.mlp.up_proj.weight")
    assert "holds 3 labels for 64 neurons" in call(*words, "--overwrite", code=2)
    (tmp_path / "labels" / "layers.1.mlp.up_proj.weight").write_text("no")
    assert "is no list of labels" in call(*words, "--overwrite", code=2)

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lm_core.errors import ConfigError, InputError
from moe_cpt import tensors
from moe_cpt.convert import convert
from moe_cpt.split import Split, split_ffn
from moe_cpt.tensors import ModelTensors, ffn_name
from tests.moe_cpt.small import dense_folder, dense_model


def test_tensors_outside_the_feed_forward_layers_are_copied_bit_for_bit_in_their_type(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    dense_model().to(torch.bfloat16).save_pretrained(source)
    convert(source, split_ffn(source, "random", num_experts=8), tmp_path / "moe")
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    others = [name for name in old if ".mlp." not in name]
    assert others
    for name in others:
        assert torch.equal(old[name].view(torch.int16), new[name].view(torch.int16))
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}


def test_each_expert_holds_the_neurons_of_its_indices(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", intermediate_size=60)
    split = split_ffn(source, "random", num_experts=5)
    made = convert(source, split, tmp_path / "moe")
    assert (made.expert_size, made.stored_size) == (12, 16)
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    experts, neurons = "model.layers.1.mlp.experts.", split.indices[1][3]
    gate_up, down = new[experts + "gate_up_proj"][3], new[experts + "down_proj"][3]
    assert torch.equal(gate_up[:12], old[ffn_name(1, "gate_proj")][neurons])
    assert torch.equal(gate_up[16:28], old[ffn_name(1, "up_proj")][neurons])
    assert torch.equal(down[:, :12], old[ffn_name(1, "down_proj")][:, neurons])
    assert not gate_up[12:16].any()
    assert not gate_up[28:].any()
    assert not down[:, 12:].any()


def test_several_files_in_and_out_give_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense_model().save_pretrained(tmp_path / "one")
    dense_model().save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    split = split_ffn(tmp_path / "one", "random", num_experts=8)
    convert(tmp_path / "one", split, tmp_path / "whole")
    monkeypatch.setattr(tensors.ModelWriter.__init__, "__defaults__", (20_000,))
    convert(tmp_path / "many", split, tmp_path / "parts")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    whole, parts = ModelTensors(tmp_path / "whole"), ModelTensors(tmp_path / "parts")
    assert set(index["weight_map"]) == set(whole) == set(parts)
    assert len(set(index["weight_map"].values())) > 2
    for name in whole:
        assert torch.equal(whole[name], parts[name])


def test_a_torch_archive_is_read_like_safetensors(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    old = dense_folder(tmp_path / "old")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    assert split_ffn(old, "random", num_experts=8).model_hash == split_ffn(source, "random", num_experts=8).model_hash


def test_tokenizer_and_split_travel_along(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    split = split_ffn(source, "random", num_experts=8)
    convert(source, split, tmp_path / "moe")
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")("abc")["input_ids"] == [97, 98, 99]
    stored = Split.load(tmp_path / "moe" / "split.safetensors")
    assert all(torch.equal(left, right) for left, right in zip(stored.indices, split.indices))


def test_router_starts_as_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = dense_folder(tmp_path / "dense")
    split = split_ffn(source, "random", num_experts=8)
    convert(source, split, tmp_path / "a", seed=1)
    convert(source, split, tmp_path / "b", seed=2)
    router = "model.layers.0.mlp.router."
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a[router + "fc1.weight"].std() == pytest.approx(0.2, rel=0.15)
    assert not torch.equal(a[router + "fc1.weight"], b[router + "fc1.weight"])
    assert not a[router + "noise.weight"].any()
    with pytest.raises(ConfigError, match="gate_init: zeros without noise"):
        convert(source, split, tmp_path / "c", gate_init="zeros", add_noise=False)
    convert(source, split, tmp_path / "c", gate_init="zeros")
    assert "gate_init: zeros sends every token to the same experts until it is trained" in caplog.text


def test_what_is_there_stays_unless_it_may_go_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    split = split_ffn(source, "random", num_experts=8)
    (tmp_path / "moe").mkdir()
    with pytest.raises(ConfigError, match="moe exists; add --overwrite"):
        convert(source, split, tmp_path / "moe")
    convert(source, split, tmp_path / "moe", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_a_split_of_another_model_is_refused(tmp_path: Path) -> None:
    source, other = dense_folder(tmp_path / "dense"), dense_folder(tmp_path / "other", seed=1)
    split = split_ffn(source, "random", num_experts=8)
    with pytest.raises(InputError, match="made for other weights of the same shape"):
        convert(other, split, tmp_path / "moe")
    with pytest.raises(InputError, match="is for 1 layers of 64 neurons, the model has 2 of 64"):
        convert(source, replace(split, indices=split.indices[:1]), tmp_path / "moe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "is a mistral model, but only dense llama models"),
        ({"mlp_bias": True}, "has biases in its feed-forward layers"),
        ({"hidden_act": "gelu"}, "has activation gelu"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    split = split_ffn(source, "random", num_experts=8)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        convert(source, split, tmp_path / "moe")

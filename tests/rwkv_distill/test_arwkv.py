"""The ARWKV layout: an exact gate, a round trip bit for bit, and a refusal for whatever has no place in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from rwkv_distill.arwkv import from_arwkv, to_arwkv, to_pth
from rwkv_distill.cli import cli
from rwkv_distill.student import StudentModel
from tests.rwkv_distill.small import student, tokens

# as wide as its heads together
WIDE: dict[str, Any] = {"hidden_size": 128}


def fitting(**fields: Any) -> StudentModel:
    return student("llama", shape=WIDE, **fields)


@pytest.mark.parametrize("fields", [{}, {"gate": "sigmoid", "group_norm": True}, {"gate": "none"}], ids=str)
def test_export_and_import_keep_every_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    model = fitting(**fields)
    back = from_arwkv(to_arwkv(model, tmp_path, torch.float32)).eval()
    expected = model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(back(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_what_this_student_lacks_is_written_so_that_it_does_nothing(tmp_path: Path) -> None:
    shape = {**WIDE, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = student("llama", shape=shape, token_shift=False, bonus=False, kv_heads="grouped", head_size=64)
    back = from_arwkv(to_arwkv(model, tmp_path, torch.float32)).eval()
    torch.testing.assert_close(back(tokens(2, 9)).logits, model(tokens(2, 9)).logits, rtol=1e-5, atol=1e-5)


def test_a_residual_gate_becomes_a_plain_one_exactly(tmp_path: Path) -> None:
    model = fitting()
    saved = load_file(to_arwkv(model, tmp_path, torch.float32) / "model.safetensors")
    mixer, h = model.mixers()[1], torch.randn(5, 128)
    g1, g2 = (saved[f"model.layers.1.self_attn.time_mixer.{name}"] for name in ("g1", "g2"))
    assert g1.shape == (128, 128)
    torch.testing.assert_close(torch.sigmoid(h @ g1) @ g2, 1 + torch.sigmoid(h @ mixer.g1) @ mixer.g2, rtol=1e-5, atol=1e-5)


def test_names_and_shapes_are_those_of_the_layout(tmp_path: Path) -> None:
    saved = load_file(to_arwkv(fitting(group_norm=True), tmp_path) / "model.safetensors")
    mine = {name.rpartition("time_mixer.")[2]: list(t.shape) for name, t in saved.items() if "layers.0.self_attn" in name}
    vectors = {name: [1, 1, 128] for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a")}
    ranks = {"w": 64, "a": 64, "v": 32, "g": 128}
    matrices = {f"{n}1": [128, r] for n, r in ranks.items()} | {f"{n}2": [r, 128] for n, r in ranks.items()}
    square = {f"{n}.weight": [128, 128] for n in ("receptance", "key", "value", "output")}
    assert mine == {**vectors, **matrices, **square, "r_k": [2, 64], "ln_x.weight": [128], "ln_x.bias": [128]}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.2.mlp.up_proj.weight"} <= saved.keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["wkv_version"], config["wkv_has_group_norm"]) == (["RwkvHybridForCausalLM"], 7, True)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"layers": [0, 1]}, "some layers keep softmax"),
        ("llama", {"head_size": 32}, "head_size is 32"),
        ("llama", {"rope": True, "head_size": 32}, "rope is on"),
        ("llama", {"wkv_scale": True}, "wkv_scale is on"),
        ("llama", {"value_residual": False}, "value_residual is off"),
        ("llama", {"lora": {"decay": 32}}, "lora ranks"),
        ("qwen2", {"qkv_bias": True}, "qkv_bias is on"),
        ("qwen3", {}, "qk_norm is on"),
    ],
)
def test_students_without_a_place_are_refused(kind: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        to_arwkv(student(kind, shape=WIDE, **fields), tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_reason_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some layers .*; head_size .*; the heads are 128 wide together, not .* 48"):
        to_arwkv(student(layers=[1], head_size=32), tmp_path)


def test_mixers_alone_have_the_names_of_rwkv_lm(tmp_path: Path) -> None:
    model = fitting()
    saved = torch.load(to_pth(model, tmp_path, torch.float32) / "mixers.pth", weights_only=True)
    assert {name.split(".")[2] for name in saved} == {"att"}
    assert torch.equal(saved["blocks.2.att.receptance.weight"], model.mixers()[2].receptance.weight)


def test_import_refuses_other_folders(tmp_path: Path) -> None:
    student().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not RwkvHybridForCausalLM"):
        from_arwkv(tmp_path)
    with pytest.raises(InputError, match="can be read"):
        from_arwkv(tmp_path / "none")


def test_commands_go_there_and_back(tmp_path: Path) -> None:
    model = fitting()
    model.save_pretrained(tmp_path / "student")
    byte_tokenizer().save_pretrained(tmp_path / "student")
    for line in (
        f"export --ckpt {tmp_path}/student --format arwkv --dtype fp32 -o {tmp_path}/arwkv",
        f"import --format arwkv {tmp_path}/arwkv -o {tmp_path}/back",
        f"import --format hf {tmp_path}/back -o {tmp_path}/again",
    ):
        result = CliRunner().invoke(cli, line.split())
        assert result.exit_code == 0, result.output
    first, last = (
        CliRunner().invoke(cli, ["generate", "--model", str(tmp_path / name), "--prompt", "\x01\x02", "--max-new-tokens", "5", "--json"])
        for name in ("student", "again")
    )
    assert json.loads(first.stdout)["tokens"] == json.loads(last.stdout)["tokens"]

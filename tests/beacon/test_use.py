from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from beacon.cache import BeaconCache
from beacon.cli import cli
from beacon.io import load_beacon
from tests.beacon.test_method import BeaconConformance


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    BeaconConformance().run(folder, budget="2 steps", eval_every="never")
    return folder


def beacon(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_text_is_compressed_once_and_asked_many_times(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 3)
    memory = tmp_path / "text.mem"
    said = json.loads(
        beacon("compress", "--model", trained, "--input", tmp_path / "text.txt", "--output", memory, "--json").splitlines()[-1]
    )
    assert said["seen"] == 147
    assert "147 tokens seen" in beacon("inspect", memory)
    asked = ["generate", "--model", trained, "--memory", memory, "--max-new-tokens", 9, "--prompt", "one"]
    assert beacon(*asked) == beacon(*asked)
    answer = json.loads(beacon(*asked, "--json"))
    assert 1 <= answer["tokens"] <= 9
    model = load_beacon(str(trained))
    cache = BeaconCache.load(memory, model)
    out = model.generate(torch.tensor([list(b"one")]), past_key_values=cache, max_new_tokens=9, do_sample=False, pad_token_id=256)
    assert out.shape[1] - 3 == answer["tokens"]
    assert "one" in beacon(*asked, "--stream")


def test_inspect_names_the_settings_of_a_run(trained: Path) -> None:
    said = beacon("inspect", trained)
    assert "beacon_llama, 2 layers, the whole model" in said
    assert "  window: 8\n" in said


def test_an_exported_adapter_and_an_imported_folder_keep_every_bit(trained: Path, tmp_path: Path) -> None:
    full = load_file(trained / "final" / "model.safetensors")
    torch.manual_seed(0)
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(trained / "final")
    stock = type(model).__mro__[3]
    plain = {name: tensor for name, tensor in full.items() if "beacon_" not in name}
    values = {**model.config.to_dict(), "model_type": "llama"}
    values.pop("beacon")
    made = stock(type(model.config).__mro__[1](**values))
    made.load_state_dict(plain, strict=False)
    made.save_pretrained(base)
    beacon("export", "--model", trained, "--format", "adapter", "--base", base, "--output-dir", tmp_path / "adapter")
    beacon("export", "--model", tmp_path / "adapter", "--output-dir", tmp_path / "full")
    again = load_file(tmp_path / "full" / "model.safetensors")
    assert again.keys() == full.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in full.items())
    # flat settings, as other implementations write them
    flat = tmp_path / "flat"
    flat.mkdir()
    torch.save(full, flat / "pytorch_model.bin")
    config = json.loads((trained / "final" / "config.json").read_text())
    settings = config.pop("beacon")
    config |= {f"beacon_{name}": value for name, value in settings.items() if name != "format_version"}
    (flat / "config.json").write_text(json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    beacon("import", "--from", flat, "--output-dir", tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in full.items())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["beacon"] == settings


def test_mistakes_of_a_user_are_named(trained: Path, tmp_path: Path) -> None:
    from lm_core.errors import UserError

    for arguments, words in (
        (["generate", "--model", trained], "prompt: give the text"),
        (["generate", "--model", trained, "--prompt", "a", "--memory", tmp_path / "none.mem"], "is no memory file"),
        (["compress", "--model", trained, "--output", tmp_path / "x.mem"], "input: nothing to read"),
        (["export", "--model", trained, "--output-dir", trained], "is not empty"),
        (["import", "--from", tmp_path, "--output-dir", tmp_path / "new"], "has no config.json"),
    ):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)
        assert isinstance(result.exception, UserError)
        assert words in str(result.exception)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteMoeSharedForCausalLM, MixtralForCausalLM

from lm_core.config import build
from lm_core.errors import ConfigError, InputError
from lm_core.models import quiet
from moe_cpt import export as module
from moe_cpt.convert import convert
from moe_cpt.export import export, scaled
from moe_cpt.inspection import load_mixture
from moe_cpt.options.conversion import ExportConfig
from moe_cpt.split import Split, require_valid, split_ffn
from moe_cpt.tensors import ModelTensors
from tests.moe_cpt.small import dense_folder, mixture_folder, tokens


def write(source: Path, target: Path, format: str, **options: Any) -> dict[str, Any]:
    return export(build(ExportConfig, {"model": str(source), "save_path": target, "format": format, **options}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.train(False)(tokens()).logits
    return found


def with_shared(tmp_path: Path) -> Path:
    """Six routed and two shared experts of nine neurons each, to which seven are added to align them."""
    source = dense_folder(tmp_path / "dense", intermediate_size=72)
    base = split_ffn(source, "random", num_experts=8)
    split = Split(
        "random",
        [indices[:6] for indices in base.indices],
        base.intermediate_size,
        base.model_hash,
        base.seed,
        {},
        [indices[6:].flatten() for indices in base.indices],
    )
    require_valid(split, "split")
    convert(source, split, tmp_path / "moe", num_selects=2, gate_network="linear", gate_init="centroid", score_scale_factor=3.0)
    return tmp_path / "moe"


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison without a process of its own, for what is not about loading."""

    def compare(model: Any, folder: Path) -> float:
        with quiet():
            found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        return float((logits(found) - logits(model)).abs().max() / logits(model).abs().max())

    monkeypatch.setattr(module, "compare", compare)


@pytest.mark.parametrize("scale", [4.0, 3.7], ids=["exact", "rounded"])
@pytest.mark.usefixtures("same_process")
def test_stock_mixtral_gives_equal_logits(scale: float, tmp_path: Path) -> None:
    source = mixture_folder(tmp_path, num_selects=2, gate_network="linear", gate_init="centroid", score_scale_factor=scale)
    found = write(source, tmp_path / "out", "mixtral")
    with quiet():
        stock = MixtralForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    torch.testing.assert_close(logits(stock), logits(load_mixture(str(source))), rtol=0, atol=1e-5)
    assert (found["rounding"] == 0.0) == (scale == 4.0)
    assert found["rounding"] < 1e-7
    assert stock.config.intermediate_size == 8
    assert stock.config.sliding_window is None


@pytest.mark.usefixtures("same_process")
def test_stock_granite_gives_equal_logits_with_shared_experts(tmp_path: Path) -> None:
    source = with_shared(tmp_path)
    assert load_mixture(str(source)).config.stored_size == 16
    write(source, tmp_path / "out", "granitemoeshared")
    with quiet():
        stock = GraniteMoeSharedForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock), logits(load_mixture(str(source))), rtol=0, atol=1e-5)
    assert (stock.config.intermediate_size, stock.config.shared_intermediate_size) == (16, 32)


@pytest.mark.slow
@pytest.mark.parametrize("keep_noise", [False, True])
def test_an_exported_folder_brings_its_own_code(keep_noise: bool, tmp_path: Path) -> None:
    source = mixture_folder(tmp_path, num_selects=2, gate_network="mlp")
    found = write(source, tmp_path / "out", "llama_moe", keep_noise=keep_noise)
    assert found["difference"] < 1e-5
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any("noise" in name for name in stored) == keep_noise
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]["AutoConfig"] == "configuration_llama_moe.LlamaMoEConfig"
    for name in ("configuration_llama_moe.py", "modeling_llama_moe.py"):
        text = (tmp_path / "out" / name).read_text()
        assert "import moe_cpt" not in text
        assert "lm_core" not in text


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("same_process")
def test_the_dense_export_of_untrained_weights_is_the_original_bit_for_bit(shared: bool, tmp_path: Path) -> None:
    source = with_shared(tmp_path) if shared else mixture_folder(tmp_path)
    write(source, tmp_path / "out", "llama")
    old, new = ModelTensors(tmp_path / "dense"), ModelTensors(tmp_path / "out")
    assert set(old) == set(new)
    for name in old:
        assert torch.equal(old[name], new[name]), name


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("mixtral", {}, "mixtral cannot hold this mixture, since its router is an mlp; use --format llama_moe"),
        ("granitemoeshared", {}, "granitemoeshared cannot hold this mixture, since its router is an mlp"),
        ("granitemoeshared", {"gate_network": "linear"}, "this mixture has none; use --format mixtral"),
        ("mixtral", {"gate_network": "linear", "use_softmax": False}, "its scores are not a softmax"),
    ],
)
def test_formats_that_do_not_fit_are_refused(format: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        write(mixture_folder(tmp_path, **options), tmp_path / "out", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_mixtral_has_no_shared_experts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixtral has no shared experts; use --format granitemoeshared"):
        write(with_shared(tmp_path), tmp_path / "out", "mixtral")


def test_without_the_split_nobody_knows_the_places_of_neurons(tmp_path: Path) -> None:
    source = mixture_folder(tmp_path)
    (source / "split.safetensors").unlink()
    with pytest.raises(InputError, match="holds no split"):
        write(source, tmp_path / "out", "llama")


def test_noise_belongs_to_our_own_format() -> None:
    with pytest.raises(ConfigError, match="keep_noise: mixtral has no place for noise"):
        build(ExportConfig, {"model": "x", "save_path": "y", "format": "mixtral", "keep_noise": True})


def test_powers_of_two_are_folded_exactly() -> None:
    weight = torch.randn(50, 50).bfloat16()
    assert torch.equal(scaled(weight, 4.0).double(), 4 * weight.double())

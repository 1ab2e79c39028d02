from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lm_core.models import checkpoint_activations, quiet
from moe_cpt.convert import convert
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.model import LlamaMoEForCausalLM
from moe_cpt.split import split_ffn
from tests.moe_cpt.small import config, dense_folder, dense_model, mixture_folder, tokens


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaMoEForCausalLM:
    with quiet():
        model: LlamaMoEForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


@pytest.mark.parametrize("num_experts", [4, 5, 8], ids=["aligned", "padded", "eight"])
def test_all_experts_with_a_zero_router_are_the_dense_model(num_experts: int, tmp_path: Path) -> None:
    width = {"intermediate_size": 60} if num_experts == 5 else {}
    source = dense_folder(tmp_path / "dense", **width)
    split = split_ffn(source, "random", num_experts=num_experts, seed=3)
    convert(
        source, split, tmp_path / "moe", num_selects=num_experts, score_scale_factor=num_experts, gate_network="linear", gate_init="zeros"
    )
    dense, mixture = dense_model(**width).double(), load(tmp_path / "moe", torch.float64)
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for old, new in zip(dense.model.layers, mixture.blocks()):
        assert_close(new(x)[0], old.mlp(x), rtol=0, atol=1e-12)
    ids = tokens()
    assert_close(mixture(ids).logits, dense(ids).logits, rtol=0, atol=1e-6)


def test_a_saved_mixture_loads_to_equal_logits_and_generates_with_a_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaMoEForCausalLM(config()).eval()
    with quiet():
        model.save_pretrained(tmp_path)
    again, ids = load(tmp_path), tokens()
    assert torch.equal(again(ids).logits, model(ids).logits)
    made = again.generate(ids[:1, :5], attention_mask=torch.ones(1, 5), max_new_tokens=6, do_sample=False, pad_token_id=0)
    for at in range(5, made.shape[1]):
        assert made[0, at] == model(made[:, :at]).logits[0, -1].argmax()


def test_shared_experts_see_every_token() -> None:
    torch.manual_seed(0)
    model = LlamaMoEForCausalLM(config(num_experts=6, num_shared_experts=2)).double()
    block, x = model.blocks()[0].eval(), torch.randn(1, 5, 32, dtype=torch.float64)
    with_shared, _ = block(x)
    torch.nn.init.zeros_(block.shared_experts.down_proj.weight)
    assert (with_shared - block(x)[0]).abs().min() > 0


def test_loss_is_cross_entropy_plus_balance() -> None:
    torch.manual_seed(0)
    model, ids = LlamaMoEForCausalLM(config()).train(), tokens()
    out = model(ids, labels=ids, index=torch.tensor([5, 6, 7]))
    assert out.loss is not None
    assert_close(out.loss, out.ce_loss + out.balance_loss)
    assert out.gate_load.shape == out.gate_importance.shape == (2, 8)
    assert_close(out.gate_importance.sum(1), torch.full((2,), float(ids.numel())))
    # the weight moves the balance loss alone
    model.set_balance_loss_weight(1.0)
    again = model(ids, labels=ids, index=torch.tensor([5, 6, 7]))
    assert_close(again.ce_loss, out.ce_loss)
    assert_close(again.balance_loss, 100 * out.balance_loss)


def test_training_noise_follows_the_sample_not_its_place_in_the_batch() -> None:
    torch.manual_seed(0)
    model, ids = LlamaMoEForCausalLM(config()).train(), tokens(rows=2)
    together = model(ids, index=torch.tensor([11, 12])).logits
    alone = model(ids[1:], index=torch.tensor([12])).logits
    assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)
    assert (model(ids[1:], index=torch.tensor([13])).logits - alone).abs().max() > 1e-3


def test_padding_rows_do_not_count() -> None:
    torch.manual_seed(0)
    model, ids = LlamaMoEForCausalLM(config()).train(), tokens(rows=2)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    out = model(ids, attention_mask=mask)
    assert_close(out.gate_importance.sum(1), torch.full((2,), float(mask.sum())))


def test_activation_checkpointing_changes_no_gradient() -> None:
    ids, gradients = tokens(), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = LlamaMoEForCausalLM(config()).train()
        if recompute:
            checkpoint_activations(model)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name]), name


def test_every_tensor_gets_a_gradient_even_if_no_token_comes() -> None:
    torch.manual_seed(0)
    model = LlamaMoEForCausalLM(config(num_selects=1)).train()
    model(tokens(1, 3), labels=tokens(1, 3)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_setters_keep_the_config_consistent(tmp_path: Path) -> None:
    model = load(mixture_folder(tmp_path))
    model.set_num_selects(1)
    model.set_score_scale_factor(2.5, layer=1)
    with quiet():
        model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.num_selects == 1
    assert again.config.score_scale_factor == [2.0, 2.5]
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    model.reset_router(std=0.0)
    assert not model.blocks()[0].router.fc1.weight.any()
    with pytest.raises(ValueError, match="num_selects: 9 of 8"):
        model.set_num_selects(9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_selects": 9}, "num_selects: 9 of 8 experts; use 1 to 8"),
        ({"num_experts": 7}, "num_experts: 7 experts do not divide intermediate_size 64"),
        ({"gate_network": "cubic"}, "gate_network: 'cubic' is not known"),
        ({"score_scale_factor": [1.0]}, "score_scale_factor: 1 values for 2 layers"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_config_survives_json() -> None:
    made = config(score_scale_factor=[1.0, 2.0], num_shared_experts=0)
    assert LlamaMoEConfig(**made.to_dict()).to_dict() == made.to_dict()


def test_noise_can_be_turned_off_and_on_where_there_are_weights_for_it() -> None:
    model, ids = LlamaMoEForCausalLM(config()).train(), tokens(1)
    noisy = model(ids).logits
    model.set_gate_noise(False)
    quiet_logits = model(ids).logits
    assert torch.equal(quiet_logits, model.train(False)(ids).logits)
    assert not torch.equal(quiet_logits, noisy)
    with pytest.raises(ValueError, match="no noise weights"):
        LlamaMoEForCausalLM(config(gate_add_noise=False)).set_gate_noise(True)

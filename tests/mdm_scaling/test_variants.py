"""Networks with LayerNorm, without a gate, with learned positions, each beside the network of transformers that has the same parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.mdm_scaling.small import SHAPE, VOCABULARY, class_elsewhere, network
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from lm_core.config import build
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError
from mdm_scaling import planner
from mdm_scaling.config import PretrainConfig, settled
from mdm_scaling.export import bring, export
from mdm_scaling.model import Objective, Scorer, load_network, objective_of, shape_of_folder
from mdm_scaling.options import ExportConfig, ImportConfig
from mdm_scaling.sampling import autoregressive
from mdm_scaling.sizes import Shape
from mdm_scaling.train import pretrain

POSITIONS = 64
VARIANTS = {
    "layernorm": replace(SHAPE, layernorm=True),
    "no gate": replace(SHAPE, swiglu=False),
    "learned positions": replace(SHAPE, positions=POSITIONS),
    "layernorm, no gate": replace(SHAPE, layernorm=True, swiglu=False),
    "gpt2": replace(SHAPE, layernorm=True, swiglu=False, positions=POSITIONS, bias=True),
}
each_variant = pytest.mark.parametrize("sizes", VARIANTS.values(), ids=list(VARIANTS))
each_objective = pytest.mark.parametrize("objective", ["ar", "mdm"])
EVERYTHING = {"normalization": "layernorm", "swiglu": False, "use_rotary_position_embeddings": False}


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with norms and biases that are neither 1 nor 0."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.3 * noise)
    return model


def _common(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads, "max_position_embeddings": POSITIONS, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _stablelm(model: PreTrainedModel) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    stock = StableLmForCausalLM(StableLmConfig(**{**_common(model), "layer_norm_eps": 1e-5, "rope_parameters": rope}))
    stock.load_state_dict(model.state_dict())
    return stock


def _arcee(model: PreTrainedModel) -> Any:
    stock = ArceeForCausalLM(ArceeConfig(**_common(model), hidden_act="gelu", rms_norm_eps=1e-5))
    stock.load_state_dict(model.state_dict())
    return stock


def _starcoder2(model: PreTrainedModel) -> Any:
    stock = Starcoder2ForCausalLM(Starcoder2Config(**_common(model), hidden_act="gelu", norm_epsilon=1e-5, use_bias=False))
    renamed = {name.replace("up_proj", "c_fc").replace("down_proj", "c_proj"): tensor for name, tensor in model.state_dict().items()}
    stock.load_state_dict(renamed)
    return stock


def _gpt2(model: PreTrainedModel) -> Any:
    config, given = model.config, model.state_dict()
    stock = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=POSITIONS, n_embd=config.hidden_size, n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads, n_inner=config.intermediate_size, activation_function="gelu", layer_norm_epsilon=1e-5,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    names = {
        "transformer.wte.weight": given["model.embed_tokens.weight"],
        "transformer.wpe.weight": given["model.embed_positions.weight"],
        "lm_head.weight": given["lm_head.weight"],
    }
    for part in ("weight", "bias"):
        names[f"transformer.ln_f.{part}"] = given[f"model.norm.{part}"]
        for layer in range(config.num_hidden_layers):
            own, theirs = f"model.layers.{layer}", f"transformer.h.{layer}"
            three = [given[f"{own}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            found = {
                "ln_1": given[f"{own}.input_layernorm.{part}"], "ln_2": given[f"{own}.post_attention_layernorm.{part}"],
                "attn.c_attn": torch.cat(three), "attn.c_proj": given[f"{own}.self_attn.o_proj.{part}"],
                "mlp.c_fc": given[f"{own}.mlp.up_proj.{part}"], "mlp.c_proj": given[f"{own}.mlp.down_proj.{part}"],
            }  # fmt: skip
            # its linear layers are written the other way round
            names |= {f"{theirs}.{name}.{part}": tensor.T if tensor.ndim == 2 else tensor for name, tensor in found.items()}
    stock.load_state_dict(names)
    return stock


class _Unturned(torch.nn.Module):
    """A stock Llama that gets the sum of tokens and positions, all of them at position 0."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.llama = LlamaForCausalLM(LlamaConfig(**_common(model), rms_norm_eps=1e-5))
        given = dict(model.state_dict())
        self.table = given.pop("model.embed_positions.weight")
        self.llama.load_state_dict(given)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        embedded = self.llama.model.embed_tokens(input_ids) + self.table[: input_ids.shape[1]]
        return self.llama(inputs_embeds=embedded, position_ids=torch.zeros_like(input_ids), attention_mask=attention_mask)


ORACLES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "layernorm": _stablelm,
    "no gate": _arcee,
    "learned positions": _Unturned,
    "layernorm, no gate": _starcoder2,
    "gpt2": _gpt2,
}


@each_objective
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients_are_those_of_a_stock_network(name: str, objective: Objective) -> None:
    model = lively(network(objective, sizes=VARIANTS[name], restrict_logits=False))
    stock, tokens = ORACLES[name](model).train(False), ids()
    blocked = torch.ones(12, 12, dtype=torch.bool).triu(1) if objective == "ar" else torch.zeros(12, 12, dtype=torch.bool)
    mask = torch.zeros(3, 1, 12, 12).masked_fill(blocked, torch.finfo(torch.float32).min)
    logits = stock(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=1e-5, atol=1e-5)
    labels = tokens.roll(1, 1).flatten()
    loss = Scorer(model)(tokens, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    (embedding,) = [parameter for key, parameter in stock.named_parameters() if key.endswith(("embed_tokens.weight", "wte.weight"))]
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, embedding.grad, rtol=1e-3, atol=1e-4)


@each_objective
@each_variant
def test_a_variant_reads_back_bit_for_bit_and_says_what_it_is(sizes: Shape, objective: Objective, tmp_path: Path) -> None:
    model, tokens = lively(network(objective, sizes=sizes)), ids()
    model.save_pretrained(tmp_path)
    read = load_network(str(tmp_path))
    assert objective_of(read) == objective
    assert torch.equal(read(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert replace(shape_of_folder(tmp_path), vocabulary=sizes.vocabulary) == sizes


@each_variant
def test_exact_counts_are_those_of_the_network(sizes: Shape) -> None:
    model = network("ar", sizes=sizes)
    assert sizes.exact(VOCABULARY, divisible_by=8) == sum(parameter.numel() for parameter in model.parameters())
    untied = network("ar", sizes=sizes, tied=False)
    assert sizes.exact(VOCABULARY, tied=False, divisible_by=8) == sum(parameter.numel() for parameter in untied.parameters())


def test_the_nominal_count_and_the_plan_of_a_network_without_a_gate_have_two_matrices(tmp_path: Path) -> None:
    sizes = VARIANTS["gpt2"]
    h, L, g = sizes.hidden, sizes.layers, sizes.ffn
    assert sizes.nominal == 4 * L * h * h + 2 * L * h * g + 6 * L * h + 50257 * h
    network("ar", sizes=sizes).save_pretrained(tmp_path)
    assert planner.count_of(str(tmp_path)) == sizes.nominal
    wide = options(swiglu=False).shape
    assert wide is not None
    assert wide.ffn == 4 * wide.hidden


@each_variant
def test_a_cache_of_keys_changes_nothing(sizes: Shape) -> None:
    model, prompt = network("ar", sizes=sizes), torch.tensor([[1, 2, 3]])
    fast, slow = (autoregressive(model, prompt, 10, index=torch.arange(1), cache=cache) for cache in (True, False))
    assert fast[0] == slow[0]


def test_dropout_falls_on_the_sum_of_token_and_position() -> None:
    scorer = Scorer(network("ar", sizes=VARIANTS["gpt2"]), hidden_dropout=0.25).train()
    decoder: Any = scorer.model.model
    tokens = torch.arange(POSITIONS)[None] % VOCABULARY
    embedded = decoder.embed_tokens(tokens)
    assert torch.equal(embedded, decoder.embed_tokens.weight[tokens])
    dropped = decoder.embed_positions(embedded, torch.arange(POSITIONS)[None])
    assert 0.7 < float((dropped != 0).float().mean()) < 0.8


def options(**changes: Any) -> PretrainConfig:
    given = {
        "objective": "mdm", "model": "tiny", "tokenizer": "bytes", "data": ["synthetic:markov"], "max_length": 32, "lr": 5e-3, "num_workers": 0,
        "micro_batch_size": 4, "global_batch_size": 4, "train_samples": 80, "precision": "fp32", "tensorboard": False, "eval_every": "10",
        "eval_iters": 2, "save_every": "10", "warmup": 0.1,
    }  # fmt: skip
    return settled(build(PretrainConfig, {**given, **changes}, given=[changes]))


@each_objective
def test_a_network_of_other_parts_trains_resumes_and_starts_another(objective: Objective, tmp_path: Path) -> None:
    shared = {**EVERYTHING, "objective": objective, "output_dir": tmp_path / "run"}
    result = pretrain(options(**shared))
    curve = [
        json.loads(line)["eval/markov/loss"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        if "eval/markov/loss" in line
    ]
    assert curve[-1] < curve[0]
    final = load_network(str(tmp_path / "run"))
    import shutil

    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-20")
    again = pretrain(options(**shared, resume="auto"))
    assert again["scaling"]["final_loss"] == result["scaling"]["final_loss"]
    assert all(torch.equal(a, b) for a, b in zip(final.state_dict().values(), load_network(str(tmp_path / "run")).state_dict().values()))
    # the same weights under the other objective
    other = {"ar": "mdm", "mdm": "ar"}[objective]
    bring(ImportConfig(objective=other, out=tmp_path / "other"), str(tmp_path / "run"))  # type: ignore[arg-type]
    read = load_network(str(tmp_path / "other"))
    assert objective_of(read) == other
    assert torch.equal(read.model.embed_positions.weight, final.model.embed_positions.weight)


@pytest.mark.slow
def test_an_exported_variant_loads_without_this_package(tmp_path: Path) -> None:
    lively(network("mdm", vocabulary=259, sizes=VARIANTS["gpt2"])).save_pretrained(tmp_path / "a")
    byte_tokenizer().save_pretrained(tmp_path / "a")
    export(ExportConfig(checkpoint=str(tmp_path / "a"), out=tmp_path / "b"))
    assert class_elsewhere(tmp_path / "b", tmp_path) == "VariantForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "smollm2-135m", "normalization": "layernorm"}, "normalization: smollm2-135m brings its own; drop --normalization"),
        ({"model": "smollm2-135m", "swiglu": False}, "swiglu: smollm2-135m brings its own"),
        ({"model": "smollm2-135m", "use_rotary_position_embeddings": False}, "use_rotary_position_embeddings: smollm2-135m brings its own"),
        ({"model": "smollm2-135m", "norm_eps": 1e-6}, "norm_eps: smollm2-135m brings its own"),
        ({"use_rotary_position_embeddings": False, "rotary_theta": 5000.0}, "rotary_theta: there are no rotary positions"),
        (
            {"objective": "ar", "use_rotary_position_embeddings": False, "num_order_list": 2},
            "num_order_list: reaches position 32, the 32 learned ones end before it; add --max-position-embeddings 33",
        ),
        ({"objective": "ar", "swiglu": False, "order_target_position": "embedding"}, "order_target_position: is a part of LLaMA alone"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**changes)

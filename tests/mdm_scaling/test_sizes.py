from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lm_core.errors import ConfigError
from mdm_scaling.sizes import ALL, SIZES, named, padded, swiglu_width

ANCHORS = {"117M": (123_587_328, 123_587_328), "217M": (217_503_104, 217_481_600), "425M": (416_887_040, None), "724M": (700_251_648, None)}


def test_there_are_54_sizes_with_the_published_counts() -> None:
    assert len(SIZES) == 54
    for name, (nominal, exact) in ANCHORS.items():
        assert SIZES[name].nominal == nominal
        assert exact is None or SIZES[name].exact() == exact
    assert SIZES["35M"].exact() == 34_240_192


def test_six_sizes_have_attention_of_another_width_than_the_model() -> None:
    assert sum(shape.heads * shape.head_size != shape.hidden for shape in SIZES.values()) == 6


@pytest.mark.parametrize("name", ALL)
def test_exact_counts_are_those_of_transformers(name: str) -> None:
    shape = ALL[name]
    # LlamaConfig refuses a width that is no multiple of the heads; Mistral has the same tensors
    config, network = (LlamaConfig, LlamaForCausalLM) if shape.hidden % shape.heads == 0 else (MistralConfig, MistralForCausalLM)
    with torch.device("meta"):
        model = network(
            config(
                vocab_size=padded(shape.vocabulary),
                hidden_size=shape.hidden,
                intermediate_size=shape.ffn,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.key_value_heads,
                head_dim=shape.head_size,
                tie_word_embeddings=True,
            )
        )
    assert shape.exact() == sum(parameter.numel() for parameter in model.parameters())


def test_nominal_count_is_its_formula() -> None:
    for shape in SIZES.values():
        h, L, g = shape.hidden, shape.layers, swiglu_width(shape.hidden)
        assert shape.nominal == 4 * L * h * h + 3 * L * h * g + 6 * L * h + 50257 * h


def test_an_untied_head_counts_once_more() -> None:
    shape = SIZES["117M"]
    assert shape.exact(tied=False) - shape.exact() == padded(50257) * 768


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 117M"):
        named("117")

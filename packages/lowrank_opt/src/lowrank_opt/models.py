"""The model sizes that have a name: arguments of a transformers config, with its `model_type`. Imports no torch.

`PRESETS` start from random weights. `HUB_MODELS` have trained weights, which `HUB_IDS` names on the Hugging Face hub;
their arguments serve estimates and random weights. `RANKS` are the ranks that the published recipes use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _llama(hidden: int, ffn: int, heads: int, layers: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        # special ids of the T5 tokenizer
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _gpt2(hidden: int, ffn: int, heads: int, layers: int, vocabulary: int, eos: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_inner": ffn,
        "n_head": heads,
        "n_layer": layers,
        "vocab_size": vocabulary,
        "n_positions": 1024,
        # classification reads the last token that is not padding, so there must be a padding id
        "pad_token_id": eos,
        "bos_token_id": eos,
        "eos_token_id": eos,
    }


def _roberta(hidden: int, ffn: int, heads: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "roberta",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        # positions are counted from pad_token_id + 1
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


LLAMA_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llama_60m": _llama(512, 1376, 8, 8),
    "llama_130m": _llama(768, 2048, 12, 12),
    "llama_350m": _llama(1024, 2736, 16, 24),
    "llama_1b": _llama(2048, 5461, 32, 24),
    "llama_3b": _llama(2560, 6848, 32, 32),
    "llama_7b": _llama(4096, 11008, 32, 32),
    "llama_test": _llama(64, 172, 4, 2, vocabulary=512),
}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    **LLAMA_PRESETS,
    "gpt2_test": _gpt2(64, 128, 4, 2, vocabulary=512, eos=511),
    "roberta_test": _roberta(64, 128, 4, 2, vocabulary=512),
}

HUB_MODELS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": _gpt2(768, 3072, 12, 12, vocabulary=50257, eos=50256),
    "roberta": _roberta(768, 3072, 12, 12, vocabulary=50265),
}

HUB_IDS: Mapping[str, str] = {"gpt2": "openai-community/gpt2", "roberta": "FacebookAI/roberta-base"}

RANKS: Mapping[str, int] = {"llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512, "llama_7b": 1024, "smollm2-135m": 128}


def default_tokenizer(model: str) -> str | None:
    """The tokenizer of named models: T5's, whose special ids the LLaMAs have, bytes for those of tests, and its own on the hub."""
    if model not in PRESETS:
        return HUB_IDS.get(model)
    return "bytes" if model.endswith("_test") else "t5-base"


def weights_of(model: str, model_path: str | None) -> str:
    """Where the trained weights of a model lie: the folder that was named, the id on the hub of a model that has one, or the name."""
    return model_path or HUB_IDS.get(model, model)

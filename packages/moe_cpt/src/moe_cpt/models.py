"""Names of models that come with the package: random weights, for tests and first steps. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "llama_test": {
        "model_type": "llama",
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "tie_word_embeddings": True,
    }
}


# layers of a run under --debug-mode
DEBUG_LAYERS = 2


def first_layers(stored: Mapping[str, Any], count: int = DEBUG_LAYERS) -> dict[str, Any]:
    """The fields of a LLaMA or LlamaMoE config that change when only its first layers stay.

    >>> first_layers({"num_hidden_layers": 30, "moe_layers": {"skip_first": 1, "skip_last": 0}, "score_scale_factor": 4.0})
    {'num_hidden_layers': 2, 'moe_layers': [1]}
    """
    layers = min(count, stored["num_hidden_layers"])
    cut: dict[str, Any] = {"num_hidden_layers": layers}
    for name in ("size_experts", "score_scale_factor"):
        if isinstance(stored.get(name), list):
            cut[name] = stored[name][:layers]
    if stored.get("moe_layers", "all") != "all":
        # brings transformers along
        from moe_cpt.hf.configuration_llama_moe import converted_layers

        cut["moe_layers"] = [layer for layer in converted_layers(stored["moe_layers"], stored["num_hidden_layers"]) if layer < layers]
    return cut


def source_folder(name: str) -> Path:
    """The folder of a dense model; one that comes with the package is written into the cache first, with a tokenizer of bytes."""
    from lm_core import cache
    from lm_core.data.vocab import byte_tokenizer
    from lm_core.models import load_model, model_folder, quiet

    if name not in PRESETS:
        return model_folder(name)

    def write(folder: Path) -> None:
        with quiet():
            load_model(name, presets=PRESETS).save_pretrained(folder)
        byte_tokenizer().save_pretrained(str(folder))

    return cache.build("models", f"{name}-{cache.key_of(PRESETS[name])}", write)

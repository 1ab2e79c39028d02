"""Model sizes that have a name: arguments of a transformers config, with its `model_type`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # two layers over raw bytes, for tests and first steps
    "llama_tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 259,
        "max_position_embeddings": 1024,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
    },
}

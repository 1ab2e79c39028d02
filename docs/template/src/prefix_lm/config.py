"""Options of `prefix-lm train`: what every command has, and one more."""

from __future__ import annotations

from typing import Literal

from lm_core.config import change, config, opt
from lm_core.options import DataOptions, RunConfig

# Arguments of a transformers configuration; these models start from random weights.
SIZES = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
}


@config
class PrefixLMConfig(RunConfig):
    """A language model that reads the beginning of each document in both directions."""

    prefix: float = opt(0.5, "Longest prefix, as a fraction of the document.", gt=0, lt=1)
    packing: Literal["document"] = change(DataOptions, "packing", default="document")

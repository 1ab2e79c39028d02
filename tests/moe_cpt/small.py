"""Small models and folders that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm_core.data.vocab import byte_tokenizer
from lm_core.models import quiet
from moe_cpt.convert import convert
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.split import split_ffn

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def dense_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    # larger than usual, so that experts and gates matter
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.2, **changes})).eval()


def dense_folder(folder: Path, **changes: Any) -> Path:
    with quiet():
        dense_model(**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def mixture_folder(tmp_path: Path, num_experts: int = 8, **options: Any) -> Path:
    """A converted tiny model, split at random."""
    source = dense_folder(tmp_path / "dense")
    split = split_ffn(source, "random", num_experts=num_experts, seed=3)
    convert(source, split, tmp_path / "moe", **options)
    return tmp_path / "moe"


def config(**changes: Any) -> LlamaMoEConfig:
    return LlamaMoEConfig(**{**SIZES, "num_experts": 8, "num_selects": 2, "score_scale_factor": 4.0, "initializer_range": 0.2, **changes})


def tokens(rows: int = 3, length: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 259, (rows, length), generator=torch.Generator().manual_seed(seed))

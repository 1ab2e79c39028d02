"""Tiny teachers and students."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rwkv_distill.student import StudentModel
from rwkv_distill.student_config import StudentConfig

SHAPE = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
KINDS = ("llama", "mistral", "qwen2", "qwen3")


def teacher(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """A teacher of random weights, of which no bias and no norm is trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "proj" in name:
                parameter.mul_(4)
    return model.eval()


def student(kind: str = "llama", *, busy: bool = True, shape: dict[str, Any] | None = None, **fields: Any) -> StudentModel:
    """The student of `teacher(kind)`; `busy` gives every parameter of its mixers a value that matters."""
    model = StudentModel.from_teacher(teacher(kind, **(shape or {})), StudentConfig(**fields))
    if busy:
        torch.manual_seed(1)
        with torch.no_grad():
            for mixer in model.mixers().values():
                for name, parameter in mixer.named_parameters():
                    if "weight" not in name:
                        parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))

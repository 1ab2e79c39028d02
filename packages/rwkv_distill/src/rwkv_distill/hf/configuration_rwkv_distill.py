"""Configuration of a Transformer whose attention layers were replaced by RWKV time mixing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

# what generic code asks of a configuration, taken from the teacher's
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


class RwkvDistillConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """`teacher`: the configuration of the Transformer whose embeddings, norms, MLPs and head the student has.

    `student`: what replaces attention. Keys: version, layers (indices), head_size, kv_heads, qkv_bias, qk_norm, rope, token_shift,
    group_norm, gate, wkv_scale, value_residual, bonus, ranks (of decay, iclr, value and gate).
    """

    model_type = "rwkv_distill"

    def __init__(self, teacher: Mapping[str, Any] | None = None, student: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.teacher = dict(teacher or {})
        self.student = dict(student or {})
        super().__init__(**{**{name: self.teacher[name] for name in _SHARED if name in self.teacher}, **kwargs})

    def teacher_config(self) -> PretrainedConfig:
        """The teacher's own configuration, from which its embeddings, norms and MLPs are built."""
        values = dict(self.teacher)
        # head and embedding may have been untied since
        values["tie_word_embeddings"] = self.tie_word_embeddings
        config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
        return config

    @property
    def head_dim(self) -> int:
        """Width of one head of the teacher."""
        return int(self.teacher.get("head_dim") or self.teacher["hidden_size"] // self.teacher["num_attention_heads"])

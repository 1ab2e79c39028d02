"""A LLaMA with parts of GPT-2 in the place of its own: LayerNorm, a feed-forward network without a gate, learned positions.

Needs transformers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class VariantConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """LlamaConfig with which parts are LLaMA's, and whether a position sees those behind it (`causal` false: masked diffusion)."""

    model_type = "llama-variant"
    normalization: str = "rmsnorm"
    swiglu: bool = True
    rotary: bool = True
    causal: bool = True


def _validate(self: VariantConfig) -> None:
    """LlamaConfig's checks, but for a width that is a multiple of the number of heads, which the network does not need."""
    for check in getattr(LlamaConfig, "__class_validators__", []):
        if check.__name__ != "validate_architecture":
            check(self)


# after the class, whose own definition would have to be the library's
VariantConfig.validate = _validate  # type: ignore[attr-defined]


class FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, states: torch.Tensor) -> Any:
        return self.down_proj(F.gelu(self.up_proj(states)))


class LearnedPositions(nn.Embedding):
    """Adds a vector of its own for each position."""

    def forward(self, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return embedded + super().forward(positions)


class NoRotation(nn.Module):
    """In the place of rotary angles: cosine 1 and sine 0 for every position."""

    def forward(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones = states.new_ones(*position_ids.shape, 1)
        return ones, torch.zeros_like(ones)


class VariantModel(LlamaModel):  # type: ignore[no-untyped-call]
    """The decoder."""

    config_class = VariantConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.normalization == "layernorm":
            self.norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)  # type: ignore[assignment]
            for layer in self.layers:
                layer.input_layernorm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
                layer.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        if not config.swiglu:
            for layer in self.layers:
                layer.mlp = FeedForward(config)
        if not config.rotary:
            self.rotary_emb = NoRotation()  # type: ignore[assignment]
            self.embed_positions = LearnedPositions(config.max_position_embeddings, config.hidden_size)
        for layer in self.layers:
            attention: Any = layer.self_attn
            attention.is_causal = config.causal
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Any = None, *, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if not self.config.rotary:
            embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            positions, past = kwargs.get("position_ids"), kwargs.get("past_key_values")
            if positions is None:
                seen = 0 if past is None else past.get_seq_length()
                positions = seen + torch.arange(embedded.shape[1], device=embedded.device)[None]
            input_ids, inputs_embeds = None, self.embed_positions(embedded, positions)
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


class VariantForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """LlamaForCausalLM around `VariantModel`; where it is not causal, a masked diffusion model, which reads all positions at once."""

    config_class = VariantConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # the mask of the model follows the config, that of attention without a mask the layer
        config.is_causal = config.causal
        self.model = VariantModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.config.causal:
            kwargs["use_cache"] = False
        return super().forward(*args, **kwargs)

"""A LLaMA that is told the position of the token it has to predict, so that it can predict in any order. Needs transformers alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class OrderedConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """LlamaConfig with another name."""

    model_type = "ordered-llama"


def code(positions_BT: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of positions (B x T x width), of wave lengths from 2 pi to 10000 times as much (Vaswani et al. 2017)."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=positions_BT.device) / width)
    angles = positions_BT[..., None].float() * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width]


class OrderedModel(LlamaModel):  # type: ignore[no-untyped-call]
    """The decoder; `target_positions` (B x T) are those of the tokens to predict, by default each input's next one."""

    config_class = OrderedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.target_position = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Any = None, *, inputs_embeds: Any = None, target_positions: Any = None, **kwargs: Any) -> Any:
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if target_positions is None:
                positions, past = kwargs.get("position_ids"), kwargs.get("past_key_values")
                if positions is None:
                    seen = 0 if past is None else past.get_seq_length()
                    positions = seen + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
                target_positions = positions + 1
            inputs_embeds = inputs_embeds + self.target_position(code(target_positions, self.config.hidden_size).to(inputs_embeds.dtype))
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class OrderedForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """LlamaForCausalLM around `OrderedModel`; from left to right it is used like any other."""

    config_class = OrderedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = OrderedModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

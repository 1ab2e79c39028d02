"""LLaMA with mixtures of experts in place of its feed-forward layers."""

# transformers leaves its constructors without types
# mypy: allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from moe_cpt.experts import moe_ffn, swiglu
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.routing import Gate, Router, Routing, balance_loss, gate, noise

# B rows, T positions, R tokens (B x T), D hidden size, N experts


class Experts(nn.Module):
    """The weights of the routed experts, stacked."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        experts, size, hidden = config.num_experts, config.stored_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))

    def forward(self, x_RD: Tensor, idx_RK: Tensor, score_RK: Tensor, backend: Any) -> Tensor:
        return moe_ffn(x_RD, self.gate_up_proj, self.down_proj, idx_RK, score_RK, backend)


class SharedExperts(nn.Module):
    """The experts that see every token, as one wide feed-forward layer."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        size = config.num_shared_experts * config.stored_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(swiglu(self.gate_up_proj(x))))


class MoEBlock(nn.Module):
    """Router, experts and shared experts of one layer."""

    def __init__(self, config: LlamaMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.router = Router(config)
        self.experts = Experts(config)
        if config.num_shared_experts:
            self.shared_experts = SharedExperts(config)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, index: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Gate]:
        """The layer's output and what its gate said. `mask` (B x T) marks real tokens, `index` (B; default 0 .. B-1) their samples."""
        config = self.config
        rows, length, _ = x_BTD.shape
        x_RD = x_BTD.flatten(0, 1)
        noisy = self.training and config.gate_add_noise
        logits_RN, sigma_RN = self.router(x_RD, noisy)
        noise_RN = None
        if noisy:
            index = torch.arange(rows, device=x_BTD.device) if index is None else index
            noise_RN = noise(seed, self.layer_idx, index, length, config.num_experts)
        said = gate(
            logits_RN,
            config.num_selects,
            sigma_RN=sigma_RN,
            noise_RN=noise_RN,
            mask_R=None if mask is None else mask.flatten(),
            softmax=config.gate_use_softmax,
            multiply=config.multiply_gate_scores,
        )
        scale = config.scale_of(self.layer_idx) if config.multiply_gate_scores else 1.0
        y = self.experts(x_RD, said.experts_RK, scale * said.score_RK, config.experts_backend).view(x_BTD.shape)
        if config.num_shared_experts:
            y = y + config.shared_scale_factor * self.shared_experts(x_BTD)
        return y, said


class LlamaMoEDecoderLayer(GradientCheckpointingLayer):
    """A LLaMA layer that hands `routing` to its mixture and keeps it from attention."""

    def __init__(self, config: LlamaMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = MoEBlock(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, routing: Routing | None = None, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        routing = routing or Routing()
        mixed, said = self.mlp(self.post_attention_layernorm(hidden_states), routing.mask, routing.index, routing.seed)
        # a recomputed layer writes the same again
        routing.gates[self.layer_idx] = said
        return hidden_states + cast(Tensor, mixed)


class LlamaMoEPreTrainedModel(LlamaPreTrainedModel):
    config_class = LlamaMoEConfig
    config: LlamaMoEConfig
    _no_split_modules = ["LlamaMoEDecoderLayer"]
    _can_record_outputs = {"hidden_states": LlamaMoEDecoderLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)
        elif isinstance(module, Router) and self.config.gate_add_noise:
            init.zeros_(module.noise.weight)


class LlamaMoEModel(LlamaMoEPreTrainedModel, LlamaModel):
    def __init__(self, config: LlamaMoEConfig) -> None:
        # not LlamaModel's own: it would allocate the dense layers first
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([LlamaMoEDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


@dataclass
class MoECausalLMOutput(CausalLMOutputWithPast):
    """`loss` is `ce_loss` plus `balance_loss`; `gate_load` and `gate_importance` are L x N sums over real tokens."""

    ce_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    gate_load: Tensor | None = None
    gate_importance: Tensor | None = None


class LlamaMoEForCausalLM(LlamaMoEPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: LlamaMoEConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LlamaMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        **kwargs: Any,
    ) -> MoECausalLMOutput:
        """As LlamaForCausalLM; `index` (B) are the global sample numbers that routing noise is drawn for."""
        seen = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        assert seen is not None
        # with a cache the mask covers earlier tokens, too
        mask = attention_mask[:, -seen.shape[1] :] if attention_mask is not None and attention_mask.ndim == 2 else None
        routing = Routing(index=index, mask=mask)
        kwargs["return_dict"] = True
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, routing=routing, **kwargs)
        importance, load = routing.sums("importance_N"), routing.sums("load_N")
        balance = balance_loss(importance, load, self.config.gate_balance_loss_weight if self.config.gate_use_balance else 0.0)
        return MoECausalLMOutput(
            loss=None if labels is None else out.loss + balance,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            ce_loss=out.loss,
            balance_loss=balance,
            gate_load=load,
            gate_importance=importance,
        )

    def blocks(self) -> list[MoEBlock]:
        """The mixtures in the order of layers."""
        return [layer.mlp for layer in self.model.layers]

    def set_num_selects(self, num_selects: int) -> None:
        """Change K; the config follows, so that a later save is consistent."""
        if not 1 <= num_selects <= self.config.num_experts:
            raise ValueError(f"num_selects: {num_selects} of {self.config.num_experts} experts; use 1 to {self.config.num_experts}")
        self.config.num_selects = num_selects

    def set_score_scale_factor(self, scale: float, layer: int | None = None) -> None:
        """Change s in all layers, or in one."""
        if layer is None:
            self.config.score_scale_factor = scale
            return
        scales = [self.config.scale_of(at) for at in range(self.config.num_hidden_layers)]
        scales[layer] = scale
        self.config.score_scale_factor = scales

    def set_balance_loss_weight(self, weight: float) -> None:
        self.config.gate_balance_loss_weight = weight

    def set_gate_noise(self, on: bool) -> None:
        """Turn routing noise in training on or off; a mixture made without noise weights cannot turn it on."""
        if on and not hasattr(self.blocks()[0].router, "noise"):
            raise ValueError("gate_add_noise: the mixture has no noise weights; convert it with noise")
        self.config.gate_add_noise = on

    def reset_router(self, std: float | None = None) -> None:
        """Draw the router weights anew from torch's generator (zeros for `std` 0); noise weights become zero."""
        std = self.config.initializer_range if std is None else std
        for block in self.blocks():
            for name, parameter in block.router.named_parameters():
                nn.init.normal_(parameter, std=0.0 if name.startswith("noise") else std)


def register() -> None:
    """Make Auto classes know `llama_moe`."""
    AutoConfig.register("llama_moe", LlamaMoEConfig, exist_ok=True)
    AutoModelForCausalLM.register(LlamaMoEConfig, LlamaMoEForCausalLM, exist_ok=True)


register()

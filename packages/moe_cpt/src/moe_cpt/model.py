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
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from lm_core.errors import ConfigError
from moe_cpt.experts import moe_ffn, swiglu
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.routing import Gate, Router, Routing, balance_loss, drop_order, fixed_gate, gate, gumbel, noise, switch_gate, within_capacity

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
        if config.has_router:
            self.router = Router(config)
        self.experts = Experts(config)
        if config.add_weight_norm:
            self.score_scale = nn.Parameter(torch.empty(1))
        if config.num_shared_experts:
            self.shared_experts = SharedExperts(config)

    def scale(self) -> Tensor | float:
        """What the routed experts' output is multiplied with."""
        config = self.config
        if not config.multiply_gate_scores:
            return 1.0
        return self.score_scale if config.add_weight_norm else config.scale_of(self.layer_idx)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, index: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Gate]:
        """The layer's output and what its gate said. `mask` (B x T) marks real tokens, `index` (B; default 0 .. B-1) their samples."""
        config = self.config
        index = torch.arange(len(x_BTD), device=x_BTD.device) if index is None else index
        x_RD, mask_R = x_BTD.flatten(0, 1), None if mask is None else mask.flatten()
        said, dropped_R = self.gate(x_RD, mask_R, index, seed), None
        if config.may_drop:
            order_R = drop_order(seed, self.layer_idx, index, x_BTD.shape[1])
            said, dropped_R = within_capacity(said, order_R, config.capacity_factor, mask_R)
        y_RD = self.experts(x_RD, said.experts_RK, self.scale() * said.score_RK, config.experts_backend)
        if dropped_R is not None and config.dropped_padding == "input":
            y_RD = torch.where(dropped_R[:, None], x_RD.to(y_RD.dtype), y_RD)
        y = y_RD.view(x_BTD.shape)
        if config.num_shared_experts:
            y = y + config.shared_scale_factor * self.shared_experts(x_BTD)
        return y, said

    def gate(self, x_RD: Tensor, mask_R: Tensor | None, index_B: Tensor, seed: int) -> Gate:
        """Which experts see each token, by the config's `gate_type`."""
        config = self.config
        k, multiply, softmax = config.num_selects, config.multiply_gate_scores, config.gate_use_softmax
        address = (seed, self.layer_idx, index_B, len(x_RD) // len(index_B), config.num_experts)
        noisy = self.training and config.gate_add_noise
        logits_RN = sigma_RN = None
        if config.has_router:
            logits_RN, sigma_RN = self.router(x_RD, noisy and config.has_noise_weights)
        if config.gate_type.startswith("Uniform") or config.gate_type.startswith("Random"):
            same = torch.zeros(len(x_RD), config.num_experts, device=x_RD.device)
            keys_RN = same if config.gate_type.startswith("Uniform") else noise(*address)
            return fixed_gate(keys_RN, k, logits_RN, mask_R=mask_R, softmax=softmax, multiply=multiply)
        assert logits_RN is not None
        if config.gate_type == "SwitchBalancedGate":
            return switch_gate(logits_RN, gumbel_RN=gumbel(*address) if noisy else None, mask_R=mask_R, multiply=multiply)
        drawn_RN = noise(*address) if noisy else None
        return gate(logits_RN, k, sigma_RN=sigma_RN, noise_RN=drawn_RN, mask_R=mask_R, softmax=softmax, multiply=multiply)


class LlamaMoEDecoderLayer(GradientCheckpointingLayer):
    """A LLaMA layer that hands `routing` to its mixture, where it has one, and keeps it from attention."""

    def __init__(self, config: LlamaMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = MoEBlock(config, layer_idx) if layer_idx in config.converted else LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, routing: Routing | None = None, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        routing, normed = routing or Routing(), self.post_attention_layernorm(hidden_states)
        if not isinstance(self.mlp, MoEBlock):
            return hidden_states + cast(Tensor, self.mlp(normed))
        mixed, said = self.mlp(normed, routing.mask, routing.index, routing.seed)
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
        elif isinstance(module, Router) and self.config.has_noise_weights:
            init.zeros_(module.noise.weight)
        elif isinstance(module, MoEBlock) and self.config.add_weight_norm:
            init.constant_(module.score_scale, self.config.scale_of(module.layer_idx))


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
    """`loss` is `ce_loss` plus `balance_loss`; `gate_load` and `gate_importance` are L x N sums over real tokens, `num_dropped_tokens` L."""

    ce_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    num_dropped_tokens: Tensor | None = None
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
        balance = balance_loss(importance, load, self.config.balance_weight, self.config.gate_type == "SwitchBalancedGate")
        return MoECausalLMOutput(
            loss=None if labels is None else out.loss + balance,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            ce_loss=out.loss,
            balance_loss=balance,
            num_dropped_tokens=routing.sums("dropped"),
            gate_load=load,
            gate_importance=importance,
        )

    def blocks(self) -> list[MoEBlock]:
        """The mixtures in the order of layers; `layer_idx` says which ones these are."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoEBlock)]

    def set_num_selects(self, num_selects: int) -> None:
        """Change K; the config follows, so that a later save is consistent."""
        if not 1 <= num_selects <= self.config.num_experts:
            raise ValueError(f"num_selects: {num_selects} of {self.config.num_experts} experts; use 1 to {self.config.num_experts}")
        self.config.num_selects = num_selects

    def set_score_scale_factor(self, scale: float, layer: int | None = None) -> None:
        """Change s in all layers, or in one; where s is learned, its present value."""
        if layer is None:
            self.config.score_scale_factor = scale
        else:
            scales = [self.config.scale_of(at) for at in range(self.config.num_hidden_layers)]
            scales[layer] = scale
            self.config.score_scale_factor = scales
        if self.config.add_weight_norm:
            for block in self.blocks():
                nn.init.constant_(block.score_scale, self.config.scale_of(block.layer_idx))

    def fit_router(self) -> None:
        """Drop the router weights that the config's gate does not use. Raises ConfigError when it wants some that are not there."""
        for block in self.blocks():
            if not self.config.has_router:
                block._modules.pop("router", None)
            elif not hasattr(block, "router"):
                raise ConfigError(f"gate_type: the mixture has no router for a {self.config.gate_type}; convert it with that gate")
            elif not self.config.has_noise_weights:
                block.router._modules.pop("noise", None)
            elif not hasattr(block.router, "noise"):
                raise ConfigError(f"gate_type: the mixture has no noise weights for a {self.config.gate_type}; convert it with that gate")

    def set_balance_loss_weight(self, weight: float) -> None:
        self.config.gate_balance_loss_weight = weight

    def set_gate_noise(self, on: bool) -> None:
        """Turn routing noise in training on or off; a mixture made without noise weights cannot turn it on."""
        if on and self.config.has_router and not hasattr(self.blocks()[0].router, "noise"):
            raise ValueError("gate_add_noise: the mixture has no noise weights; convert it with noise")
        self.config.gate_add_noise = on

    def reset_router(self, std: float | None = None) -> None:
        """Draw the router weights anew from torch's generator (zeros for `std` 0); noise weights become zero."""
        std = self.config.initializer_range if std is None else std
        if not self.config.has_router:
            return
        for block in self.blocks():
            for name, parameter in block.router.named_parameters():
                nn.init.normal_(parameter, std=0.0 if name.startswith("noise") else std)


def register() -> None:
    """Make Auto classes know `llama_moe`."""
    AutoConfig.register("llama_moe", LlamaMoEConfig, exist_ok=True)
    AutoModelForCausalLM.register(LlamaMoEConfig, LlamaMoEForCausalLM, exist_ok=True)


register()

"""LLaMA with mixtures of experts, for inference: what an exported folder runs. It imports nothing but torch and transformers."""

from __future__ import annotations

# transformers leaves its constructors without types
# mypy: allow-untyped-calls, allow-untyped-defs, allow-incomplete-defs, disable-error-code="no-any-return"
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_llama_moe import LlamaMoEConfig


@use_experts_implementation
class LlamaMoEExperts(nn.Module):
    """Routed experts, stacked; the layout that transformers' experts backends take."""

    def __init__(self, config: LlamaMoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.stored_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.stored_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            rows = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out


class LlamaMoERouter(nn.Module):
    """Logits over the experts, at least in float32. Noise belongs to training; its weights are only kept."""

    def __init__(self, config: LlamaMoEConfig):
        super().__init__()
        hidden, experts = config.hidden_size, config.num_experts
        self.mlp = config.gate_network == "mlp"
        if self.mlp:
            self.fc1 = nn.Linear(hidden, experts, bias=False)
            self.fc2 = nn.Linear(experts, experts, bias=False)
        else:
            self.proj = nn.Linear(hidden, experts, bias=False)
        if config.has_noise_weights:
            self.noise = nn.Linear(hidden, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if not self.mlp:
                return F.linear(x, self.proj.weight.to(x.dtype))
            return F.linear(torch.tanh(F.linear(x, self.fc1.weight.to(x.dtype))), self.fc2.weight.to(x.dtype))


class LlamaMoESharedExperts(nn.Module):
    """Experts that see every token."""

    def __init__(self, config: LlamaMoEConfig):
        super().__init__()
        size = config.num_shared_experts * config.stored_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class LlamaMoEBlock(nn.Module):
    def __init__(self, config: LlamaMoEConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        if config.has_router:
            self.router = LlamaMoERouter(config)
        self.experts = LlamaMoEExperts(config)
        if config.add_weight_norm:
            self.score_scale = nn.Parameter(torch.empty(1))
        if config.num_shared_experts:
            self.shared_experts = LlamaMoESharedExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        config = self.config
        x = hidden_states.flatten(0, -2)
        logits = self.router(x) if config.has_router else x.new_zeros(len(x), config.num_experts)
        # stable, so that ties go to the lower expert
        top, index = torch.sort(logits, dim=-1, descending=True, stable=True)
        top, index = top[:, : config.num_selects], index[:, : config.num_selects]
        if config.gate_type == "SwitchBalancedGate":
            weights = torch.softmax(logits, dim=-1).gather(1, index)
        elif config.gate_use_softmax:
            weights = torch.softmax(top, dim=-1)
        else:
            weights = top if config.has_router else torch.ones_like(top)
        scale = self.score_scale if config.add_weight_norm else config.scale_of(self.layer_idx)
        weights = scale * weights if config.multiply_gate_scores else torch.ones_like(weights)
        out = self.experts(x, index, weights.to(x.dtype)).view(hidden_states.shape)
        if config.num_shared_experts:
            out = out + config.shared_scale_factor * self.shared_experts(hidden_states)
        return out


class LlamaMoEDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LlamaMoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = LlamaMoEBlock(config, layer_idx) if layer_idx in config.converted else LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlamaMoEPreTrainedModel(LlamaPreTrainedModel):
    config_class = LlamaMoEConfig
    config: LlamaMoEConfig
    _no_split_modules = ["LlamaMoEDecoderLayer"]
    _can_record_outputs = {"hidden_states": LlamaMoEDecoderLayer, "attentions": LlamaAttention}


class LlamaMoEModel(LlamaMoEPreTrainedModel, LlamaModel):
    def __init__(self, config: LlamaMoEConfig):
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


class LlamaMoEForCausalLM(LlamaMoEPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: LlamaMoEConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LlamaMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["LlamaMoEForCausalLM", "LlamaMoEModel"]

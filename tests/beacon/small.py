"""Tiny models, and a second writing of the forward pass: one dense masked attention straight from a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from beacon.attach import attach_beacon
from beacon.config import BeaconConfig
from beacon.plan import Plan

# what architectures have that others have not
MORE: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True}, "qwen3": {"head_dim": 8}, "phi3": {"pad_token_id": 0}}


def stock(dtype: torch.dtype = torch.float64, kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    values = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 3, "bos_token_id": 2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**values, **MORE[kind], **changes})).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def beacon_model(dtype: torch.dtype = torch.float64, shaken: bool = True, base: dict[str, Any] | None = None, **config: Any) -> Any:
    """A tiny model with beacons whose weights differ from the base's."""
    model = attach_beacon(stock(dtype, **(base or {})), BeaconConfig(**{"window": 8, "stride": 8, "ratio": [2], **config}))
    if shaken:
        torch.manual_seed(1)
        for tensor in model.beacon_state_dict().values():
            tensor += 0.2 * torch.randn_like(tensor)
    return model


def ids(rows: int, columns: int, vocabulary: int = 61, seed: int = 2) -> Tensor:
    return torch.randint(0, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(seed))


def norm(module: Any, x: Tensor) -> Tensor:
    """RMS norm in float64, which transformers computes in float32."""
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def dense(model: Any, row: Tensor, plan: Plan) -> Tensor:
    """Logits of the raw tokens of one row, by one attention over every key copy of the plan. Float64, plain formulas."""
    inner, attn = model.model, model.model.layers[0].self_attn
    is_beacon = torch.tensor([token[0] == "b" for token in plan.tokens])
    hidden = torch.stack(
        [inner.beacon_embed_tokens.weight[0] if token[0] == "b" else inner.embed_tokens.weight[row[token[1]]] for token in plan.tokens]
    )
    exponents = torch.arange(0, attn.head_dim, 2, dtype=torch.float32) / attn.head_dim
    frequencies = (1.0 / model.config.rope_parameters["rope_theta"] ** exponents).double()

    def turn(x: Tensor, position: Tensor) -> Tensor:
        angle = position.double()[:, None, None] * frequencies
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    visible = plan.visible()
    for layer in inner.layers:
        attn = layer.self_attn

        def both(name: str, x: Tensor, attn: Any = attn) -> Tensor:
            plain, own = getattr(attn, name), getattr(attn, f"beacon_{name}", getattr(attn, name))
            return torch.where(is_beacon[:, None], own(x), plain(x))

        normed = norm(layer.input_layernorm, hidden)
        q, k, v = (both(f"{letter}_proj", normed).unflatten(1, (-1, attn.head_dim)) for letter in "qkv")
        q, k, v = turn(q, plan.query_pos), turn(k[plan.key_index], plan.key_pos), v[plan.key_index]
        group = q.shape[1] // k.shape[1]
        heads = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T / attn.head_dim**0.5
            heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, head // group])
        hidden = hidden + both("o_proj", torch.cat(heads, -1))
        normed = norm(layer.post_attention_layernorm, hidden)
        inside = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * both("up_proj", normed, layer.mlp)
        hidden = hidden + both("down_proj", inside, layer.mlp)
    order = [plan.tokens.index(("x", t)) for t in range(len(row))]
    return model.lm_head(norm(inner.norm, hidden[order]))

"""Linear maps of a decoder layer by letter (q, k, v, o; mlp is its up and down), whatever the architecture calls them, and the beacons' own.

phi3 keeps queries, keys and values in one matrix, and gate and up in another; beacons have a matrix each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beacon.config import BeaconConfig
from lm_core.errors import ConfigError

# B rows, N tokens, D hidden size, V vocabulary


class BeaconLinear(nn.Linear):
    """A linear map whose weights may be wider than its inputs: float32 masters beside a backbone of bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


def projected(attn: Any, letters: str, raw_BND: Tensor, beacon_BND: Tensor) -> list[Tensor]:
    """Of `letters` out of q, k and v: raw tokens, then beacons, B x N x (heads d) each, each kind by its own weight."""
    out = _stock(attn, letters, raw_BND)
    if beacon_BND.shape[1]:
        shared = "".join(letter for letter in letters if not hasattr(attn, f"beacon_{letter}_proj"))
        found = dict(zip(shared, _stock(attn, shared, beacon_BND)))
        own = [found[letter] if letter in found else getattr(attn, f"beacon_{letter}_proj")(beacon_BND) for letter in letters]
        out = [torch.cat(pair, dim=1) for pair in zip(out, own)]
    return out


def _stock(attn: Any, letters: str, x_BND: Tensor) -> list[Tensor]:
    joint = getattr(attn, "qkv_proj", None)
    if joint is None or not letters:
        return [getattr(attn, f"{letter}_proj")(x_BND) for letter in letters]
    parts = dict(zip("qkv", joint(x_BND).split(_sizes(attn), dim=-1)))
    return [parts[letter] for letter in letters]


def _sizes(attn: Any) -> list[int]:
    heads = attn.config.num_attention_heads, attn.config.num_key_value_heads, attn.config.num_key_value_heads
    return [number * attn.head_dim for number in heads]


def beacon_mlp(mlp: Any, x_BND: Tensor) -> Tensor:
    """The MLP for beacons: by their own up and down where they have them, and the gate of raw tokens."""
    if not hasattr(mlp, "beacon_up_proj"):
        stock: Tensor = mlp(x_BND)
        return stock
    gate = mlp.gate_proj(x_BND) if hasattr(mlp, "gate_proj") else mlp.gate_up_proj(x_BND).chunk(2, dim=-1)[0]
    act = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    out: Tensor = mlp.beacon_down_proj(act(gate) * mlp.beacon_up_proj(x_BND))
    return out


def add_beacons(model: Any, config: BeaconConfig, copy: bool) -> None:
    """Beacon embedding and projections on a stock model; with `copy` their values are those of the base."""
    inner = model.model
    embedding = inner.embed_tokens.weight
    inner.beacon_embed_tokens = nn.Embedding(1, embedding.shape[1], device=embedding.device, dtype=embedding.dtype)
    if copy:
        with torch.no_grad():
            inner.beacon_embed_tokens.weight.copy_(embedding[first_id(model.config, config.embed_init)][None])
    for layer in inner.layers:
        for place, name, weight, bias in _copied(layer, config.param):
            values = whole(weight)
            own = BeaconLinear(values.shape[1], values.shape[0], bias=bias is not None, device=weight.device, dtype=embedding.dtype)
            if copy:
                with torch.no_grad():
                    own.weight.copy_(values)
                    if bias is not None:
                        own.bias.copy_(bias)
            setattr(place, f"beacon_{name}", own)


def _copied(layer: Any, letters: Sequence[str]) -> Iterator[tuple[nn.Module, str, Tensor, Tensor | None]]:
    """Where each of the beacons' own maps belongs, its name, and weight and bias of the base's."""
    attn, mlp = layer.self_attn, layer.mlp
    for letter in letters:
        if letter == "mlp":
            up = (mlp.up_proj.weight, mlp.up_proj.bias) if hasattr(mlp, "up_proj") else (mlp.gate_up_proj.weight.chunk(2)[1], None)
            yield mlp, "up_proj", *up
            yield mlp, "down_proj", mlp.down_proj.weight, mlp.down_proj.bias
        elif letter != "o" and hasattr(attn, "qkv_proj"):
            yield attn, f"{letter}_proj", dict(zip("qkv", attn.qkv_proj.weight.split(_sizes(attn))))[letter], None
        else:
            base = getattr(attn, f"{letter}_proj")
            yield attn, f"{letter}_proj", base.weight, base.bias


def whole(weight: Tensor) -> Tensor:
    """The values of a weight, also where it is kept in four bits."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, state)
    return values


def without_gradient(layers: int) -> str:
    """A pattern of the beacon weights of the last layer that nothing follows: all but keys and values."""
    return rf"layers\.{layers - 1}\.(self_attn\.beacon_[qo]|mlp\.beacon_(up|down))_proj\."


def is_beacon(name: str) -> bool:
    return ".beacon_" in name or name.startswith("beacon_")


def first_id(config: Any, which: str) -> int:
    """The id of the eos or bos token, the first of a list. Raises ConfigError where the config has none."""
    value = getattr(config, f"{which}_token_id", None)
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if value is None:
        other = "bos" if which == "eos" else "eos"
        raise ConfigError(f"embed_init: {which}, but the model's config names no {which} token; use {other}, or set {which}_token_id")
    return int(value)

"""What a mixture is made of, and how its routers choose."""

from __future__ import annotations

from typing import Any

import torch

from lm_core.errors import ConfigError
from lm_core.models import load_model, load_tokenizer
from moe_cpt.model import LlamaMoEForCausalLM
from moe_cpt.options.checks import InspectConfig
from moe_cpt.plan import parameter_counts
from moe_cpt.routing import Routing
from moe_cpt.split.features import token_rows


def load_mixture(name: str) -> LlamaMoEForCausalLM:
    """The mixture in a folder, for inference. Raises ConfigError for any other model."""
    model = load_model(name)
    if not isinstance(model, LlamaMoEForCausalLM):
        raise ConfigError(f"model: {name} is a {model.config.model_type} model, not a mixture of experts; name a folder of moe-cpt convert")
    model.train(False)
    return model


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print and return parameter counts and, with data, the share of each expert in the selections of its layer."""
    model = load_mixture(config.model)
    made = model.config
    counts = parameter_counts(made.to_dict())
    print(f"{made.num_selects} of {made.num_experts} experts, {made.num_shared_experts} shared; {made.expert_size} neurons each")
    print(f"parameters  dense {counts.dense:,}  total {counts.total:,}  active {counts.active:,}")
    found: dict[str, Any] = {"dense": counts.dense, "total": counts.total, "active": counts.active}
    if not config.data:
        return found
    tokenizer = load_tokenizer(config.model)
    rows = token_rows(config.data, tokenizer, text_column=config.text_column, length=config.max_length, tokens=int(config.max_tokens))
    tables = []
    for row in rows:
        routing = Routing()
        with torch.no_grad():
            model.model(row, routing=routing)
        tables.append(routing.sums("count_N"))
    load = torch.stack(tables).sum(0)
    share = load / load.sum(1, keepdim=True)
    for layer, values in zip(made.converted, share):
        bars = "".join(" .:-=+*#%@"[min(9, int(value * made.num_experts * 3))] for value in values)
        print(
            f"layer {layer:3}  |{bars}|  max/mean {float(values.max() * made.num_experts):.2f}  without a token {int((values == 0).sum())}"
        )
    return found | {"tokens": sum(row.numel() for row in rows), "share": share.tolist()}

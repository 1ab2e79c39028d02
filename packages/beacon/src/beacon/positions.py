"""Other positions than those of a checkpoint: rotary embedding, most positions, and the sliding window of mistral."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_core.errors import ConfigError

if TYPE_CHECKING:
    from beacon.options import TrainConfig


def override_positions(model: Any, options: TrainConfig) -> None:
    """Change the config of `model` as the options say, and its rotary embedding with it. Raises ConfigError where they do not fit."""
    config = model.config
    rope = dict(config.rope_parameters or {})
    known = config.max_position_embeddings
    if options.rope_theta is not None:
        rope["rope_theta"] = options.rope_theta
    if options.rope_method is not None:
        if options.rope_factor is None:
            raise ConfigError(f"rope_factor: missing; --rope-method {options.rope_method} scales positions by a factor, for example 4")
        rope = {"rope_theta": rope["rope_theta"], "rope_type": options.rope_method}
        if options.rope_method in ("yarn", "llama3"):
            rope["original_max_position_embeddings"] = known
        if options.rope_method == "llama3":
            # those of Llama 3.1
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if options.rope_factor is not None:
        if rope.get("rope_type", "default") == "default":
            raise ConfigError(f"rope_factor: {options.rope_factor:g}, but this model scales no positions; add --rope-method")
        rope["factor"] = options.rope_factor
    if options.max_position_embeddings is not None:
        config.max_position_embeddings = options.max_position_embeddings
    if options.mistral_sliding_window is not None:
        if not config.model_type.endswith("mistral"):
            raise ConfigError(f"mistral_sliding_window: {config.model_type} has none; drop it")
        config.sliding_window = options.mistral_sliding_window or None
    if rope != config.rope_parameters or config.max_position_embeddings != known:
        config.rope_parameters = rope
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=config).to(model.model.embed_tokens.weight.device)

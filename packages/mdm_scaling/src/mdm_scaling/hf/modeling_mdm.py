"""A LLaMA whose every position sees every other one: a masked diffusion language model. Needs transformers alone."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM


class MdmConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """LlamaConfig with another name; `mask_token_id` and `real_vocab_size` stand beside the usual entries."""

    model_type = "mdm"


def _validate(self: MdmConfig) -> None:
    """LlamaConfig's checks, but for a width that is a multiple of the number of heads, which the network does not need."""
    for check in getattr(LlamaConfig, "__class_validators__", []):
        if check.__name__ != "validate_architecture":
            check(self)


# after the class, whose own definition would have to be the library's
MdmConfig.validate = _validate  # type: ignore[attr-defined]


class MdmForMaskedLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Logits (B x T x rows) of the original token at every position, given tokens of which some are `mask_token_id`.

    Positions are not shifted. Padding (0 in `attention_mask`) is seen by nobody. There is no cache: a masked model
    reads the whole sequence at once.
    """

    config_class = MdmConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # the mask of the model follows the config, that of attention without a mask the layer
        config.is_causal = False
        for layer in self.model.layers:
            layer.self_attn.is_causal = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["use_cache"] = False
        return super().forward(*args, **kwargs)

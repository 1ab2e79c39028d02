"""One network for both objectives: a LLaMA, causal or not, and the losses of chosen positions without all logits.

B batch, S positions, M chosen rows of the B x S, D width, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kernels_cuda.head import linear_cross_entropy
from lm_core.counter import normal
from lm_core.errors import ConfigError, InputError
from lm_core.models import hf_model, load_model
from mdm_scaling.hf.modeling_mdm import MdmConfig, MdmForMaskedLM
from mdm_scaling.hf.modeling_ordered import OrderedConfig, OrderedForCausalLM
from mdm_scaling.hf.modeling_variant import VariantConfig, VariantForCausalLM
from mdm_scaling.sizes import Shape, padded

for _config, _class in ((MdmConfig, MdmForMaskedLM), (OrderedConfig, OrderedForCausalLM), (VariantConfig, VariantForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _class, exist_ok=True)
    # the modelling code travels with a saved model
    _config.register_for_auto_class()  # type: ignore[no-untyped-call]
    _class.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]

Objective = Literal["ar", "mdm"]
_CLASSES: Mapping[str, tuple[Any, Any]] = {
    "ar": (LlamaConfig, LlamaForCausalLM),
    "mdm": (MdmConfig, MdmForMaskedLM),
    "ordered": (OrderedConfig, OrderedForCausalLM),
    "variant": (VariantConfig, VariantForCausalLM),
}


def objective_of(model: PreTrainedModel) -> Objective:
    """What a model was trained for; a plain Llama is autoregressive."""
    return "mdm" if model.config.model_type == "mdm" or not getattr(model.config, "causal", True) else "ar"


def llama_shaped(model: PreTrainedModel) -> bool:
    """Whether a model is one of the networks of this package."""
    plain = model.config.model_type == "mistral" and model.config.sliding_window is None
    return plain or model.config.model_type in ("llama", "mdm", "ordered-llama", "llama-variant")


def vocabulary_of(model: PreTrainedModel) -> int:
    """Real entries of the vocabulary V; the mask has id V, and further rows of the embedding are padding."""
    return int(getattr(model.config, "real_vocab_size", None) or model.config.vocab_size)


def limit_of(model: PreTrainedModel) -> int:
    """Rows that take part in the softmax: the real vocabulary, or all of them where logits are not restricted."""
    return vocabulary_of(model) if getattr(model.config, "restrict_logits", True) else int(model.config.vocab_size)


def fresh(
    objective: Objective, shape: Shape, vocabulary: int, *, tied: bool, positions: int, theta: float, eps: float, std: float,
    divisible_by: int, restrict_logits: bool, seed: int, ordered: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Random weights N(0, std), output projections N(0, std / sqrt(2 L)), norms 1, biases 0; ordered: told what to predict, by weights of 0."""
    assert not ordered or shape.is_llama
    if shape.heads * shape.head_size % 2 or shape.head_size % 2:
        raise ConfigError(f"kv_channels: {shape.head_size} is odd, and rotary positions come in pairs; use an even number")
    # transformers' Llama wants a width that is a multiple of the heads, which 20M has not; its Mistral is the same network
    stock = "llama" if shape.hidden % shape.heads == 0 else "mistral"
    if shape.bias and objective == "ar" and shape.is_llama and stock == "mistral":
        raise ConfigError(
            f"disable_bias_linear: biases need a hidden size ({shape.hidden}) that is a multiple of the heads ({shape.heads}); choose another preset"
        )
    if ordered and stock == "mistral":
        raise ConfigError(
            f"order_target_position: needs a hidden size ({shape.hidden}) that is a multiple of the heads ({shape.heads}); choose another preset"
        )
    values = {
        "model_type": {"ar": stock, "mdm": "mdm"}[objective] if shape.is_llama else "llama-variant",
        "vocab_size": padded(vocabulary, divisible_by),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.positions or positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": eps,
        "initializer_range": std,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        **({"attention_bias": True, "mlp_bias": True} if shape.bias else {}),
    }
    if not shape.is_llama:
        values |= {"normalization": "layernorm" if shape.layernorm else "rmsnorm", "swiglu": shape.swiglu, "rotary": not shape.positions}
        values["causal"] = objective == "ar"
    elif stock == "mistral" and objective == "ar":
        values["sliding_window"] = None
    model = load_model("preset", presets={"preset": values}, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * shape.layers))
    model = _marked(model, vocabulary, restrict_logits)
    if ordered:
        return warm(objective, model, std=std, divisible_by=divisible_by, restrict_logits=restrict_logits, seed=seed, ordered=True)
    return model


def warm(
    objective: Objective, source: PreTrainedModel, *, std: float, divisible_by: int, restrict_logits: bool, seed: int, ordered: bool = False
) -> PreTrainedModel:
    """The weights of a Llama-shaped model under `objective`, its embedding padded; new rows are N(0, std), the mask's their mean.

    An autoregressive model that is told what to predict stays one.
    """
    if not llama_shaped(source):
        raise ConfigError(f"model: {source.config.model_type} is not Llama-shaped; name a model of type llama or mdm")
    vocabulary = vocabulary_of(source)
    variant = source.config.model_type == "llama-variant"
    if variant and ordered:
        raise ConfigError("order_target_position: the model is no plain Llama, which this needs; name one, or drop the option")
    ordered = ordered or (objective == "ar" and source.config.model_type == "ordered-llama")
    config_class, model_class = _CLASSES["variant" if variant else "ordered" if ordered else objective]
    values = {name: value for name, value in source.config.to_dict().items() if name not in _OWN}
    if variant:
        values["causal"] = objective == "ar"
    rows = max(padded(vocabulary, divisible_by), int(source.config.vocab_size))
    config = config_class(**{**values, "vocab_size": rows})
    config._attn_implementation = source.config._attn_implementation
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    weights = {name: _extended(tensor, rows, vocabulary, std, seed, name) for name, tensor in source.state_dict().items()}
    projection, width = "model.target_position.weight", config.hidden_size
    told = weights.pop(projection, None)
    if ordered:
        weights[projection] = torch.zeros(width, width, device=source.device) if told is None else told
    # buffers that are no part of the state (rotary angles) come from the source, everything else by name
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = source.model.rotary_emb
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return _marked(model.train(), vocabulary, restrict_logits)


# entries of a config that say which class it belongs to
_OWN = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "vocab_size",
    "is_causal",
    "causal",
    "_attn_implementation",
    "dtype",
)


def _extended(tensor: Tensor, rows: int, vocabulary: int, std: float, seed: int, name: str) -> Tensor:
    if not name.endswith(("embed_tokens.weight", "lm_head.weight")) or len(tensor) == rows:
        return tensor
    more = rows - len(tensor)
    if tensor.is_meta:
        return torch.empty(rows, tensor.shape[1], device="meta", dtype=tensor.dtype)
    new = std * normal(seed, "init", list(range(len(tensor), rows)), tensor.shape[1]).to(tensor.dtype)
    assert len(new) == more
    whole = torch.cat([tensor, new])
    if len(tensor) <= vocabulary:
        whole[vocabulary] = tensor[:vocabulary].mean(0)
    return whole


def _marked(model: PreTrainedModel, vocabulary: int, restrict_logits: bool) -> PreTrainedModel:
    """`model` with what a reader of its folder needs to know."""
    model.config.real_vocab_size = vocabulary
    model.config.mask_token_id = vocabulary
    model.config.restrict_logits = restrict_logits
    return model


def checkpoint_folder(name: str) -> str:
    """What stands for a run folder: its `final`; any other name passes through. Raises InputError for a run without one."""
    folder = Path(name).expanduser()
    if (folder / "final" / "config.json").is_file():
        return str(folder / "final")
    if (folder / "checkpoints").is_dir():
        raise InputError(f"checkpoint: the run {name} has not ended, so it has no folder final; let it end, or name another model")
    return name


def load_network(name: str) -> PreTrainedModel:
    """The network of a run folder or of any model argument that is Llama-shaped, ready to evaluate."""
    model = load_model(checkpoint_folder(name))
    if not llama_shaped(model):
        raise InputError(f"checkpoint: {name} is a {model.config.model_type}, not Llama-shaped; name a model of type llama or mdm")
    model.train(False)
    return model


def shape_of_folder(folder: Path) -> Shape:
    """The sizes in a model folder's config.json."""
    values = json.loads((folder / "config.json").read_text())
    heads = int(values["num_attention_heads"])
    learned = not values.get("rotary", True)
    return Shape(
        layers=int(values["num_hidden_layers"]),
        hidden=int(values["hidden_size"]),
        heads=heads,
        head_size=int(values.get("head_dim") or values["hidden_size"] // heads),
        key_value_heads=int(values.get("num_key_value_heads") or heads),
        ffn=int(values["intermediate_size"]),
        layernorm=values.get("normalization") == "layernorm",
        swiglu=bool(values.get("swiglu", True)),
        positions=int(values["max_position_embeddings"]) if learned else 0,
        bias=bool(values.get("mlp_bias", False)),
    )


class _ScoringHead(nn.Linear):
    """An output head that returns losses when it is given targets.

    They are computed inside the head's own forward, because engines that gather a weight only while its module runs
    (ZeRO-3) would show an empty one anywhere else.
    """

    limit: int

    def forward(
        self, input: Tensor, targets_M: Tensor | None = None, weights_M: Tensor | None = None, reduction: Literal["sum", "none"] = "sum"
    ) -> Tensor:
        if targets_M is None:
            return super().forward(input)
        if input.is_meta:
            # shapes are all there is; the sums stand for a loss that keeps no logits
            return input.sum() + self.weight.sum()
        # a mask or a padding row is never predicted
        return linear_cross_entropy(input, self.weight, targets_M, weights=weights_M, reduction=reduction, vocabulary=self.limit)


class Scorer(nn.Module):
    """The cross entropy of chosen positions: hidden states of the others never meet the output head."""

    def __init__(self, model: PreTrainedModel, *, attention_dropout: float = 0.0, hidden_dropout: float = 0.0) -> None:
        super().__init__()
        self.model = model
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.__class__ = _ScoringHead
        head.limit = limit_of(model)
        for layer in cast(Any, model).model.layers:
            layer.self_attn.attention_dropout = attention_dropout
            if hidden_dropout:
                # the branch that is added to the residual stream
                layer.self_attn.register_forward_hook(_Drop(hidden_dropout))
                layer.mlp.register_forward_hook(_Drop(hidden_dropout))
        if hidden_dropout:
            # of what enters the first layer: tokens, or tokens and their places
            decoder = cast(Any, model).model
            getattr(decoder, "embed_positions", decoder.embed_tokens).register_forward_hook(_Drop(hidden_dropout))

    def forward(
        self,
        input_ids_BS: Tensor,
        targets_M: Tensor,
        rows_M: Tensor | None = None,
        weights_M: Tensor | None = None,
        attention_mask: Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
        position_ids: Tensor | None = None,
        target_positions: Tensor | None = None,
    ) -> Tensor:
        """Sum of weights x -log p(target) over the rows (positions counted through the batch; all of them by default), or each one.

        `attention_mask` (B x S, 0 = seen by nobody) is for sequences that end early; one of B x 1 x S x S (bool) says who sees
        whom, and must be given with positions that are out of order, which would be taken for packed documents.
        """
        return self.through(
            lambda entering: self.states(input_ids_BS, attention_mask, position_ids, target_positions, entering),
            lambda states_BSD: self.score(states_BSD, targets_M, rows_M, weights_M, reduction),
            input_ids_BS.shape,
            torch.Size() if reduction == "sum" else targets_M.shape,
        )

    def through(
        self, states: Callable[[Tensor | None], Tensor], score: Callable[[Tensor], Tensor], size: torch.Size, losses: torch.Size
    ) -> Tensor:
        """The decoder and then the head; a pipeline, which replaces this, asks for B x S and for the shape of the losses."""
        return score(states(None))

    def states(
        self,
        input_ids_BS: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        target_positions: Tensor | None = None,
        entering: Tensor | None = None,
    ) -> Tensor:
        """What the decoder makes of tokens (B x S x D); of a pipeline's later stage, of the states `entering` in their place."""
        source = {"input_ids": input_ids_BS} if entering is None else {"inputs_embeds": entering}
        if target_positions is not None:
            source["target_positions"] = target_positions
        inner: Any = hf_model(self.model)
        states = inner.model(**source, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).last_hidden_state
        return cast(Tensor, states)

    def score(
        self,
        states_BSD: Tensor,
        targets_M: Tensor,
        rows_M: Tensor | None = None,
        weights_M: Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """The losses of rows of the decoder's states."""
        states = states_BSD.flatten(0, 1)
        inner: Any = hf_model(self.model)
        return cast(Tensor, inner.lm_head(states if rows_M is None else states[rows_M], targets_M, weights_M, reduction))


class _Drop:
    """A forward hook that drops parts of the first output while its module trains."""

    def __init__(self, chance: float) -> None:
        self.chance = chance

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], self.chance, module.training), *output[1:])
        return F.dropout(output, self.chance, module.training)

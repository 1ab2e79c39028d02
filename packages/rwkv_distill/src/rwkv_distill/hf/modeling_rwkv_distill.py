"""A Transformer whose attention layers were replaced by RWKV time mixing: embeddings, norms, MLPs and head are the teacher's.

B batch, T time, D hidden size, V vocabulary. Every tensor keeps the teacher's name, except `self_attn.time_mixer.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from .base_rwkv_distill import LayerState, sequence_starts
from .configuration_rwkv_distill import RwkvDistillConfig
from .mixers_rwkv_distill import Rwkv6Mixer, Rwkv7Mixer

MIXERS = {"v6": Rwkv6Mixer, "v7": Rwkv7Mixer}


class RwkvState:
    """What the model remembers of a text: per RWKV layer its last input and its matrix, advanced in place; kept softmax layers keep keys.

    `positions` (B) counts the real tokens seen, `seen` all of them, `mask` (B x seen, only with softmax layers) tells them apart.
    """

    def __init__(self, num_layers: int, attention: DynamicCache | None) -> None:
        self.layers: list[LayerState | None] = [None] * num_layers
        self.attention = attention
        self.positions: Tensor | None = None
        self.mask: Tensor | None = None
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, under the name that transformers asks for."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, as beam search asks."""
        self.layers = [None if layer is None else (layer[0][beam_idx], layer[1][beam_idx]) for layer in self.layers]
        self.positions = None if self.positions is None else self.positions[beam_idx]
        self.mask = None if self.mask is None else self.mask[beam_idx]
        if self.attention is not None:
            self.attention.reorder_cache(beam_idx)  # type: ignore[arg-type]

    def bytes(self) -> int:
        """Bytes of the RWKV layers: the same after any number of tokens."""
        return sum(tensor.nbytes for layer in self.layers if layer is not None for tensor in layer)


@dataclass
class StudentOutput(ModelOutput):
    """`logits` (B x T x V); `past_key_values`, also called `state`, where it was asked for."""

    logits: Tensor | None = None
    past_key_values: Any = None

    @property
    def state(self) -> RwkvState | None:
        state: RwkvState | None = self.past_key_values
        return state


@dataclass(frozen=True)
class Context:
    """What every layer needs to know about the rows of a batch."""

    mask: Tensor | None
    segment_ids: Tensor | None
    position_embeddings: tuple[Tensor, Tensor]
    attention_masks: Mapping[str, Tensor | None]
    state: RwkvState | None
    return_state: bool


@dataclass(frozen=True)
class Beside:
    """Training against the teacher's attention: what is done with (layer, its input, the attention's output, context)."""

    attention: nn.Module
    use: Callable[..., Any]
    last: bool


class TimeMixing(nn.Module):
    """Gives the mixer its place among the tensor names."""

    def __init__(self, config: RwkvDistillConfig, index: int) -> None:
        super().__init__()
        self.time_mixer = MIXERS[config.student["version"]](config, index)


class RwkvDistillLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """One decoder layer: a teacher's layer with its attention kept or replaced."""

    dropout = 0.0
    self_attn: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    mlp: Any

    def __init__(self, config: RwkvDistillConfig, index: int, layer: Any) -> None:
        super().__init__()
        self.index = index
        self.recurrent = index in config.student["layers"]
        self.attention_kind = attention_kind(layer.self_attn)
        self.self_attn = TimeMixing(config, index) if self.recurrent else layer.self_attn
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp

    def forward(self, x: Tensor, v_first: Tensor | None, context: Context, beside: Beside | None = None) -> tuple[Tensor, Any]:
        """The stream (B x T x D) behind the layer, and the defining layer's value; with `beside` the teacher's stream, and what `use` gave."""
        if beside is not None:
            return self._beside(x, context, beside)
        h = self.input_layernorm(x)
        y, v_first = self.mix(h, v_first, context) if self.recurrent else (self.attend(h, context), v_first)
        x = x + F.dropout(y, self.dropout, self.training)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, v_first

    def _beside(self, x: Tensor, context: Context, beside: Beside) -> tuple[Tensor, Any]:
        # all in this layer's forward, where engines that share weights out have them whole
        with torch.no_grad():
            u = self.input_layernorm(x)
            target = self.attend(u, context, beside.attention)
        given = beside.use(self, u, target, context) if self.recurrent else None
        if beside.last:
            return x, given
        with torch.no_grad():
            x = x + target
            return x + self.mlp(self.post_attention_layernorm(x)), given

    def mix(self, h: Tensor, v_first: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        """Time mixing of the normalised stream."""
        state = context.state
        before = None if state is None else state.layers[self.index]
        y, v_first, after = self.self_attn.time_mixer(
            h, v_first, before, context.mask, context.segment_ids, context.position_embeddings, context.return_state
        )
        if context.return_state and state is not None:
            state.layers[self.index] = after
        return y, v_first

    def attend(self, h: Tensor, context: Context, attention: nn.Module | None = None) -> Tensor:
        """Softmax attention of the normalised stream: this layer's own, or the teacher's in its place."""
        y: Tensor = (self.self_attn if attention is None else attention)(
            hidden_states=h,
            position_embeddings=context.position_embeddings,
            attention_mask=context.attention_masks[self.attention_kind],
            past_key_values=None if context.state is None else context.state.attention,
        )[0]
        return y


def attention_kind(attention: Any) -> str:
    """Which mask a teacher's attention layer takes."""
    window = getattr(attention, "sliding_window", None) or (
        # Mistral's window is that of the whole model
        getattr(attention.config, "sliding_window", None) if not getattr(attention.config, "layer_types", None) else None
    )
    return "sliding_attention" if window is not None else "full_attention"


class RwkvDistillPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    config_class = RwkvDistillConfig
    config: RwkvDistillConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RwkvDistillLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True


class RwkvDistillModel(RwkvDistillPreTrainedModel):  # type: ignore[no-untyped-call]
    """Embeddings, decoder layers and final norm. `backbone`: the teacher's decoder, whose parts are taken over."""

    embed_tokens: Any
    norm: Any
    rotary_emb: Any

    def __init__(self, config: RwkvDistillConfig, backbone: Any = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = AutoModel.from_config(teacher_config(config))  # type: ignore[no-untyped-call]
        self.attention_config = backbone.config
        self.embed_tokens = backbone.embed_tokens
        layers = [RwkvDistillLayer(config, index, layer) for index, layer in enumerate(backbone.layers)]
        # the cache holds softmax layers alone, so that its first layer has seen what all of them have
        for place, layer in enumerate(layer for layer in layers if not layer.recurrent):
            layer.self_attn.layer_idx = place
        self.layers: Any = nn.ModuleList(layers)
        self.norm = backbone.norm
        self.rotary_emb = backbone.rotary_emb
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.embed_tokens
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: RwkvState | None = None,
        return_state: bool = False,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, RwkvState | None]:
        """Hidden states (B x T x D) behind the final norm, and the state behind the last token if `return_state` or a state is given."""
        x, context = self.begin(
            input_ids, attention_mask, segment_ids, state, return_state, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        v_first: Tensor | None = None
        for layer in self.layers:
            x, v_first = layer(x, v_first, context)
        if context.state is not None:
            self._count(context.state, attention_mask, x)
        return self.norm(x), context.state

    def begin(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: RwkvState | None = None,
        return_state: bool = False,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        every_mask: bool = False,
    ) -> tuple[Tensor, Context]:
        """Embedded tokens (B x T x D), and what the layers need beside them. `attention_mask` may also cover what the state has seen.

        Attention masks are built for the softmax layers, or, with `every_mask`, for the teacher's attention in all layers.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        time = x.shape[1]
        return_state = return_state or state is not None
        if return_state and segment_ids is not None:
            raise ValueError("return_state: packed sequences have no common state; leave out segment_ids")
        if return_state and state is None:
            state = self.new_state()
        mask = None if attention_mask is None else attention_mask[:, -time:]
        if mask is not None and bool(mask.all()):
            mask = None
        if position_ids is None:
            position_ids = positions(x, mask, segment_ids, None if state is None else state.positions)
        kinds = {layer.attention_kind for layer in self.layers if every_mask or not layer.recurrent}
        context = Context(
            mask=mask,
            segment_ids=segment_ids,
            position_embeddings=self.rotary_emb(x, position_ids),
            attention_masks=self._attention_masks(kinds, x, mask, segment_ids, position_ids, state) if kinds else {},
            state=state,
            return_state=return_state,
        )
        return x, context

    def new_state(self) -> RwkvState:
        """That of a text that has not begun."""
        hybrid = not all(layer.recurrent for layer in self.layers)
        return RwkvState(len(self.layers), DynamicCache() if hybrid else None)

    def _attention_masks(
        self,
        kinds: set[str],
        x: Tensor,
        mask: Tensor | None,
        segment_ids: Tensor | None,
        position_ids: Tensor,
        state: RwkvState | None,
    ) -> dict[str, Tensor | None]:
        """What softmax layers see, by kind: as transformers builds it for the teacher."""
        if segment_ids is not None:
            # transformers separates documents where positions start again, and only without a mask; a padding token is a document
            position_ids = position_ids if mask is None else position_ids.masked_fill(mask == 0, 0)
            mask = None
        if state is not None and state.attention is not None and (mask is not None or state.mask is not None):
            now = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
            past = now.new_ones(len(x), state.seen) if state.mask is None else state.mask
            mask = torch.cat([past, now], 1)
        arguments: dict[str, Any] = {
            "config": self.attention_config,
            "inputs_embeds": x,
            "attention_mask": mask,
            "past_key_values": None if state is None else state.attention,
            "position_ids": position_ids.expand(len(x), -1),
        }
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        masks: dict[str, Any] = {kind: make[kind](**arguments) for kind in kinds}
        return masks

    def _count(self, state: RwkvState, attention_mask: Tensor | None, x: Tensor) -> None:
        """Take the tokens of this call to those that were seen."""
        batch, time, _ = x.shape
        now = torch.ones(batch, time, dtype=torch.long, device=x.device) if attention_mask is None else attention_mask[:, -time:].long()
        if state.attention is not None:
            state.mask = now if state.mask is None else torch.cat([state.mask, now], 1)
        state.positions = now.sum(1) if state.positions is None else state.positions + now.sum(1)
        state.seen += time


class RwkvDistillForCausalLM(RwkvDistillPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The student with its output head."""

    # generate() then leaves the cache to `forward`
    _supports_default_dynamic_cache = classmethod(lambda cls: False)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RwkvDistillConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.model = RwkvDistillModel(config, backbone)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: RwkvState | None = None,
        return_state: bool = False,
        *,
        position_ids: Tensor | None = None,
        past_key_values: RwkvState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> StudentOutput:
        """Logits of B x T tokens (of the last `logits_to_keep` ones, if given).

        attention_mask: B x T, or B x all tokens seen so far; padding may stand on either side. segment_ids (B x T) separate packed
        sequences. `state` (or `past_key_values`) continues a text and is advanced and given back; `return_state` (or
        `use_cache`) begins one.
        """
        hidden, state = self.model(
            input_ids,
            attention_mask,
            segment_ids,
            past_key_values if state is None else state,
            return_state or use_cache,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        return StudentOutput(logits=self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden), past_key_values=state)


def teacher_config(config: RwkvDistillConfig) -> PretrainedConfig:
    """The teacher's configuration, with the attention implementation that was asked of the student."""
    teacher = config.teacher_config()
    teacher._attn_implementation = config._attn_implementation or "sdpa"
    return teacher


def positions(x: Tensor, mask: Tensor | None, segment_ids: Tensor | None, seen: Tensor | None) -> Tensor:
    """Place of each token (B or 1 x T) in its text: from 0 at the first real token of a row or segment, or behind what was seen."""
    steps = torch.arange(x.shape[1], device=x.device)
    starts = None if segment_ids is None else sequence_starts(mask, segment_ids)
    if starts is not None:
        first = torch.where(starts, steps, 0).cummax(1).values
        return steps - first
    if mask is not None:
        within = (mask.long().cumsum(1) - 1).clamp(min=0)
        return within if seen is None else within + seen[:, None]
    return steps[None] if seen is None else steps[None] + seen[:, None]

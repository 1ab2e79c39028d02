"""`BeaconMixin`: a stock causal language model that reads through beacons, with the same weights under the same names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from beacon.cache import BeaconCache
from beacon.config import BeaconConfig
from beacon.errors import CacheError
from beacon.modeling.block import Angles
from beacon.modeling.generation import Generation
from beacon.modeling.layer import beacon_layer
from beacon.modeling.walk import Hidden, Walk, documents_of, spans_of
from beacon.modeling.weights import add_beacons, is_beacon, without_gradient
from beacon.plan import Cursor
from beacon.ratios import Rule, choose, fitting
from lm_core.errors import ConfigError, InputError
from lm_core.head import chunked_cross_entropy
from lm_core.method import IGNORE

# B rows, T columns (padding included), N raw tokens of a block, D hidden size


@dataclass
class BeaconOutput(CausalLMOutputWithPast):
    """`loss` is the mean over counted targets, `batch_loss` (B) the mean of each row, `token_count` (B) its counted targets."""

    batch_loss: Tensor | None = None
    token_count: Tensor | None = None


class BeaconLayer:
    """Mixed into a stock decoder layer: with a block it carries beacons, without one it is the stock layer."""

    def forward(self, *args: Any, block: Any = None, last: bool = False, **kwargs: Any) -> Any:
        if block is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        raw, beacon, open_window, memory = args
        return beacon_layer(self, raw, beacon, block, last, open_window, memory)


class BeaconMixin(Generation):
    """Mixed into a stock causal language model in front of it."""

    config: Any
    model: Any
    lm_head: Any
    training: bool
    _stock = False
    # eager: one dense softmax, the reference; auto: tile by tile on a CPU, else sdpa
    attn_backend: Literal["auto", "eager", "sdpa", "flex"] = "auto"

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        from beacon.attach import install
        from beacon.modeling.families import FAMILIES

        install(self, FAMILIES[config.model_type.removeprefix("beacon_")], copy=False)

    @property
    def is_stock(self) -> bool:
        """Whether `beacon_disabled` is in force."""
        return self._stock

    @property
    def beacon(self) -> BeaconConfig:
        """The settings, as config.json has them."""
        return BeaconConfig.from_dict(self.config.beacon)

    def add_beacons(self, copy: bool) -> None:
        """The beacon embedding and projections; with `copy` they start from the weights of the base."""
        add_beacons(self, self.beacon, copy)

    # what save_pretrained writes, and the name of the base
    save_format: tuple[str, str] = ("full", "")

    def save_pretrained(self, save_directory: Any, *, state_dict: Any = None, **stock: Any) -> None:
        """A Hugging Face folder: the whole model, or the beacon weights alone where `save_format` says adapter."""
        if self.save_format[0] == "full":
            super().save_pretrained(save_directory, state_dict=state_dict, **stock)  # type: ignore[misc]
            return
        from beacon.io import save_adapter

        save_adapter(Path(save_directory), self, state_dict or self.state_dict(), self.save_format[1])  # type: ignore[attr-defined]
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, base_model: Any = None, **stock: Any) -> Any:
        """A folder of either form; an adapter resolves its base by name unless `base_model` is given."""
        from beacon.io import ADAPTER, load_adapter

        if not (Path(str(name)) / ADAPTER).is_file():
            return super().from_pretrained(name, *args, **stock)  # type: ignore[misc]
        kind = stock.get("dtype")
        model = load_adapter(Path(name), base_model, kind if isinstance(kind, torch.dtype) else None).eval()
        if not stock.get("output_loading_info"):
            return model
        return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}

    # --- running ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: BeaconCache | None = None,
        ratios: Sequence[int] | None = None,
        seed: int | None = None,
        engine: str = "auto",
        logits_to_keep: int = 0,
        **stock: Any,
    ) -> Any:
        if self._stock:
            inputs = {"attention_mask": attention_mask, "labels": labels, "past_key_values": past_key_values}
            return super().forward(input_ids, logits_to_keep=logits_to_keep, **inputs, **stock)  # type: ignore[misc]
        if input_ids is None:
            raise InputError("input_ids: beacon models read token ids, not embeddings; give input_ids")
        keep = None if labels is not None or logits_to_keep == 0 else logits_to_keep
        hidden = self.read(input_ids, attention_mask, doc_ids, past_key_values, given(ratios), seed=seed, engine=engine, keep=keep)
        logits = self.lm_head(hidden.states_BTD[:, -logits_to_keep:] if logits_to_keep else hidden.states_BTD)
        losses: dict[str, Any] = {} if labels is None else self._losses(hidden, labels)
        return BeaconOutput(logits=logits, past_key_values=hidden.cache, **losses)

    def _losses(self, hidden: Hidden, labels_BT: Tensor) -> dict[str, Tensor]:
        targets = counted_targets(labels_BT, hidden.counts_BT)
        weight = self.lm_head.weight
        sums = torch.stack([chunked_cross_entropy(states, weight, row) for states, row in zip(hidden.states_BTD, targets)])
        counts = (targets != IGNORE).sum(1)
        return {"loss": sums.sum() / counts.sum().clamp(min=1), "batch_loss": sums / counts.clamp(min=1), "token_count": counts}

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        past: BeaconCache | None = None,
        ratios: RatioRule | None = None,
        *,
        seed: int | None = None,
        engine: str = "auto",
        keep: int | None = None,
        expected_length: int | None = None,
        limited: bool = True,
    ) -> Hidden:
        """Final hidden states of `input_ids` (B x T; rows padded on one side), going on from `past`.

        `ratios` gives per row, from its length, the ratio of compaction i. Evaluation compacts every full window, training
        does not compact a window that ends with its row, as nobody would read it. `keep` asks for the last columns only;
        without `limited` neither positions nor the memory budget end the call.
        """
        spans = spans_of(attention_mask, *input_ids.shape)
        learning = self.training and past is None
        cache = past if past is not None else self.new_cache(spans, ratios, seed, expected_length, learning, limited and not learning)
        if len(cache.cursors) != len(spans):
            raise CacheError(
                f"input_ids: {len(spans)} rows, but the cache holds {len(cache.cursors)}; give as many rows, or fork the cache"
            )
        documents = [documents_of(doc_ids, b, first, last) for b, (first, last) in enumerate(spans)]
        walk = Walk(self, input_ids, spans, documents, cache, keep, learning)
        many = {"loop": 1, "auto": sys.maxsize if learning else self.beacon.prefill_block_windows}.get(engine, sys.maxsize)
        while walk.unread:
            walk.block(many)
        cache.columns += input_ids.shape[1]
        return walk.hidden()

    def new_cache(
        self,
        spans: Sequence[tuple[int, int]],
        ratios: RatioRule | None,
        seed: int | None,
        expected: int | None,
        learning: bool,
        limited: bool = True,
    ) -> BeaconCache:
        """An empty cache for rows of these lengths."""
        config, positions = self.beacon, self.positions
        cursors = []
        for first, last in spans:
            length = last - first
            rule = (
                ratios(length)
                if ratios is not None
                else choose(config, config.inference_ratio_mix, seed, length, max(length, expected or 0), positions)
            )
            if config.memory_budget is not None and config.on_budget == "adapt" and limited:
                rule = fitting(config, rule, max(length, expected or 0), config.memory_budget)
            limit = config.compactions(length, training=True) if learning else None
            # a random draw must not end a training run: there positions are only counted
            cursors.append(Cursor(config, rule, limit, self.sliding_window(), positions if limited else None))
        return BeaconCache(cursors, self)

    def sliding_window(self) -> int | None:
        """Tokens that a raw token looks back inside its window, where the architecture limits them."""
        window: int | None = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ["sliding_attention"])
        return window if kinds == {"sliding_attention"} else None

    @property
    def positions(self) -> int:
        """P: positions that the rotary embedding was made for."""
        rope = self.config.rope_parameters or {}
        limit: int = self.config.max_position_embeddings
        original = rope.get("original_max_position_embeddings") or limit
        kind = rope.get("rope_type", "default")
        if kind in ("linear", "yarn", "llama3"):
            return max(limit, int(rope["factor"] * original))
        return int(original) if kind in ("dynamic", "longrope") else limit

    def angles(self) -> Angles:
        rotary = self.model.rotary_emb
        # length-dependent kinds change `inv_freq` as they go; ours stay those of the original length
        frequencies = getattr(rotary, "original_inv_freq", rotary.inv_freq)
        return Angles(frequencies, float(rotary.attention_scaling), self.model.embed_tokens.weight.dtype)

    # --- parts ---

    @contextmanager
    def beacon_disabled(self) -> Iterator[None]:
        """The stock model, bit for bit."""
        before, self._stock = self._stock, True
        try:
            yield
        finally:
            self._stock = before

    def beacon_state_dict(self, keep_vars: bool = False) -> dict[str, Tensor]:
        """The beacon weights by name."""
        return {name: tensor for name, tensor in self.state_dict(keep_vars=keep_vars).items() if is_beacon(name)}  # type: ignore[attr-defined]

    def load_beacon_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Replace the beacon weights. Raises InputError naming the first tensor that is missing, unknown or of another shape."""
        own = self.beacon_state_dict()
        for name in [*own, *weights]:
            if name not in weights or name not in own or own[name].shape != weights[name].shape:
                raise InputError(f"model: the beacon weights do not fit at {name}; use those of the same base model and settings")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The beacon weights that can receive a gradient: all but those of the last layer that nothing follows."""
        idle = re.compile(without_gradient(self.config.num_hidden_layers))
        named = self.named_parameters()  # type: ignore[attr-defined]
        return [parameter for name, parameter in named if is_beacon(name) and not idle.search(name)]


RatioRule = Callable[[int], Rule]
"""From the length of a row to the ratios of its compactions."""


def given(ratios: Sequence[int] | None) -> RatioRule | None:
    """A rule that reads a list; the last entry stands for all that follow."""
    if ratios is None:
        return None
    if not ratios:
        raise ConfigError("ratios: an empty list; give one ratio per compaction")
    rule = Rule("list", tuple(ratios))
    return lambda length: rule


def counted_targets(labels_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """Labels shifted to the token that predicts them; -100 where nothing counts."""
    shifted = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)
    return shifted.masked_fill(~counts_BT, IGNORE)

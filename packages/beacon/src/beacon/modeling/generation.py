"""Reading a long text into memory, and writing on from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from beacon.cache import BeaconCache
from beacon.errors import CacheError
from beacon.modeling.walk import spans_of
from lm_core.errors import ConfigError, InputError

# B rows, T columns


class Generation:
    """Part of the beacon models: `compress` and `generate`."""

    @torch.no_grad()
    def compress(
        self,
        ids: Tensor | Sequence[int] | Iterable[Sequence[int]],
        expected_length: int | None = None,
        *,
        ratios: Sequence[int] | None = None,
        seed: int | None = None,
        past_key_values: BeaconCache | None = None,
    ) -> BeaconCache:
        """Read `ids` into a memory, window by window: B x T, the ids of one row, or pieces of one row as they come.

        `expected_length` is what will be read in all, where more is to come; adaptive ratios are chosen for it.
        """
        from beacon.modeling.causal_lm import given

        model: Any = self
        cache, total = past_key_values, expected_length
        if isinstance(ids, Tensor) or (isinstance(ids, Sequence) and all(isinstance(token, int) for token in ids)):
            whole = torch.as_tensor(ids)
            total = max(total or 0, whole.shape[-1])
            ids = whole
        elif total is None and cache is None and model.beacon.memory_budget is not None and model.beacon.on_budget == "adapt":
            raise ConfigError(
                "expected_length: unknown for pieces of a text, and on_budget adapt chooses the ratio by it; give it, or use evict"
            )
        training = model.training
        model.train(False)
        try:
            for piece in _pieces(ids, model.beacon.prefill_block_windows * model.beacon.stride):
                read = model.read(piece.to(model.device), None, None, cache, given(ratios), seed=seed, keep=0, expected_length=total)
                cache = read.cache
        finally:
            model.train(training)
        if cache is None:
            raise InputError("ids: nothing to read; give at least one token")
        return cache

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        past_key_values: BeaconCache | None = None,
        ratios: Sequence[int] | None = None,
        seed: int | None = None,
        **stock: Any,
    ) -> Any:
        """transformers' `generate`, reading and writing through memory.

        With `past_key_values` the input ids are what comes after the text in it, and that cache goes on (fork it to keep it).
        Right-padded prompts are moved to the right first, so that new tokens follow their text.
        """
        model: Any = self
        ids = inputs if inputs is not None else stock.pop("input_ids", None)
        if model.is_stock:
            return super().generate(ids, past_key_values=past_key_values, **stock)  # type: ignore[misc]
        if ids is None:
            raise InputError("input_ids: nothing to go on from; give at least one token per row")
        config = stock.get("generation_config") or model.generation_config
        mask = stock.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
        ids, mask = left_padded(ids, mask)
        copies = max(int(stock.get(name) or getattr(config, name, None) or 1) for name in ("num_beams", "num_return_sequences"))
        if past_key_values is None:
            new = stock.get("max_new_tokens") or getattr(config, "max_new_tokens", None) or 0
            past_key_values = self._empty(mask.repeat_interleave(copies, 0), ratios, seed, max(int(new), 0))
        elif len(past_key_values.cursors) != len(ids):
            raise CacheError(
                f"past_key_values: the cache holds {len(past_key_values.cursors)} rows, the prompt {len(ids)}; give as many, or fork the cache"
            )
        elif copies > 1:
            past_key_values = past_key_values.fork(copies)
        # transformers takes ids shorter than the mask for the new ones
        before = mask.new_ones(len(mask), past_key_values.columns)
        return super().generate(  # type: ignore[misc]
            ids, attention_mask=torch.cat((before, mask), dim=1), past_key_values=past_key_values, **stock
        )

    def _empty(self, mask: Tensor, ratios: Sequence[int] | None, seed: int | None, new: int) -> BeaconCache:
        from beacon.modeling.causal_lm import given

        model: Any = self
        spans = spans_of(mask, *mask.shape)
        expected = max(last - first for first, last in spans) + new
        return cast(BeaconCache, model.new_cache(spans, given(ratios), seed, expected, learning=False))


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with their padding in front.

    >>> left_padded(torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]]))[0].tolist()
    [[0, 5, 6]]
    """
    shifts = [ids.shape[1] - last for _, last in spans_of(mask, *ids.shape)]
    if not any(shifts):
        return ids, mask
    return tuple(torch.stack([row.roll(shift) for row, shift in zip(part, shifts)]) for part in (ids, mask))  # type: ignore[return-value]


def _pieces(ids: Any, size: int) -> Iterator[Tensor]:
    """B x T pieces of at most `size` columns."""
    if isinstance(ids, Tensor):
        whole = ids[None] if ids.ndim == 1 else ids
        yield from (piece for piece in whole.split(size, dim=1) if piece.shape[1])
        return
    for part in ids:
        yield from _pieces(torch.as_tensor(part), size)

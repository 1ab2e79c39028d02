"""Samples of a run as core's loader takes them: sample n is a function of the options and n alone."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_core import dist
from lm_core.data import Data
from lm_core.data.pack import collate
from lm_core.errors import ConfigError, InputError
from lm_core.method import IGNORE
from mdm_scaling.data import pathfile, sampler
from mdm_scaling.data.corpus import open_split
from mdm_scaling.data.tokens import Integers, Part
from mdm_scaling.noise import levels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mdm_scaling.config import PretrainConfig

logger = logging.getLogger(__name__)
Row = dict[str, NDArray[Any]]


class Window:
    """What becomes of S + 1 tokens: `ar` predicts the last S from the first S, `mdm` the first S from themselves."""

    def __init__(self, objective: str, ignore: int | None) -> None:
        self.objective, self.ignore = objective, ignore

    def __call__(self, tokens: Integers) -> Row:
        labels = (tokens[1:] if self.objective == "ar" else tokens[:-1]).copy()
        if self.ignore is not None:
            labels[labels == self.ignore] = IGNORE
        return {"input_ids": tokens[:-1].copy(), "labels": labels}


class TrainRows:
    """The samples of a run in Megatron's order. `len` is one epoch, so that core counts epochs as people do."""

    def __init__(
        self,
        parts: Sequence[Part],
        weights: Sequence[float],
        orders: Sequence[sampler.Order],
        wanted: int,
        size: int,
        window: Window,
        packing: str,
    ) -> None:
        self.parts, self.orders, self.size, self.window, self.wanted, self.packing = parts, orders, size, window, wanted, packing
        self.ends = [np.cumsum(part.length[order.documents]) for part, order in zip(parts, orders)]
        self.drawn = sampler.blend(weights, wanted) if len(parts) > 1 else None
        self.first = 0

    def __len__(self) -> int:
        return max(1, sum((part.tokens - 1) // self.size for part in self.parts))

    def length(self, k: int) -> int:
        return self.size

    def epoch(self, number: int) -> TrainRows:
        """The same rows from another epoch on."""
        later = object.__new__(TrainRows)
        later.__dict__ = {**self.__dict__, "first": number * len(self)}
        return later

    def __getitem__(self, k: int) -> Row:
        # dropped steps move a run beyond its length; it goes on from the beginning
        n = (self.first + k) % self.wanted
        part, number = (0, n) if self.drawn is None else (int(self.drawn[0][n]), int(self.drawn[1][n]))
        order = self.orders[part]
        at = int(order.samples[number % len(order.samples)]) * self.size
        return self.window(self.parts[part].gather(order.documents, self.ends[part], at, at + self.size + 1))

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(rows)

    @property
    def fingerprint(self) -> str:
        """Changes when any sample changes."""
        known = [part.fingerprint for part in self.parts]
        text = f"{known} {self.wanted} {self.size} {self.window.__dict__} {self.packing} {[order.epochs for order in self.orders]}"
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class HeldOutRows:
    """Samples of a held-out corpus in file order, each with the noise levels of its draws.

    They are the same at every evaluation while `window` is: one further on, they follow these, and come from the beginning after the end.
    """

    window = 0

    def __init__(self, part: Part, size: int, window: Window, *, count: int, num_mc: int, seed: int) -> None:
        self.part, self.size, self.made, self.num_mc = part, size, window, num_mc
        self.ends = np.cumsum(part.length)
        self.total = (part.tokens - 1) // size
        self.count = min(self.total, count)
        slots = torch.arange(self.count * num_mc)
        self.t = levels("stratified", seed, "eval", 0, slots, slots, max(1, len(slots))).numpy().reshape(self.count, num_mc)

    def __len__(self) -> int:
        return self.count

    def length(self, k: int) -> int:
        return self.size

    def __getitem__(self, k: int) -> Row:
        first = (self.window * self.count + k) % self.total * self.size
        return {**self.made(self.part.gather(None, self.ends, first, first + self.size + 1)), "t": self.t[k]}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(rows)


def build(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Samples to train on, and held-out samples by source."""
    texts = pathfile.read(config.train_data_path_file) if config.train_data_path_file else config.data
    held_texts = pathfile.read(config.valid_data_path_file) if config.valid_data_path_file else config.eval_data
    if not texts:
        raise ConfigError("data: nothing to train on; give --data, for example --data builtin:python-docs")
    arguments, weights = pathfile.weighted(texts)
    options: dict[str, Any] = {"text_column": config.text_column, "split": config.split, "hold_out": 0.0 if held_texts else config.hold_out}
    opened = [open_split(text, tokenizer, **options) for text in arguments]
    parts, held = [part for part, _ in opened], [part for _, part in opened if part is not None and not held_texts]
    if held_texts:
        from mdm_scaling.data.corpus import open_held_out

        held = open_held_out(held_texts, tokenizer, text_column=config.text_column)
    if config.unique_tokens:
        parts = _cut(parts, weights, int(config.unique_tokens))
    for part in parts:
        sampler.require(part, config.max_length)
    window = Window(config.objective, tokenizer.eos_token_id if config.eod_mask_loss else None)
    rows = _train_rows(config, parts, weights, window)
    count = math.ceil(config.eval_tokens / config.max_length) if config.eval_tokens else 2**62
    valid: dict[str, HeldOutRows] = {}
    for part in held:
        if part.tokens < config.max_length + 1:
            logger.warning("%s: the held-out part has %d tokens, too few for one sample; left out", part.name, part.tokens)
            continue
        draws = config.num_mc if config.objective == "mdm" else 1
        valid[_free(part.name, valid)] = HeldOutRows(part, config.max_length, window, count=count, num_mc=draws, seed=config.eval_seed)
    if not valid and config.eval_every != "never":
        raise InputError("eval_data: no held-out sample; give --valid-data-path-file or another --split, or --eval-interval never")
    return Data(train={"train": rows}, valid=valid, weights={"train": 1.0})


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    fresh = name
    while fresh in taken:
        fresh, number = f"{name}-{number}", number + 1
    return fresh


def _cut(parts: Sequence[Part], weights: Sequence[float], tokens: int) -> list[Part]:
    """The first tokens of every corpus, by weight."""
    total = sum(weights)
    available = sum(part.tokens for part in parts)
    if available < tokens:
        raise InputError(f"unique_tokens: {tokens} are more than the {available} tokens of the training documents; use at most that many")
    return [part.first_tokens(round(tokens * weight / total)) for part, weight in zip(parts, weights)]


def _train_rows(config: PretrainConfig, parts: Sequence[Part], weights: Sequence[float], window: Window) -> TrainRows:
    batch = config.sequences(dist.world())
    per_epoch = sum((part.tokens - 1) // config.max_length for part in parts)
    limits = config.limits().limits
    per_unit = {"steps": batch, "samples": 1.0, "tokens": 1 / config.max_length, "targets": 1 / config.max_length, "epochs": per_epoch}
    lengths = [limit * per_unit[unit] for unit, limit in limits.items() if unit in per_unit]
    if not lengths:
        raise ConfigError(
            f"budget: {config.budget} does not say how many samples there are, on which their order depends; add a limit in samples"
        )
    wanted = -(-math.ceil(min(lengths)) // batch) * batch
    share = np.asarray(weights) / sum(weights)
    orders = []
    for corpus, part in enumerate(parts):
        needed = wanted if len(parts) == 1 else max(1, math.ceil(wanted * share[corpus]) + 1)
        with dist.main_first():
            orders.append(sampler.cached(part, config.max_length, needed, config.seed, config.epoch_shuffle, config.packing))
        logger.info(
            "%s: %d tokens in an epoch, %.3g epochs%s",
            part.name,
            part.tokens,
            needed * config.max_length / part.tokens,
            repeats(needed, part, config.max_length),
        )
    return TrainRows(parts, weights, orders, wanted, config.max_length, window, config.packing)


def repeats(needed: int, part: Part, size: int) -> str:
    """How often samples are seen, in words; nothing where none is seen twice."""
    per_epoch = max(1, (part.tokens - 1) // size)
    whole, rest = divmod(needed, per_epoch)
    if whole == 0:
        return ""
    more = rest / per_epoch
    return f": {1 - more:.0%} of the samples {whole} times" + (f", {more:.0%} {whole + 1} times" if rest else "")

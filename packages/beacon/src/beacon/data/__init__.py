"""Data of beacon training: text, conversations and packed blocks, each source as rows with the same columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from beacon.config import BeaconConfig, windows
from beacon.data.arguments import located
from beacon.data.blocks import Blocks, holds_blocks
from beacon.data.chat import ChatEncoder
from beacon.data.encoded import encoded
from beacon.data.rows import Kept, teaching
from beacon.sampler import Ordered, by_windows, grouped
from lm_core.data import FIXED_HOLD_OUT, Data, Rows, build_data, named, weights_of
from lm_core.data.pack import OneDocument
from lm_core.data.shards import Source
from lm_core.data.sources import Argument, Corpus, resolve
from lm_core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from beacon.options import TrainConfig

log = logging.getLogger(__name__)

_LLAMA3_VOCABULARY = 128256


def training_data(config: TrainConfig, settings: BeaconConfig | None, tokenizer: PreTrainedTokenizerBase, world: int) -> Data:
    """Rows to train on and rows held out. `settings` is None for a model without beacons.

    Raises InputError for data that cannot be used or keeps no sample, ConfigError for options that do not go together.
    """
    evaluates = config.eval_every != "never"
    hold_out = config.hold_out if evaluates and not config.eval_data else 0.0
    documents = settings is not None and settings.doc_mask
    longest = config.eval_max_length or config.max_length
    arguments = named(located(config.data, config.data_root), "data")
    if not arguments:
        raise ConfigError("train_data: nothing to train on; give --train-data, for example --train-data builtin:python-docs")
    train: dict[str, Rows] = {}
    valid: dict[str, Rows] = {}
    for name, argument in arguments.items():
        part = _source(config, argument, tokenizer, hold_out, config.max_length)
        train[name] = teaching(
            name,
            part.train,
            settings,
            least=part.least,
            most=part.most,
            documents=documents,
            eos=tokenizer.eos_token_id,
            chosen=part.chosen,
        )
        _warn_of_documents(name, part.train, documents, len(tokenizer))
        _warn_of_length(name, train[name], config.max_length)
        if part.valid is not None:
            # the same texts, cut elsewhere
            held = part if longest == config.max_length else _source(config, argument, tokenizer, hold_out, longest)
            valid[name] = _readable(name, held.valid, config, documents)
    for name, argument in named(located(config.eval_data, config.data_root), "eval_data").items() if evaluates else ():
        part = _source(config, argument, tokenizer, FIXED_HOLD_OUT, longest)
        valid[name] = _readable(name, part.valid if part.fixed and part.valid is not None else part.train, config, documents)
    if evaluates and not valid:
        log.warning("eval_data: nothing is held out, so nothing will be evaluated; give --eval-data, or --hold-out above 0")
    data = Data(train=train, valid=valid, weights=weights_of(arguments, train))
    return _in_order(config, settings, arguments, data, world)


def _readable(name: str, rows: Any, config: TrainConfig, documents: bool) -> Kept:
    """Held-out rows that an evaluation reads."""
    places = [k for k in range(len(rows)) if rows.length(k) >= config.eval_min_length]
    if not places and len(rows):
        raise InputError(f"eval_min_length: {name} holds out no row of {config.eval_min_length} tokens; use a smaller one, or longer texts")
    return Kept(rows, places[: config.max_eval_num], documents)


def _source(config: TrainConfig, argument: Argument, tokenizer: PreTrainedTokenizerBase, hold_out: float, longest: int) -> _Part:
    """Rows of one data argument, by what its content is; text is cut to `longest` tokens."""
    path = Path(argument.source).expanduser()
    if holds_blocks(path):
        pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        blocks = Blocks(path, len(tokenizer), pad, argument.samples)
        return _Part(blocks, None, least=0, chosen=blocks.has_labels)
    corpus = resolve(argument)
    first = None if corpus.folder is not None else next(corpus.rows(), None)
    if first is not None and "conversations" in first.fields:
        return _chat(config, corpus, tokenizer, hold_out, longest)
    weightless = f"{argument.source}[{argument.samples}]" if argument.samples else argument.source
    asked = SimpleNamespace(
        data=[weightless], eval_data=[], hold_out=hold_out, text_column=config.text_column, packing=config.packing,
        max_length=longest, shuffle=config.shuffle and config.group_by_stride == config.sort_by_stride == "none", seed=config.seed,
    )  # fmt: skip
    built = build_data(asked, tokenizer)
    (rows,) = built.train.values()
    return _Part(rows, next(iter(built.valid.values()), None), least=config.min_length, fixed=corpus.fixed)


@dataclass(frozen=True)
class _Part:
    """Rows of one source and those held out, always the same ones if `fixed`; `chosen` labels are set for some tokens only."""

    train: Any
    valid: Any
    least: int
    most: int | None = None
    chosen: bool = False
    fixed: bool = False


def _chat(config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, hold_out: float, longest: int) -> _Part:
    template = config.chat_template
    own = getattr(tokenizer, "chat_template", None) if template == "hf" else None
    source = encoded(corpus, tokenizer, ChatEncoder(tokenizer, template), ["chat", template, own], labels=True, workers=config.num_proc)
    held: Source | None = None
    if hold_out > 0:
        source, held = source.split(hold_out)
    if corpus.argument.samples is not None:
        source = source.take(corpus.argument.samples)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    size = int(source.length.max(initial=longest))
    valid = None if held is None else OneDocument(held, longest, pad, name=f"held-out {corpus.argument.name}")
    return _Part(OneDocument(source, size, pad), valid, least=config.min_length, most=longest, chosen=True)


def _in_order(config: TrainConfig, settings: BeaconConfig | None, arguments: Mapping[str, Argument], data: Data, world: int) -> Data:
    """All sources as one, in the order that the options ask for."""
    if config.group_by_stride == config.sort_by_stride == "none" or settings is None:
        return data
    asked = "group_by_stride" if config.group_by_stride != "none" else "sort_by_stride"
    if any(argument.weight is not None for argument in arguments.values()):
        raise ConfigError(f"{asked}: rows of all sources are put into one order, so weights (@) have no meaning; drop one of the two")
    lengths = [rows.length(k) for rows in data.train.values() for k in range(len(rows))]  # type: ignore[attr-defined]
    found = np.array(windows(settings, lengths), dtype=np.int64)
    if config.sort_by_stride != "none":
        order = by_windows(found, config.seed)
        ordered = Ordered(data.train, order if config.sort_by_stride == "ascend" else order[::-1].copy(), group=0, seed=config.seed)
    else:
        assert config.group_by_stride != "none"
        size = config.micro_batch_size * world
        groups = grouped(found, size, config.group_by_stride, config.seed)
        if not len(groups):
            raise InputError(
                f"group_by_stride: no {size} samples have the same number of windows; use relaxed, a smaller batch, or more data"
            )
        if config.group_by_stride == "strict":
            log.info("group_by_stride: %d groups of %d, %d samples left out", len(groups), size, len(found) - groups.size)
        ordered = Ordered(data.train, groups.reshape(-1), group=size if config.shuffle else 0, seed=config.seed)
    return Data(train={"all": ordered}, valid=data.valid, weights={"all": 1.0}, ordered=True)


def _warn_of_documents(name: str, rows: Any, documents: bool, vocabulary: int) -> None:
    if documents or vocabulary != _LLAMA3_VOCABULARY or not len(rows):
        return
    if len(np.unique(rows[0].get("document_ids", [0]))) > 1:
        log.warning("%s: its rows hold several documents that see each other; --beacon-doc-mask true keeps them apart", name)


def _warn_of_length(name: str, rows: Any, limit: int) -> None:
    longest = max(rows.length(k) for k in range(len(rows)))
    if longest > limit:
        log.warning("%s: rows of up to %d tokens are used as they are, beyond --max-length %d", name, longest, limit)

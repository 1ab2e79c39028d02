"""Data arguments to documents: prefixes of .bin and .idx files, or anything that core reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm_core.data import FIXED_HOLD_OUT
from lm_core.data.sources import Argument, parse, resolve
from lm_core.data.tokenize import open_corpus
from lm_core.errors import ConfigError, InputError
from mdm_scaling.data.indexed import Indexed, is_prefix, prefix_of
from mdm_scaling.data.tokens import Part
from mdm_scaling.planner import bounds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What Megatron holds out of .bin files, in thousandths of the documents
MEGATRON_SPLIT = "969,30,1"


def open_split(
    text: str, tokenizer: PreTrainedTokenizerBase, *, text_column: str, split: str | None, hold_out: float
) -> tuple[Part, Part | None]:
    """Documents to train on and those held out, of one data argument."""
    argument = parse(text)
    if is_prefix(argument.source):
        store = _indexed(argument, len(tokenizer))
        first, second, _ = bounds(len(store.length), split or MEGATRON_SPLIT)
        return Part.of(_name(argument), store, 0, first), Part.of(_name(argument), store, first, second)
    corpus = resolve(argument)
    source = open_corpus(corpus, tokenizer, text_column=text_column)
    if argument.samples is not None:
        source = source.take(argument.samples)
    name = argument.name
    if split is not None:
        first, second, _ = bounds(len(source), split)
        return Part.of(name, source, 0, first), Part.of(name, source, first, second)
    if corpus.valid is not None:
        return Part.of(name, source), Part.of(name, open_corpus(corpus.valid, tokenizer, text_column=text_column))
    share = FIXED_HOLD_OUT if corpus.fixed else hold_out
    if share == 0 or source.tokens < 4:
        return Part.of(name, source), None
    rest, held = source.split(share)
    return Part.of(name, rest), Part.of(name, held)


def open_held_out(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, text_column: str) -> list[Part]:
    """Data to score: the held-out part of what has one of its own, else all of it."""
    parts = []
    for text in texts:
        argument = parse(text)
        if is_prefix(argument.source):
            parts.append(Part.of(_name(argument), _indexed(argument, len(tokenizer))))
            continue
        corpus = resolve(argument)
        source = open_corpus(corpus.valid or corpus, tokenizer, text_column=text_column)
        if corpus.fixed:
            source = source.split(FIXED_HOLD_OUT)[1]
        if argument.samples is not None:
            source = source.take(argument.samples)
        parts.append(Part.of(argument.name, source))
    if len({part.name for part in parts}) < len(parts):
        raise ConfigError(f"data: two sources are called {parts[-1].name}; rename one")
    return parts


def _indexed(argument: Argument, vocabulary: int) -> Indexed:
    if argument.samples is not None:
        raise ConfigError(f"data: {argument.source}[{argument.samples}] takes documents of a .bin file; use --unique-tokens or --split")
    store = Indexed.open(prefix_of(argument.source))
    bad = store.beyond(vocabulary)
    if bad is not None:
        raise InputError(
            f"data: {argument.source}.bin holds token {bad}, but the tokenizer has {vocabulary} entries; use its own tokenizer"
        )
    return store


def _name(argument: Argument) -> str:
    return Path(argument.source).name

"""Data: arguments to sources, sources to token shards, documents to samples, samples to batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from lm_core.data.mix import Draw
from lm_core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lm_core.data.pack import Packed
    from lm_core.data.shards import Source
    from lm_core.data.sources import Argument, Corpus

    Open = Callable[[Corpus], Source]

OnExhausted = Literal["repeat", "stop", "renormalize"]

# Built-in sources hold out the same documents whatever the options say
FIXED_HOLD_OUT = 0.05


class Rows(Protocol):
    """Samples of one source. What may be there besides: `length(k)` in tokens, `epoch(number) -> Rows`, `fingerprint`, and
    `number`, which tells the orders of several sources apart and may be set."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> Mapping[str, Any]:
        """Sample k: unpadded one-dimensional int64 columns `input_ids`, `labels` and others, as arrays or tensors."""
        ...

    def collate(self, rows: Sequence[Mapping[str, Any]], /) -> dict[str, Tensor]:
        """Samples to tensors of B x T, padded; `attention_mask` only if there is padding."""
        ...


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows held out, by source name. `draw` says how the weights choose a sample's source.

    `on_exhausted`: a source of which every sample was read is read again, ends the run, or leaves its part to the others.
    `ordered` rows keep the order that their `epoch(number)` gives them, whatever the options say of shuffling.
    """

    train: Mapping[str, Rows]
    valid: Mapping[str, Rows]
    weights: Mapping[str, float]
    draw: Draw = "deficit"
    ordered: bool = False
    on_exhausted: OnExhausted = "repeat"


def build_data(config: Any, tokenizer: PreTrainedTokenizerBase, open_source: Open | None = None) -> Data:
    """Next-token samples of `config.data` and `config.eval_data` (DataOptions and `seed`).

    `open_source` makes documents of a corpus where rows hold more than text; default: `open_corpus`.

    Without `eval_data` every source gives its own held-out part: the fixed twentieth of a built-in one, the validation
    split of a saved or hub dataset that has one, else the share `hold_out` of its documents. Without any weight
    sources count by their number of samples.

    Raises ConfigError for arguments that make no sense, InputError for data that cannot be used.
    """
    arguments, held = named(config.data, "data"), eval_rows(config, tokenizer, open_source)
    opened = open_source or _opener(config, tokenizer)
    if not arguments:
        raise ConfigError("data: nothing to train on; give --data, for example --data builtin:python-docs")
    train: dict[str, Packed] = {}
    valid: dict[str, Packed] = {}
    for number, (name, argument) in enumerate(arguments.items()):
        first, second = _parts(argument, opened, hold_out=0.0 if held else config.hold_out)
        train[name] = pack_rows(first, config, tokenizer, name=name, number=number, train=True)
        if second is not None and not held and config.hold_out > 0:
            valid[name] = pack_rows(second, config, tokenizer, name=name, train=False)
    return Data(train=train, valid=valid | held, weights=weights_of(arguments, train))


def eval_rows(config: Any, tokenizer: PreTrainedTokenizerBase, open_source: Open | None = None) -> dict[str, Packed]:
    """Samples of `config.eval_data` by source: the held-out part of what has one, else all of it.

    Of `config`, only `eval_data`, `text_column`, `packing` and `max_length` are read.
    """
    rows: dict[str, Packed] = {}
    opened = open_source or _opener(config, tokenizer)
    for name, argument in named(config.eval_data, "eval_data").items():
        first, second = _parts(argument, opened, hold_out=0.0)
        source = first if second is None else second
        source = source if argument.samples is None else source.take(argument.samples)
        rows[name] = pack_rows(source, config, tokenizer, name=name, train=False)
    return rows


def pack_rows(source: Source, config: Any, tokenizer: PreTrainedTokenizerBase, *, name: str, number: int = 0, train: bool) -> Packed:
    """The documents of a source as samples of at most `config.max_length` tokens, packed as the options say.

    A package may have an option `document_mask`: documents of a stream then do not see each other.
    """
    from lm_core.data.pack import BestFit, OneDocument, Stream

    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    if config.packing == "best-fit":
        return BestFit(source, config.max_length, pad)
    if config.packing == "document":
        return OneDocument(source, config.max_length, pad, name=name if train else f"held-out {name}")
    isolate = getattr(config, "document_mask", False)
    if not train:
        return Stream(source, config.max_length, pad, keep_tail=True, isolate=isolate)
    return Stream(source, config.max_length, pad, isolate=isolate, shuffle=config.shuffle, seed=config.seed, number=number)


def _opener(config: Any, tokenizer: PreTrainedTokenizerBase) -> Open:
    from lm_core.data.tokenize import open_corpus

    return lambda corpus: open_corpus(corpus, tokenizer, text_column=config.text_column)


def _parts(argument: Argument, opened: Open, hold_out: float) -> tuple[Source, Source | None]:
    """Documents to train on, [N] of them if asked, and those held out, if any."""
    from lm_core.data.sources import resolve

    corpus = resolve(argument)
    source = opened(corpus)
    held: Source | None = None
    if corpus.fixed:
        source, held = source.split(FIXED_HOLD_OUT)
    elif corpus.valid is not None:
        held = opened(corpus.valid)
    elif hold_out > 0:
        if source.tokens < 4:
            raise InputError(
                f"data: {argument.source} has only {source.tokens} tokens, too few to hold any out; give more text, or --eval-data"
            )
        source, held = source.split(hold_out)
    return source if argument.samples is None else source.take(argument.samples), held


def named(texts: Sequence[str], field: str) -> dict[str, Argument]:
    """Arguments by name; a name that occurs again gets a number."""
    from lm_core.data.sources import parse

    named: dict[str, Argument] = {}
    for text in texts:
        argument = parse(text)
        name, count = argument.name, 2
        while name in named:
            name, count = f"{argument.name}-{count}", count + 1
        named[name] = argument
    if field == "eval_data" and any(argument.weight is not None for argument in named.values()):
        raise ConfigError("eval_data: held-out sources are scored one by one and take no weight; leave out the @")
    return named


def weights_of(arguments: Mapping[str, Argument], train: Mapping[str, Rows]) -> dict[str, float]:
    """The weight of every source: what its argument gives, or its number of samples where no argument gives any."""
    given = {name: argument.weight for name, argument in arguments.items() if argument.weight is not None}
    if not given:
        return {name: float(len(rows)) for name, rows in train.items()}
    if missing := [name for name in arguments if name not in given]:
        raise ConfigError(f"data: {missing[0]} has no weight, but {next(iter(given))} has; give every source one, as in SOURCE@0.3")
    if not any(given.values()):
        raise ConfigError("data: all weights are 0; give at least one source a weight above 0")
    return given

"""Hub data sets that are read while training (`--streaming`), instead of being written to token shards first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lm_core.cache import key_of
from lm_core.data import Data, eval_rows, named, pack_rows, weights_of
from lm_core.data.order import Permutation
from lm_core.data.pack import collate
from lm_core.data.sources import resolve
from lm_core.data.tokenize import TextEncoder, open_corpus
from lm_core.data.vocab import fingerprint
from lm_core.errors import ConfigError, InputError
from lm_core.method import IGNORE
from lowrank_opt.config import TrainConfig
from lowrank_opt.resolve import rows_of_an_epoch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lm_core.data.sources import Corpus, Row

log = logging.getLogger("lowrank_opt")


class Stream:
    """The first `count` documents of a corpus, one per sample; shuffled inside blocks of `buffer` documents.

    Sample k of a pass is a function of (seed, pass, k), whoever asks: a resumed run goes on with the very next document, after reading
    over those before it. Every process and worker reads the stream, and encodes the documents that are its own.
    """

    def __init__(self, corpus: Corpus, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, count: int, number: int) -> None:
        self.corpus, self.count, self.number = corpus, count, number
        self.size, self.seed, self.shuffle = config.max_length, config.seed, config.shuffle
        self.buffer = int(config.shuffle_buffer) if config.shuffle else 1000
        self.encode = TextEncoder(tokenizer, config.text_column)
        self.pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        self.fingerprint = key_of(corpus.identity, fingerprint(tokenizer), config.text_column, count, self.buffer)
        self.source: Iterator[Row] = iter(())
        # documents of the source that were read, the block that is held, and how many there are, once the end was seen
        self.read, self.block, self.held = count + 1, -1, list[Any]()
        self.total: int | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self.sample(0, k)

    def epoch(self, number: int) -> Pass:
        """The pass `number` over the documents."""
        return Pass(self, number)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Padded to the longest."""
        return collate(rows, self.pad)

    def sample(self, epoch: int, k: int) -> dict[str, Any]:
        """Document k of a pass; where the source has fewer than were foreseen, they are read again."""
        while True:
            again, at = divmod(k, self.total) if self.total else (0, k)
            block, place = divmod(at, self.buffer)
            self._hold(block)
            if place < len(self.held):
                break
        if self.shuffle:
            order = Permutation(len(self.held), self.seed, 5, self.number, epoch, again, block)
            place = int(order(np.array([place]))[0])
        (document,) = self.encode([self.held[place]])
        # an empty one is a sample without a target
        ids = np.asarray([self.pad] if document is None else document.ids, dtype=np.int64)[: self.size]
        labels = ids.copy()
        labels[0] = IGNORE
        return {"input_ids": ids, "labels": labels}

    def _hold(self, block: int) -> None:
        """Read up to the end of a block. Raises InputError for a source without any document."""
        if block == self.block:
            return
        first = block * self.buffer
        if self.read > first:
            self.source, self.read = islice(self.corpus.rows(), self.count), 0
        if first > self.read:
            log.info("%s: reading over %d documents", self.corpus.argument.name, first - self.read)
        self.read += sum(1 for _ in islice(self.source, first - self.read))
        self.held = list(islice(self.source, self.buffer))
        self.block = block
        self.read += len(self.held)
        if len(self.held) < self.buffer and self.total is None:
            self.total = self.read
            if self.total == 0:
                raise InputError(f"data: {self.corpus.argument.source} holds no document; name another one")
            if self.total < self.count:
                log.warning(
                    "%s: the stream ended after %d documents, and %d were foreseen; they are read again",
                    self.corpus.argument.name, self.total, self.count,
                )  # fmt: skip


class Pass:
    """One pass over a stream, in an order of its own."""

    def __init__(self, stream: Stream, number: int) -> None:
        self.stream, self.number = stream, number

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self.stream.sample(self.number, k)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """As the stream does."""
        return self.stream.collate(rows)


def build(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Streams to train on; held out are `--eval-data`, else the validation splits."""
    arguments = named(config.data, "data")
    corpora = {name: resolve(argument) for name, argument in arguments.items()}
    for corpus in corpora.values():
        if corpus.identity[:1] != ["hub"]:
            raise ConfigError(f"streaming: {corpus.argument.source} is no hub data set, the only kind that is streamed; drop --streaming")
    train = {
        name: Stream(corpus, config, tokenizer, corpus.count or rows_of_an_epoch(config), number)
        for number, (name, corpus) in enumerate(corpora.items())
    }
    valid = eval_rows(config, tokenizer)
    if not valid:
        for name, corpus in corpora.items():
            if corpus.valid is not None:
                source = open_corpus(corpus.valid, tokenizer, text_column=config.text_column)
                valid[name] = pack_rows(source, config, tokenizer, name=name, train=False)
    if not valid:
        log.warning("eval_data: a stream holds nothing out, and none of its sources has a validation split; nothing is evaluated")
    return Data(train=train, valid=valid, weights=weights_of(arguments, train), ordered=True)

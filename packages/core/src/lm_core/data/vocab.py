"""Tokenizers that need no download: raw bytes, and a byte-pair encoding trained once from the corpus.

Both are ordinary fast tokenizers of transformers, so `final/` folders hold them and `AutoTokenizer` loads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lm_core import cache
from lm_core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
# What a byte-pair encoding is trained on at most, in characters: more text changes few merges
_TRAINING_CHARACTERS = 200_000_000


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte (id = byte), then pad 256, bos 257, eos 258."""
    from tokenizers import AddedToken, Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(_byte_characters())}, merges=[]))
    # without merges there is nothing that words would keep apart
    _byte_level(tokenizer, words=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    return _wrapped(tokenizer)


def train_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """A byte-level byte-pair encoding of `size` entries: pad 0, bos 1, eos 2, the 256 bytes, then merges.

    The same texts give the same tokenizer. Raises InputError when the texts are too few for so many entries.
    """
    from tokenizers import Tokenizer, models, trainers

    if size < 256 + len(SPECIAL):
        raise ConfigError(
            f"tokenizer: bpe:{size} is too small for the 256 bytes and {len(SPECIAL)} special tokens; use at least bpe:{256 + len(SPECIAL)}"
        )
    tokenizer = Tokenizer(models.BPE())
    _byte_level(tokenizer, words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL.values()), initial_alphabet=_byte_characters(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < size:
        raise InputError(f"tokenizer: the text gives only {found} of {size} entries; use --tokenizer bpe:{found}, or more text")
    return _wrapped(tokenizer)


def build_tokenizer(config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that the options name (ModelOptions and DataOptions): bytes, bpe:N, or what `load_tokenizer` finds."""
    from lm_core.models import load_tokenizer

    name = config.tokenizer or config.model
    if name == "bytes":
        return byte_tokenizer()
    if name.startswith("bpe:"):
        if re.fullmatch(r"bpe:\d+", name) is None:
            raise ConfigError(f"tokenizer: {name} is no size; write for example bpe:4096")
        return _cached_bpe(int(name.removeprefix("bpe:")), config)
    return load_tokenizer(name)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the ids of a text: the vocabulary, and for fast tokenizers every rule before it."""
    return _fingerprint(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _fingerprint(tokenizer: PreTrainedTokenizerBase, entries: int) -> str:
    # `entries` is part of the key, since tokens may be added to a tokenizer; large vocabularies take half a second
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        # truncation and padding are left out: they are switched by every call
        parts = [
            rules["normalizer"],
            rules["pre_tokenizer"],
            rules["model"],
            [[token["id"], token["content"]] for token in rules["added_tokens"]],
        ]
    return hashlib.sha256(json.dumps([parts, tokenizer.bos_token_id, tokenizer.eos_token_id]).encode()).hexdigest()


def _cached_bpe(size: int, config: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from lm_core.data.sources import parse, resolve

    if not config.data:
        raise ConfigError(f"tokenizer: {config.tokenizer} is trained from the data; give --data, or use --tokenizer bytes")
    corpora = [resolve(parse(argument)) for argument in config.data]
    held = 0.0 if config.eval_data else config.hold_out
    key = cache.key_of("bpe", size, [corpus.identity for corpus in corpora], config.text_column, held)

    def write(folder: Path) -> None:
        log.info("training a byte-pair encoding of %d entries; later runs read it from the cache", size)
        train_bpe(_training_texts(corpora, config.text_column, held), size).save_pretrained(str(folder))

    if any(corpus.folder is not None for corpus in corpora):
        raise ConfigError(f"tokenizer: {config.tokenizer} cannot be trained from token shards; use the tokenizer that made them")
    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(str(cache.build("tokenizers", key, write))))


def _training_texts(corpora: Iterable[Any], column: str, hold_out: float) -> Iterator[str]:
    """Texts of the training split, in order, up to a limit."""
    from lm_core.data import FIXED_HOLD_OUT
    from lm_core.data.shards import key_of
    from lm_core.data.tokenize import text_of

    left = _TRAINING_CHARACTERS
    for corpus in corpora:
        held = FIXED_HOLD_OUT if corpus.fixed else hold_out
        for row in corpus.rows():
            text = text_of(row, column)
            if key_of(text) >= (1 - held) * 2.0**64:
                continue
            yield text
            left -= len(text)
            if left <= 0:
                return


def _byte_level(tokenizer: Tokenizer, *, words: bool) -> None:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=int(1e30), **SPECIAL)  # type: ignore[no-untyped-call]
    return cast("PreTrainedTokenizerBase", wrapped)


def _byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

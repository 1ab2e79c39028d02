"""`beacon pretrain-data`: documents of several sources packed into blocks, by the shares of a mixture."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beacon.data.arguments import data_root
from beacon.data.encoded import PlainEncoder, encoded
from beacon.data.saved import require_empty, write_rows
from lm_core import counter
from lm_core.config import to_dict
from lm_core.data import FIXED_HOLD_OUT
from lm_core.data.shards import Source
from lm_core.data.sources import parse, resolve
from lm_core.data.vocab import build_tokenizer, fingerprint
from lm_core.engine.state import write_json
from lm_core.errors import ConfigError, InputError
from lm_core.values import read_count

if TYPE_CHECKING:
    from beacon.options import PretrainDataConfig

log = logging.getLogger(__name__)
Block = dict[str, Any]


def run(config: PretrainDataConfig) -> dict[str, Any]:
    """Write `output_dir` as `datasets` reads it, with stats.json beside the rows; returns the content of that file."""
    targets = lengths_and_counts(config.num_token)
    require_empty(config.output_dir)
    given = config.train_data or [str(data_root(None) / "slimpajama")]
    sources = dict(sorted(named_sources(given).items()))
    shares = mixture(config.mixture, sources, from_folder=not any("=" in text for text in given))
    if absent := sorted(name for name, share in shares.items() if share > 0 and name not in sources):
        if not config.allow_missing:
            raise InputError(f"train_data: the mixture names {absent[0]}, but there is no such source; add it, or use --allow-missing")
        log.warning("train_data: %s of the mixture left out: there is no such source", ", ".join(absent))
    if (config.tokenizer or "").startswith("bpe:"):
        raise ConfigError(f"tokenizer: {config.tokenizer} is trained from a run's data; name a model, a folder or bytes")
    tokenizer = build_tokenizer(config)
    begin = [tokenizer.bos_token_id] if config.add_bos and tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if config.add_eos and tokenizer.eos_token_id is not None else []
    pieces = []
    for number, (name, text) in enumerate(sources.items()):
        if not shares.get(name):
            log.warning("train_data: %s has no share in the mixture and is not used", name)
            continue
        corpus = resolve(parse(text))
        if corpus.folder is not None:
            raise InputError(f"train_data: {text} holds tokens already; name a text")
        source = encoded(
            corpus,
            tokenizer,
            PlainEncoder(tokenizer, config.text_column),
            ["plain", config.text_column],
            labels=False,
            workers=config.num_proc,
        )
        source = source.split(FIXED_HOLD_OUT)[0] if corpus.fixed else source
        source = source if corpus.argument.samples is None else source.take(corpus.argument.samples)
        if config.short_documents == "drop":
            source = source.select(source.length >= config.min_doc_length)
        wanted = {length: blocks_of(count, shares[name], length) for length, count in targets.items()}
        pieces.append(Packing(name, source, np.array(begin), np.array(end), wanted, config.seed, number))
    if not config.allow_missing:
        # before anything is written: what cannot be filled is known from the lengths
        for packing in pieces:
            packing.require()
    _write(config, pieces)
    stats = {
        "sources": {packing.name: [asdict(done) for done in packing.done.values()] for packing in pieces},
        "tails": {packing.name: packing.tail for packing in pieces},
        "mixture": shares,
        "tokenizer_sha256": fingerprint(tokenizer),
        "doc_ids": config.doc_ids,
    }
    write_json(config.output_dir / "stats.json", stats)
    for packing in pieces:
        for done in packing.done.values():
            missing = f", {done.shortfall} short" if done.shortfall else ""
            print(f"{packing.name}: {done.blocks} blocks of {done.length} tokens from {done.documents} documents{missing}")
        print(f"{packing.name}: {packing.tail} tokens behind the last block left out")
    return stats


def lengths_and_counts(texts: list[str]) -> dict[int, int]:
    """
    >>> lengths_and_counts(["8192:2b"])
    {8192: 2000000000}
    """
    found: dict[int, int] = {}
    for text in texts:
        length, _, count = text.partition(":")
        try:
            size, tokens = int(length), read_count(count)
        except ValueError:
            size, tokens = 0, 0
        if size < 2 or tokens < 1:
            raise ConfigError(f"num_token: {text!r} is no LENGTH:COUNT; write for example 8192:2b")
        found[size] = found.get(size, 0) + math.ceil(tokens)
    return found


def blocks_of(count: int, share: float, length: int) -> int:
    """Blocks of one source: its share of `count` tokens, in percent, rounded up to tokens and then to blocks.

    >>> blocks_of(1000, 33.3, 100)
    4
    """
    return math.ceil(math.ceil(count * share / 100) / length)


def named_sources(arguments: list[str]) -> dict[str, str]:
    """Data arguments by source name: SOURCE=DATA, or the JSON files of one folder."""
    if len(arguments) == 1 and "=" not in arguments[0]:
        folder = Path(arguments[0]).expanduser()
        if not folder.is_dir():
            raise InputError(f"train_data: {arguments[0]} is no folder; name one with files such as wiki.jsonl, or write SOURCE=DATA")
        found = {path.name.partition(".")[0]: str(path) for path in sorted(folder.iterdir()) if re.search(r"\.jsonl?(\.gz)?$", path.name)}
        if not found:
            raise InputError(f"train_data: {folder} holds no .json or .jsonl file; name another folder, or write SOURCE=DATA")
        return found
    out: dict[str, str] = {}
    for text in arguments:
        name, sign, data = text.partition("=")
        if not sign or not name or not data:
            raise ConfigError(f"train_data: {text!r} is no SOURCE=DATA; write for example docs=builtin:python-docs")
        if name in out:
            raise ConfigError(f"train_data: the source {name} is given twice; give each one its own name")
        out[name] = data
    return out


def mixture(name: str | None, sources: Mapping[str, str], from_folder: bool) -> dict[str, float]:
    """Percent by source: of a JSON file or a shipped name, else slimpajama for a folder and equal shares for named sources."""
    if name is None and not from_folder:
        return dict.fromkeys(sources, 100 / len(sources))
    name = name or "slimpajama"
    shipped = files("beacon.data").joinpath("mixtures")
    path = Path(name).expanduser()
    if path.is_file():
        text = path.read_text()
    elif shipped.joinpath(f"{name}.json").is_file():
        text = shipped.joinpath(f"{name}.json").read_text()
    else:
        known = ", ".join(sorted(file.name.removesuffix(".json") for file in shipped.iterdir() if file.name.endswith(".json")))
        raise ConfigError(f"mixture: {name} is neither a file nor shipped; choose {known}")
    try:
        shares = {str(source): float(share) for source, share in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f'mixture: {name} is no JSON object of percentages ({error}); write {{"wiki": 40, "code": 60}}') from None
    if min(shares.values(), default=0) < 0 or not 0 < (total := math.fsum(shares.values())) <= 100.5:
        raise ConfigError(f"mixture: the shares of {name} sum to {math.fsum(shares.values()):g}; give percentages that sum to 100")
    log.info("mixture: %s, %.1f percent in all", name, total)
    return shares


@dataclass
class Done:
    """What was packed of one source into blocks of one length."""

    length: int
    wanted: int
    blocks: int = 0
    documents: int = 0
    tokens: int = 0
    shortfall: int = 0


class Packing:
    """Documents of one source back to back, cut into blocks of the lengths that are still wanted."""

    def __init__(
        self,
        name: str,
        source: Source,
        begin: np.ndarray[Any, Any],
        end: np.ndarray[Any, Any],
        wanted: Mapping[int, int],
        seed: int,
        number: int,
    ) -> None:
        self.name, self._source, self._begin, self._end = name, source, begin, end
        self._seed, self._number = seed, number
        self.done = {length: Done(length, count) for length, count in wanted.items()}
        self.tail = 0

    @property
    def available(self) -> int:
        """Tokens of the stream, with those that mark begin and end of documents."""
        return self._source.tokens + len(self._source) * (len(self._begin) + len(self._end))

    def require(self) -> None:
        """Raise InputError when the source runs dry before every block is filled."""
        needed = sum(done.length * done.wanted for done in self.done.values())
        if needed > self.available:
            raise InputError(
                f"num_token: {self.name} has {self.available:,} tokens, its share of the mixture needs {needed:,}; "
                "ask for fewer, give more text, or use --allow-missing"
            )

    def blocks(self) -> Iterator[Block]:
        """Rows with `input_ids`, `doc_ids` (from 0 in every block) and `length`."""
        stream, number = self._stream(), 0
        ids = documents = np.empty(0, dtype=np.int64)
        dry = False
        while open_ := [done for done in self.done.values() if done.blocks < done.wanted]:
            chosen = open_[0]
            if len(open_) > 1:
                drawn = float(counter.uniform(self._seed, "mix", (self._number << 32) + number, 1)[0])
                chosen = open_[int(drawn * len(open_))]
            while len(ids) < chosen.length and not dry:
                piece = next(stream, None)
                dry = piece is None
                if piece is not None:
                    ids, documents = np.concatenate([ids, piece[0]]), np.concatenate([documents, piece[1]])
            if len(ids) < chosen.length:
                fitting = [done for done in open_ if done.length <= len(ids)]
                if not fitting:
                    break
                chosen = fitting[0]
            block, inside = ids[: chosen.length], documents[: chosen.length]
            yield {"input_ids": block.astype(np.int32), "doc_ids": (inside - inside[0]).astype(np.int32), "length": chosen.length}
            chosen.blocks += 1
            chosen.tokens += chosen.length
            chosen.documents += int(inside[-1] - inside[0]) + 1
            ids, documents, number = ids[chosen.length :], documents[chosen.length :], number + 1
        self.tail = len(ids) if dry else 0
        for done in self.done.values():
            done.shortfall = done.wanted - done.blocks

    def _stream(self) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        for document, own in enumerate(self._source):
            ids = np.concatenate([self._begin, np.asarray(own, dtype=np.int64), self._end]).astype(np.int64)
            yield ids, np.full(len(ids), document)


def _write(config: PretrainDataConfig, pieces: list[Packing]) -> None:
    """All blocks, streamed."""
    columns = {"input_ids": True, "length": False, **({"doc_ids": True} if config.doc_ids else {})}
    decides = {name: value for name, value in to_dict(config).items() if name not in ("output_dir", "num_proc", "shard_size")}
    blocks = (block for packing in pieces for block in packing.blocks())
    empty = "num_token: no source fills a single block; ask for shorter blocks, or give more text"
    write_rows(config.output_dir, blocks, columns, decides, empty, config.shard_size)

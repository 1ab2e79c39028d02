"""`beacon recall-data`: rows that ask for what they said before, with only the answers learned.

Fine-tuning for long contexts mixes such rows with text: next-token prediction of text alone rarely needs an exact word from
far away, so memory learns the subject of a window and not its numbers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from beacon.data.encoded import PlainEncoder, encoded
from beacon.data.saved import require_empty, write_rows
from beacon.eval.prompts import encode, sentence_ends
from lm_core import counter
from lm_core.config import to_dict
from lm_core.data import FIXED_HOLD_OUT
from lm_core.data.sources import parse, resolve
from lm_core.data.vocab import build_tokenizer
from lm_core.errors import ConfigError, InputError
from lm_core.method import IGNORE

if TYPE_CHECKING:
    from beacon.options import RecallDataConfig

_HAY_TOKENS = 200_000
# the needle of `beacon eval needle` is in San Francisco, which is not here
_PLACES = (
    "Berlin", "Paris", "London", "Madrid", "Rome", "Vienna", "Prague", "Warsaw", "Lisbon", "Dublin", "Oslo", "Stockholm", "Helsinki",
    "Athens", "Cairo", "Nairobi", "Lagos", "Tokyo", "Kyoto", "Seoul", "Beijing", "Shanghai", "Delhi", "Mumbai", "Bangkok", "Sydney",
    "Melbourne", "Auckland", "Toronto", "Montreal", "Chicago", "Boston", "Seattle", "Denver", "Houston", "Atlanta", "Miami", "Lima",
)  # fmt: skip
_WISHES = ("to do", "to eat", "to see", "to buy", "to learn", "to read", "to hear", "to know")


def run(config: RecallDataConfig) -> dict[str, Any]:
    """Write `output_dir` as `datasets` reads it: `input_ids`, `labels` and `length` of every row."""
    require_empty(config.output_dir)
    tokenizer = build_tokenizer(config)
    hay = _haystack(config, tokenizer)
    known = set(re.findall(r"\b[a-z]{3,9}\b", str(tokenizer.decode(hay[: _HAY_TOKENS // 2]))))
    maker = Maker(tokenizer, hay, sorted(known) or ["word"], config.length)
    decides = {name: value for name, value in to_dict(config).items() if name != "output_dir"}
    columns = {"input_ids": True, "labels": True, "length": False}
    count = write_rows(config.output_dir, _rows(config, maker), columns, decides, "num_rows: no row")
    print(f"{count} rows of {config.length} tokens, told in their first half and asked at their end")
    return {"rows": count, "length": config.length}


def _rows(config: RecallDataConfig, maker: Maker) -> Iterator[dict[str, Any]]:
    for number in range(config.num_rows):
        draw = random.Random(counter.derive(config.seed, "synthetic", number))
        row = getattr(maker, config.kinds[number % len(config.kinds)])(draw)
        labels = [token if learned else IGNORE for token, learned in row]
        yield {"input_ids": [token for token, _ in row], "labels": labels, "length": len(row)}


def _haystack(config: RecallDataConfig, tokenizer: Any) -> list[int]:
    """Tokens of the texts around what is asked for, without the documents that evaluations read."""
    ids: list[int] = []
    for argument in (parse(text) for text in config.haystack):
        corpus = resolve(argument)
        if corpus.folder is not None:
            raise InputError(f"haystack: {argument.source} holds tokens, not text; name a text")
        encoder = PlainEncoder(tokenizer, config.text_column)
        source = encoded(corpus, tokenizer, encoder, ["plain", config.text_column], labels=False, workers=1)
        source = source.split(FIXED_HOLD_OUT)[0] if corpus.fixed else source
        source = source if argument.samples is None else source.take(argument.samples)
        for document in source:
            if len(ids) >= _HAY_TOKENS:
                break
            ids += [*document.tolist(), *encode(tokenizer, "\n\n")]
    if not ids:
        raise InputError(f"haystack: {config.haystack} holds no text; name another source")
    return ids


@dataclass(frozen=True)
class Ask:
    """What a row says somewhere (`told`), and later asks for: the tokens of `answer` are learned."""

    told: list[int]
    question: list[int]
    answer: list[int]

    @property
    def size(self) -> int:
        return len(self.told) + len(self.question) + len(self.answer)


class Maker:
    """Rows of `length` tokens: text with things told in its first half, then questions; each token with whether it is learned."""

    def __init__(self, tokenizer: Any, hay: Sequence[int], words: Sequence[str], length: int) -> None:
        self._tokenizer, self._hay, self._words, self._length = tokenizer, hay, words, length
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._ends = sentence_ends(tokenizer)

    def _ids(self, text: str) -> list[int]:
        return encode(self._tokenizer, text)

    def _text(self, draw: random.Random, size: int) -> list[int]:
        """`size` tokens from anywhere in the haystack, from the beginning of a sentence if one is near."""
        at = draw.randrange(len(self._hay))
        at = next((place for place in range(at, at + 100) if self._hay[(place - 1) % len(self._hay)] in self._ends), at)
        return [self._hay[(at + k) % len(self._hay)] for k in range(size)]

    def passkey(self, draw: random.Random) -> list[tuple[int, bool]]:
        """One number, told and asked as `beacon eval passkey` does."""
        key = str(draw.randrange(10000, 100000))
        told = self._ids(f" The pass key is {key}. Remember it. {key} is the pass key. ")
        return self._row(draw, [Ask(told, self._ids("\nWhat is the pass key? The pass key is"), self._ids(f" {key}") + self._end)])

    def keys(self, draw: random.Random) -> list[tuple[int, bool]]:
        """Several numbers, each of another place."""
        asks = []
        for place in draw.sample(_PLACES, min(len(_PLACES), max(1, self._length // 80))):
            key = str(draw.randrange(10000, 100000))
            question = self._ids(f"\nWhat is the pass key of {place}? The pass key of {place} is")
            asks.append(Ask(self._ids(f" The pass key of {place} is {key}. "), question, self._ids(f" {key}")))
        return self._row(draw, asks)

    def needle(self, draw: random.Random) -> list[tuple[int, bool]]:
        """Sentences of drawn words, asked by their beginnings."""
        asks = []
        for place in draw.sample(_PLACES, max(1, self._length // 160)):
            about = f"The best thing {draw.choice(_WISHES)} in {place} is"
            rest = " " + " ".join(draw.choice(self._words) for _ in range(draw.randint(4, 10))) + "."
            question = self._ids(f"\n\nWhat is the best thing{about[14:-3]}? Answer:")
            asks.append(Ask(self._ids(f" {about}{rest} "), question, self._ids(f" {about}{rest}")))
        return self._row(draw, asks)

    def copy(self, draw: random.Random) -> list[tuple[int, bool]]:
        """A text, and the same text again."""
        between = self._ids("\n\nAgain:\n\n")
        text = self._text(draw, (self._length - len(between)) // 2)
        return [*((token, False) for token in text + between), *((token, True) for token in text)]

    def _row(self, draw: random.Random, asks: list[Ask]) -> list[tuple[int, bool]]:
        # what does not leave a quarter of the row to text is not asked
        while (room := self._length - sum(ask.size for ask in asks)) < self._length / 4 and len(asks) > 1:
            asks.pop()
        if room < 1:
            raise ConfigError(f"length: {self._length} tokens do not hold the questions; use at least {self._length - room + 1}")
        text = self._text(draw, room)
        places = sorted(draw.randrange(room // 2 + 1) for _ in asks)
        context, at = list[int](), 0
        for place, ask in zip(places, asks):
            context += [*text[at:place], *ask.told]
            at = place
        row = [(token, False) for token in context + text[at:]]
        for ask in draw.sample(asks, len(asks)):
            row += [*((token, False) for token in ask.question), *((token, True) for token in ask.answer)]
        return row

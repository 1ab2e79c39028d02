"""A sentence, or a key, somewhere in a long text, asked for at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from beacon.eval import heatmap
from beacon.eval.answers import answered, finish, reader
from beacon.eval.prompts import Frame, Item, encode, inserted, repeated, sentence_ends, spread
from beacon.eval.scores import contains, rouge_l_recall, similarity
from beacon.options import HaystackOptions, NeedleConfig, PasskeyConfig, TaskOptions
from lm_core import counter, dist
from lm_core.data.sources import parse, resolve
from lm_core.data.synthetic import CORPORA
from lm_core.data.tokenize import text_of
from lm_core.errors import ConfigError, InputError

_GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def run_needle(config: NeedleConfig) -> dict[str, Any]:
    """Score every length and depth; draws figures/needle.png."""
    model, tokenizer = reader(config)
    items = needle_items(config, tokenizer)
    expected = config.answer or config.needle

    def score(item: Item, text: str) -> dict[str, float]:
        return {"rouge_l": rouge_l_recall(text, expected), "exact": contains(text, expected)}

    return _finished(config, answered(config, model, tokenizer, items, score), ("rouge_l", "exact"), "needle", "ROUGE-L recall")


def run_passkey(config: PasskeyConfig) -> dict[str, Any]:
    """Score every length and depth; draws figures/passkey.png."""
    model, tokenizer = reader(config)

    def score(item: Item, text: str) -> dict[str, float]:
        found = "".join(character for character in text if character.isdigit())[: config.passkey_length]
        return {"exact": float(found == item.answers[0]), "similarity": similarity(found, item.answers[0])}

    found = answered(config, model, tokenizer, passkey_items(config, tokenizer), score)
    return _finished(config, found, ("exact", "similarity"), "passkey", "exact match")


def _finished(config: TaskOptions, found: tuple[Any, list[str]], names: tuple[str, ...], task: str, label: str) -> dict[str, Any]:
    folder, readers = found
    panels = {who: heatmap.cells(folder.items.values(), f"{who}/{names[0]}") for who in readers}
    if config.output_dir is not None and dist.rank() == 0:
        heatmap.draw(panels, config.output_dir / "figures" / f"{task}.png", label)
    by_length = {who: {"by_length": _by_length(values)} for who, values in panels.items()}
    return finish(config, folder, readers, names, by_length)


def _by_length(values: dict[tuple[int, int], float]) -> dict[str, float]:
    lengths = sorted({length for length, _ in values})
    return {str(length): sum(own := [value for (at, _), value in values.items() if at == length]) / len(own) for length in lengths}


def needle_items(config: NeedleConfig, tokenizer: Any) -> Iterator[Item]:
    lengths, depths = grid(config)
    frame = Frame(tokenizer, config.chat_template, "", f"\n\n{config.question}")
    needle, ends = encode(tokenizer, f" {config.needle} "), sentence_ends(tokenizer)
    hay = haystack(config, tokenizer, lengths[-1])
    for length in lengths:
        room = length - frame.size - len(needle) * config.num_needle
        if room < 1:
            raise ConfigError(f"min_length: {length} tokens do not hold the needle and the question; use at least {length - room + 1}")
        for depth in depths:
            context = hay[:room]
            for copy in reversed(range(config.num_needle)):
                # further copies lie between the first and the end
                share = depth / 100 + copy * (1 - depth / 100) / config.num_needle
                context = inserted(context, needle, share, ends)
            about = {"length": length, "depth": depth}
            yield Item(frame.around(context), (config.answer or config.needle,), about, max_new_tokens=len(needle) + 20)


def haystack(config: HaystackOptions, tokenizer: Any, size: int) -> list[int]:
    """Tokens of the haystack's documents, from the beginning again when they are too few; by default made-up sentences."""
    ids: list[int] = []
    if config.haystack:
        for argument in (parse(text) for text in config.haystack):
            corpus = resolve(argument)
            if corpus.folder is not None:
                raise InputError(f"haystack: {argument.source} holds tokens, not text; name a text")
            for number, row in enumerate(corpus.rows()):
                if number == argument.samples or len(ids) >= size:
                    break
                ids += encode(tokenizer, text_of(row, config.text_column) + "\n\n")
    else:
        for text in CORPORA["markov"]():
            if len(ids) >= size:
                break
            ids += encode(tokenizer, text)
    if not ids:
        raise InputError(f"haystack: {config.haystack} holds no text; name another source")
    return repeated(ids, size)


def passkey_items(config: PasskeyConfig, tokenizer: Any) -> Iterator[Item]:
    lengths, depths = grid(config)
    head = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about it.\n"
    frame = Frame(tokenizer, config.chat_template, head, "\nWhat is the pass key? The pass key is")
    ends, filler = sentence_ends(tokenizer), encode(tokenizer, _GRASS)
    for number, (length, depth, trial) in enumerate(
        (length, depth, trial) for length in lengths for depth in depths for trial in range(config.num_trials)
    ):
        digits = (counter.uniform(config.seed, "eval", number, config.passkey_length) * 10).to(torch.int64).tolist()
        key = "".join(map(str, [max(1, digits[0]), *digits[1:]]))
        needle = encode(tokenizer, f" The pass key is {key}. Remember it. {key} is the pass key. ")
        room = length - frame.size - len(needle)
        if room < 1:
            raise ConfigError(f"min_length: {length} tokens do not hold the key and the question; use at least {length - room + 1}")
        context = inserted(repeated(filler, room), needle, depth / 100, ends)
        yield Item(frame.around(context), (key,), {"length": length, "depth": depth, "trial": trial}, max_new_tokens=2 * len(key) + 4)


def grid(config: NeedleConfig | PasskeyConfig) -> tuple[list[int], list[int]]:
    """Lengths and depths (percent) that are asked."""
    lengths = sorted(config.test_length) or spread(config.min_length, config.max_length, config.num_length_interval)
    depths = sorted(config.test_depth) or spread(config.min_depth, config.max_depth, config.num_depth_interval)
    return lengths, depths

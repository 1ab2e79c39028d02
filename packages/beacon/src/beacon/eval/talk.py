"""Long conversations asked about afterwards: which topic came k-th, and several questions on one context that is read once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from beacon.cache import BeaconCache
from beacon.eval.answers import answered, check_windows, finish, reader
from beacon.eval.folder import EvalFolder
from beacon.eval.needle import haystack
from beacon.eval.prompts import Frame, Item, encode, inserted, sentence_ends
from beacon.eval.scores import contains, f1, words
from beacon.options import MultiturnConfig, TopicConfig
from lm_core import counter
from lm_core.errors import ConfigError

_FIELDS = ("history", "future", "cost", "art", "science", "etiquette")
_THINGS = (
    "glass making", "bird watching", "bicycle repair", "tea", "deep sea diving", "chess", "bread baking", "volcanoes", "opera", "beekeeping",
    "maps", "sleep", "railways", "pottery",
)  # fmt: skip
_ORDINALS = {1: "first", 2: "second", 3: "third"}
_CITIES = (
    "Oslo",
    "Lima",
    "Cairo",
    "Quito",
    "Hanoi",
    "Perth",
    "Turin",
    "Osaka",
    "Accra",
    "Dubai",
    "Minsk",
    "Sofia",
    "Tunis",
    "Malmo",
    "Leeds",
    "Pune",
)


def run_topic(config: TopicConfig) -> dict[str, Any]:
    """Accuracy and F1 by number of topics."""
    model, tokenizer = reader(config)

    def score(item: Item, text: str) -> dict[str, float]:
        return {"accuracy": contains(text, item.answers[0]), "f1": f1(words(text), words(item.answers[0]))}

    folder, readers = answered(config, model, tokenizer, topic_items(config, tokenizer), score)
    by_topics: dict[str, Any] = {}
    for who in readers:
        found = {}
        for number in sorted({item["topics"] for item in folder.items.values()}):
            own = [item for item in folder.items.values() if item["topics"] == number]
            found[str(number)] = {
                "tokens": sum(item["tokens"] for item in own) / len(own),
                **{name: sum(item[f"{who}/{name}"] for item in own) / len(own) for name in ("accuracy", "f1")},
            }
        by_topics[who] = {"by_topics": found}
    return finish(config, folder, readers, ("accuracy", "f1"), by_topics)


def topic_items(config: TopicConfig, tokenizer: Any) -> Iterator[Item]:
    known = [f"the {field} of {thing}" for field in _FIELDS for thing in _THINGS]
    number = 0
    for topics in config.num_topics:
        if topics > len(known):
            raise ConfigError(f"num_topics: {topics} is more than the {len(known)} topics there are; use at most that")
        for _ in range(config.num_trials):
            drawn = counter.uniform(config.seed, "eval", number, len(known) + 1)
            chosen = [known[at] for at in torch.argsort(drawn[: len(known)])[:topics].tolist()]
            which = 1 if config.target == "first" else 1 + int(float(drawn[-1]) * topics)
            number += 1
            nth = _ORDINALS.get(which, f"{which}th")
            asked = (
                f"\nUSER: What is the {nth} topic we discussed? Only give me the topic name.\nASSISTANT: The {nth} topic we discussed is"
            )
            frame = Frame(tokenizer, config.chat_template, "", asked)
            talk = "".join(
                f"USER: I would like to discuss the topic of {topic}.\nASSISTANT: Sure! What about {topic} interests you?\n"
                f"USER: I have wondered about it for a long time, and I want to know where one should begin.\n"
                "ASSISTANT: It is best to begin with what people around you already know, and to take small steps from there.\n"
                for topic in chosen
            )
            about = {"topics": topics, "asked": which}
            yield Item(frame.around(encode(tokenizer, talk)), (chosen[which - 1],), about, max_new_tokens=24, first_line=True)


def run_multiturn(config: MultiturnConfig) -> dict[str, Any]:
    """Accuracy and seconds of each turn; the context is read once, and the conversation goes on in its memory."""
    model, tokenizer = reader(config)
    facts = _facts(config)
    context = _with_facts(config, tokenizer, facts)
    folder = EvalFolder(config.output_dir, config, config.overwrite)
    readers = ["beacon", *config.baseline]
    if len(folder.items) < len(facts):
        turns = {who: _turns(config, model, tokenizer, context, facts, who) for who in readers}
        for number, (place, colour) in enumerate(facts):
            item: dict[str, Any] = {"item": number, "tokens": len(context), "targets": [colour], "turn": number + 1, "place": place}
            for who in readers:
                item |= {f"{who}/{name}": value for name, value in turns[who][number].items()}
            folder.add(item)
    by_turn = {
        who: {
            "by_turn": {
                str(item["turn"]): {name: item[f"{who}/{name}"] for name in ("accuracy", "seconds")} for item in folder.items.values()
            }
        }
        for who in readers
    }
    return finish(config, folder, readers, ("accuracy",), by_turn)


def _facts(config: MultiturnConfig) -> list[tuple[str, str]]:
    """Places and their numbers."""
    if config.turns > len(_CITIES):
        raise ConfigError(f"turns: {config.turns} is more than the {len(_CITIES)} facts there are; use at most that")
    numbers = (counter.uniform(config.seed, "eval", 0, config.turns) * 90 + 10).to(torch.int64).tolist()
    return [(city, str(number)) for city, number in zip(_CITIES, numbers)]


def _with_facts(config: MultiturnConfig, tokenizer: Any, facts: list[tuple[str, str]]) -> list[int]:
    needles = [encode(tokenizer, f" The number of {place} is {number}. ") for place, number in facts]
    room = config.length - sum(map(len, needles))
    if room < len(needles):
        raise ConfigError(
            f"length: {config.length} tokens do not hold {len(facts)} facts; use at least {config.length - room + len(needles)}"
        )
    ends, ids = sentence_ends(tokenizer), haystack(config, tokenizer, room)
    for number in reversed(range(len(needles))):
        ids = inserted(ids, needles[number], (number + 0.5) / len(needles), ends)
    return ids


@torch.no_grad()
def _turns(
    config: MultiturnConfig, model: Any, tokenizer: Any, context: list[int], facts: list[tuple[str, str]], who: str
) -> list[dict[str, Any]]:
    ratios = list(config.beacon_ratio) if len(config.beacon_ratio) == 1 else None
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens or 6, "do_sample": False, "pad_token_id": pad}
    cache: BeaconCache | None = None
    said = list(context)
    found, ends = [], []
    for place, number in facts:
        asked = encode(tokenizer, f"\nQuestion: What is the number of {place}? Answer: The number of {place} is")
        began = time.perf_counter()
        if who == "beacon":
            if cache is None:
                cache = model.compress(context, expected_length=len(context) + 64 * len(facts), ratios=ratios, seed=config.seed)
            ends.append(cache.lengths()[0]["seen"] + len(asked))
            out = model.generate(torch.tensor([asked], device=model.device), past_key_values=cache, **options)
            new = out[0, len(asked) :].tolist()
            # the last token was written, not read
            cache.append(new[-1:])
        else:
            said += asked
            with model.beacon_disabled():
                ids = torch.tensor([said], device=model.device)
                out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            new = out[0, len(said) :].tolist()
            said += new
        seconds = time.perf_counter() - began
        text = tokenizer.decode(new, skip_special_tokens=True)
        found.append({"prediction": text, "accuracy": float(number in text), "seconds": seconds})
    check_windows(model, ends)
    return found

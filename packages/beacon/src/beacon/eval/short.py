"""Multiple choice on short texts by likelihood: in append mode the same numbers as without beacons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from beacon.eval.answers import check_windows, finish, reader
from beacon.eval.folder import EvalFolder
from beacon.eval.prompts import encode
from beacon.options import ShortConfig
from lm_core.data.synthetic import CORPORA
from lm_core.errors import InputError, reading


def run(config: ShortConfig) -> dict[str, Any]:
    """Accuracy, and the largest difference of any log-likelihood from the base's."""
    questions = list(_questions(config))
    model, tokenizer = reader(config)
    folder = EvalFolder(config.output_dir, config, config.overwrite)
    readers = ["beacon", *config.baseline]
    check_windows(model, [len(encode(tokenizer, text)) for text, _, _ in questions])
    for number, (text, choices, right) in enumerate(questions):
        if number in folder.items:
            continue
        item: dict[str, Any] = {"item": number, "tokens": 0, "targets": [choices[right]]}
        for who in readers:
            scores = [likelihood(model, encode(tokenizer, text), encode(tokenizer, choice), who) for choice in choices]
            best = max(range(len(choices)), key=lambda at: scores[at] / max(1, len(encode(tokenizer, choices[at]))))
            item |= {
                f"{who}/prediction": choices[best],
                f"{who}/accuracy": float(best == right),
                f"{who}/seconds": 0.0,
                f"{who}/scores": scores,
            }
        item["tokens"] = len(encode(tokenizer, text + choices[right]))
        folder.add(item)
    result: dict[str, Any] = {}
    if "full" in readers:
        gaps = [abs(a - b) for item in folder.items.values() for a, b in zip(item["beacon/scores"], item["full/scores"])]
        result["beacon"] = {"largest_difference_from_base": max(gaps)}
    return finish(config, folder, readers, ("accuracy",), result)


@torch.no_grad()
def likelihood(model: Any, before: list[int], choice: list[int], who: str) -> float:
    """Sum of the log-likelihoods of the choice's tokens."""
    if not before or not choice:
        raise InputError("data: a question and its choices need at least one token each; correct the row")
    ids = torch.tensor([before + choice], device=model.device)
    if who == "full":
        with model.beacon_disabled():
            logits: Tensor = model(ids).logits
    else:
        logits = model(ids).logits
    predicted = logits[0, len(before) - 1 : -1].float()
    return float(-F.cross_entropy(predicted, ids[0, len(before) :], reduction="sum"))


def _questions(config: ShortConfig) -> Iterator[tuple[str, list[str], int]]:
    if config.data_file is None:
        for _, text in zip(range(16), CORPORA["recall"]()):
            given, asked = text.strip().split("\n")
            key, value = asked.split(" ")[0].split(">")
            others = [word.partition("=v")[2] for word in given.split(" ")]
            choices = sorted({f"v{other}" for other in others[:4]} | {value})
            yield f"{given}\n{key}>", choices, choices.index(value)
        return
    if not config.data_file.is_file():
        raise InputError(f"data_file: {config.data_file} does not exist; name a JSONL file with question, choices and answer")
    with reading(f"data_file: {config.data_file}", "name a JSONL file with question, choices and answer"):
        lines = config.data_file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            question, choices, answer = str(row["question"]), [str(choice) for choice in row["choices"]], int(row["answer"])
            assert 0 <= answer < len(choices)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
            raise InputError(
                f"data_file: {config.data_file}:{number} is no question ({error!r}); it needs question, choices and answer (a number from 0)"
            ) from None
        yield question, choices, answer

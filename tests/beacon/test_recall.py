"""Recall: the rows that ask for it, and that gradients through memory teach it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

from beacon.attach import attach_beacon
from beacon.cli import cli
from beacon.config import BeaconConfig
from lm_core.data.vocab import byte_tokenizer
from tests.beacon.small import stock

WORDS = byte_tokenizer()


def written(folder: Path, *options: str) -> list[dict[str, Any]]:
    import datasets

    arguments = ["recall-data", "--model", "llama_tiny", "--tokenizer", "bytes", "--length", "600", "--num-rows", "12"]
    done = CliRunner().invoke(cli, [*arguments, "--output-dir", str(folder), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return list(datasets.load_from_disk(str(folder)))


def test_answers_of_recall_rows_were_told_in_the_first_half(tmp_path: Path) -> None:
    rows = written(tmp_path / "one")
    assert rows == written(tmp_path / "two")
    assert rows != written(tmp_path / "three", "--seed", "1")
    assert (tmp_path / "one" / "state.json").read_text() == (tmp_path / "two" / "state.json").read_text()
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        assert row["length"] == len(ids) == len(labels) in (599, 600)
        marks = "".join("x" if label != -100 else "." for label in labels)
        learned = [ids[match.start() : match.end()] for match in re.finditer("x+", marks)]
        assert learned
        assert all(label in (-100, token) for token, label in zip(ids, labels))
        # what is learned was said before, and long before
        told = WORDS.decode(ids[: 600 // 2 + 150])
        assert all(WORDS.decode(part, skip_special_tokens=True).strip() in told for part in learned)
    assert "Again:" in WORDS.decode(rows[2]["input_ids"])


def test_rows_too_short_for_their_questions_are_refused(tmp_path: Path) -> None:
    arguments = ["recall-data", "--model", "llama_tiny", "--tokenizer", "bytes", "--length", "100", "--output-dir", str(tmp_path / "rows")]
    done = CliRunner().invoke(cli, arguments)
    assert "length: 100 tokens do not hold the questions; use at least" in done.output
    assert not (tmp_path / "rows").exists()


ASK, WINDOW = 23, 8


def key_rows(step: int, count: int = 64) -> Tensor:
    """Two windows of filler with one of 16 keys somewhere, then the question and the key."""
    generator = torch.Generator().manual_seed(step)
    filler = 16 + torch.randint(0, 6, (count, 2 * WINDOW), generator=generator)
    key, place = (torch.randint(0, below, (count, 1), generator=generator) for below in (16, 2 * WINDOW))
    return torch.cat([filler.scatter(1, place, key), torch.full((count, 1), ASK), key], 1)


def train(parameters: Iterable[nn.Parameter], steps: int, loss: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.9, 0.98), weight_decay=0)
    for step in range(steps):
        optimizer.zero_grad()
        loss(key_rows(step)).backward()
        optimizer.step()


def test_gradients_through_memory_teach_recall_across_compactions() -> None:
    # a model that finds the key with full attention is frozen; only beacons learn to carry it
    base = stock(torch.float32, vocab_size=24, num_hidden_layers=2, intermediate_size=64, eos_token_id=22, attention_bias=False)
    train(base.parameters(), 120, lambda rows: F.cross_entropy(base(rows).logits[:, -2], rows[:, -1]))
    unseen = key_rows(10**6, 512)

    def right(model: Any, **options: Any) -> float:
        with torch.no_grad():
            return float((model(unseen, **options).logits[:, -2].argmax(-1) == unseen[:, -1]).float().mean())

    assert right(base) > 0.98
    ratios = itertools.cycle((2, 4, 8))
    model = attach_beacon(base, BeaconConfig(window=WINDOW, stride=WINDOW, ratio=[2, 4, 8])).train()
    assert all(right(model, ratios=[ratio]) < 0.2 for ratio in (2, 4, 8))

    def through_memory(rows: Tensor) -> Tensor:
        labels = torch.where(torch.arange(rows.shape[1]) == rows.shape[1] - 1, rows, -100)
        return model(rows, labels=labels, ratios=[next(ratios)]).loss

    train(model.trainable_parameters(), 80, through_memory)
    assert all(right(model, ratios=[ratio]) > 0.9 for ratio in (2, 4, 8))
    # memory of another document is not seen: chance is 1 in 16
    hidden = torch.tensor([[0] * 2 * WINDOW + [1, 1]]).expand(len(unseen), -1)
    assert right(model, ratios=[2], doc_ids=hidden) < 0.2

"""Every optimizer learns: text of a Markov chain about as well as AdamW, each at its best of the learning rates that `presets` lists."""

from __future__ import annotations

import math
import random
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_core.config import build
from lm_core.engine import make_engine
from lm_core.progress import Progress
from lm_core.run import make_loader
from lm_core.train import train_step
from lowrank_opt.config import TrainConfig
from lowrank_opt.method import LowRank
from lowrank_opt.optimizer_options import LEARNING_RATES, OPTIMIZERS

STEPS = 300
CHANCES = (0.6, 0.3, 0.1)
# a quarter of the hidden size, and half the rank of the adapters
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"galore": {"rank": 16, "update_proj_gap": 20}} for name in ("galore", "galore8bit", "fira", "qgalore")},
    **{name: {"galore": {"rank": 4, "update_proj_gap": 20}} for name in ("lora+galore", "lora+galore8bit")},
    "apollo": {"apollo": {"apollo_rank": 16, "apollo_update_proj_gap": 20}},
    "ldadam": {"galore": {"rank": 16}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen words of two letters without spaces; one of three words follows each, so both letters of the last one are needed."""
    draw = random.Random(0)
    words = [first + second for first in "abcd" for second in "efgh"]
    followers = {word: draw.sample(words, len(CHANCES)) for word in words}
    path = tmp_path_factory.mktemp("learning") / "chain.txt"
    with path.open("w") as file:
        for _ in range(400):
            said = [draw.choice(words)]
            while len(said) < 64:
                said += draw.choices(followers[said[-1]], CHANCES)
            file.write("".join(said) + "\n")
    return path


def losses(text: Path, optimizer: str, lr: float) -> list[float]:
    """Of each step of a run as the recipes have it: warm-up over a tenth, then a cosine to a tenth."""
    config = build(TrainConfig, {
        "mode": "pretraining", "optimizer": optimizer, "model": "llama_test", "tokenizer": "bytes", "data": [str(text)], "packing": "stream",
        "max_length": 32, "micro_batch_size": 8, "precision": "fp32", "max_steps": STEPS, "lr": lr, "schedule": "cosine", "warmup": 0.1,
        "min_lr_ratio": 0.1, **OPTIONS.get(optimizer, {}),
    })  # fmt: skip
    method = LowRank(config)
    data = method.data(method.tokenizer())
    torch.manual_seed(0)
    engine = make_engine(config, method, method.build(), torch.device("cpu"))
    loader, progress, found = make_loader(config, data, 0, 1), Progress(), []
    for _ in range(STEPS):
        at = progress
        report = train_step(engine, method, next(loader), lr=lambda size, at=at: config.learning_rate(at, size, loader.epoch_samples))
        progress = progress.after(report.size)
        found.append(report.loss)
    return found


def final(found: list[float]) -> float:
    return sum(found[-20:]) / 20


@pytest.fixture(scope="module")
def adamw(text: Path) -> float:
    """The final loss of AdamW at its best rate."""
    return min(final(losses(text, "baseline", lr)) for lr in LEARNING_RATES["baseline"])


@pytest.mark.slow
def test_adamw_learns_the_chain(adamw: float) -> None:
    # the second letter of each pair and the word behind it cost what the chain leaves open; nothing can cost less
    entropy = -sum(chance * math.log(chance) for chance in CHANCES) / 2
    assert entropy < adamw < 1.35 * entropy


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [name for name in typing.get_args(OPTIMIZERS) if name != "baseline"])
def test_the_best_of_three_rates_comes_within_5_percent_of_adamw(optimizer: str, text: Path, adamw: float) -> None:
    smallest, middle, largest = LEARNING_RATES[optimizer]
    reached = []
    # that the best of three reaches the bound is shown by the first that does
    for lr in (middle, largest, smallest):
        found = losses(text, optimizer, lr)
        reached.append(final(found))
        bound = 0.8 * found[0] if optimizer.startswith("lora") else 1.05 * adamw
        if reached[-1] <= bound:
            return
    pytest.fail(f"final losses {reached}, bound {bound}")

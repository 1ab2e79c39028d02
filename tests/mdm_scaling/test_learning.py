"""What both objectives learn from a source whose entropy is known, and from too little of it."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from tests.mdm_scaling.small import network
from torch import Tensor

from mdm_scaling.losses import bounds, masked_total
from mdm_scaling.model import Objective, Scorer
from mdm_scaling.noise import Noise, levels, masks

TOKENS, SIZE, BATCH = 6, 24, 32


@lru_cache
def chances() -> Tensor:
    """Rows of a Markov chain with a uniform stationary distribution: every row and column holds the same values."""
    values = torch.tensor([0.6, 0.2, 0.1, 0.05, 0.03, 0.02])
    return torch.stack([values.roll(shift) for shift in range(TOKENS)])


def drawn(count: int, seed: int) -> Tensor:
    """Sequences of the chain (count x SIZE + 1)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(TOKENS, (count,), generator=generator)]
    for _ in range(SIZE):
        rows.append(torch.multinomial(chances()[rows[-1]], 1, generator=generator)[:, 0])
    return torch.stack(rows, 1)


def entropy() -> float:
    """Nats per token behind the first."""
    return float(-(chances()[0] * chances()[0].log()).sum())


def held_out(scorer: Scorer, objective: Objective, rows: Tensor) -> float:
    """Nats per token: exact for ar, a bound for mdm."""
    scorer.train(False)
    with torch.no_grad():
        if objective == "ar":
            loss = float(scorer(rows[:, :-1], rows[:, 1:].flatten())) / rows[:, 1:].numel()
        else:
            loss = float(bounds(scorer, rows[:, :-1], "stratified", num_mc=4, seed=7, noise=Noise(), mask_id=TOKENS).mean()) / SIZE
    scorer.train(True)
    return loss


def learn(objective: Objective, corpus: Tensor, steps: int, every: int) -> list[float]:
    """Held-out losses on the way, of a tiny model that sees `corpus` in batches again and again."""
    scorer = Scorer(network(objective, vocabulary=TOKENS, std=0.05).train(True))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=4e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)
    test, found = drawn(128, seed=99), []
    for step in range(steps):
        index = torch.arange(step * BATCH, (step + 1) * BATCH)
        rows = corpus[index % len(corpus)]
        if objective == "ar":
            loss = scorer(rows[:, :-1], rows[:, 1:].flatten())
        else:
            t = levels("stratified", 0, "noise", step, torch.arange(BATCH), index, BATCH)
            masked, weight = masks(Noise(), t, torch.ones(BATCH, SIZE, dtype=torch.bool), 0, "noise", index)
            loss = masked_total(scorer, rows[:, :-1], masked, weight, TOKENS)
        optimizer.zero_grad()
        (loss / (BATCH * SIZE)).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % every == 0:
            found.append(held_out(scorer, objective, test))
    return found


@pytest.mark.slow
def test_ar_reaches_the_entropy_of_a_source_and_the_bound_of_mdm_falls_towards_it() -> None:
    corpus = drawn(250 * BATCH, seed=1)
    causal, masked = learn("ar", corpus, 250, 250), learn("mdm", corpus, 250, 125)
    # the held-out sample has an entropy of its own
    test = drawn(128, seed=99)
    sampled = float(-chances()[test[:, :-1], test[:, 1:]].log().mean())
    assert sampled == pytest.approx(entropy(), rel=0.05)
    assert sampled <= causal[-1] < 1.02 * sampled
    # the first token is to be guessed, too, which the causal model is given
    exact = (sampled * (SIZE - 1) + math.log(TOKENS)) / SIZE
    assert exact * 0.98 < masked[-1] < masked[0] < math.log(TOKENS)


@pytest.mark.slow
def test_on_little_repeated_data_ar_turns_up_and_mdm_does_not() -> None:
    corpus = drawn(BATCH, seed=2)
    causal, masked = learn("ar", corpus, 200, 20), learn("mdm", corpus, 200, 20)
    assert causal[-1] > 1.2 * min(causal)
    assert masked[-1] < 1.05 * min(masked)

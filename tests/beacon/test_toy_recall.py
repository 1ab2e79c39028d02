"""Oracle 23: a frozen two-layer model that copies runs of symbols learns, by its beacons alone, to copy them through memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from beacon.attach import attach_beacon
from beacon.config import BeaconConfig

SYMBOLS, HALF, RUN, ROWS = 32, 16, 8, 64
# targets that go on with a run: all but the first of each
CONTINUED = torch.tensor([t for t in range(HALF, 2 * HALF) if t % RUN])


def toy_rows(step: int, count: int = ROWS) -> Tensor:
    """Rows of 32: 16 distinct symbols, then two runs of 8 copied from random places of the first half."""
    generator = torch.Generator().manual_seed(step)
    first = torch.rand(count, SYMBOLS, generator=generator).argsort(1)[:, :HALF]
    starts = torch.randint(0, HALF - RUN + 1, (count, 2, 1), generator=generator)
    return torch.cat([first, first.gather(1, (starts + torch.arange(RUN)).flatten(1))], 1)


def continuation_loss(logits: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, CONTINUED - 1].flatten(0, 1), rows[:, CONTINUED].flatten())


def train(parameters: Iterable[nn.Parameter], steps: int, first: int, loss: Callable[[Tensor], Tensor]) -> None:
    """AdamW 2e-3, 50 warm-up steps, then linear decay."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        optimizer.zero_grad()
        loss(toy_rows(first + step)).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_runs_are_copied_through_memory() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
    base = LlamaForCausalLM(
        LlamaConfig(**sizes, vocab_size=SYMBOLS + 1, max_position_embeddings=64, bos_token_id=SYMBOLS, eos_token_id=SYMBOLS)
    )
    train(base.parameters(), 300, 10**7, lambda rows: continuation_loss(base(rows).logits, rows))
    unseen = toy_rows(10**9, 512)
    with torch.no_grad():
        assert (base(unseen).logits[:, CONTINUED - 1].argmax(-1) == unseen[:, CONTINUED]).float().mean() > 0.99

    # another document's memory is not seen
    hidden = torch.tensor([[0] * HALF + [1] * HALF]).expand(len(unseen), -1)
    found, masked = {}, {}
    for ratio in (2, 4, 8, 16):
        config = BeaconConfig(window=HALF, stride=HALF, ratio=[ratio], attn="step-expansion", attend_prev=True, sink_size=0)
        model = attach_beacon(copy.deepcopy(base), config).train()
        train(model.trainable_parameters(), 1500, 0, lambda rows, model=model: model(rows, labels=rows).loss)
        with torch.no_grad():
            found[ratio] = float(continuation_loss(model(unseen).logits, unseen))
            masked[ratio] = float(continuation_loss(model(unseen, doc_ids=hidden).logits, unseen))
        print(f"ratio {ratio}: {found[ratio]:.3f} nats, {masked[ratio]:.3f} with memory masked out", flush=True)
    assert found[2] < 1.8
    assert found[16] < 2.6
    assert sorted(found, key=found.__getitem__) == [2, 4, 8, 16]
    assert min(masked.values()) > 3.4

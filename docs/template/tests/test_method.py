"""What every method must hold, and what makes this one a prefix language model."""

from __future__ import annotations

from typing import Any

import torch

from lm_core.method import IGNORE, Batch
from lm_core.testing import Conformance
from prefix_lm.config import PrefixLMConfig
from prefix_lm.method import PrefixLM

TINY: dict[str, Any] = {"model": "tiny", "tokenizer": "bytes", "data": ["synthetic:markov"], "max_length": 32, "lr": 3e-3}


class TestConformance(Conformance):
    def configure(self, **options: Any) -> PrefixLMConfig:
        return PrefixLMConfig(**{**TINY, **options})

    def method(self, config: Any) -> PrefixLM:
        return PrefixLM(config)


def test_everyone_sees_the_whole_prefix_and_only_the_rest_is_predicted() -> None:
    tokens = torch.arange(16).view(1, 16)
    batch = Batch({"input_ids": tokens, "labels": tokens}, index=torch.tensor([3]), step=0)
    method = PrefixLM(PrefixLMConfig(**TINY))
    length = int(method.in_prefix(batch).sum())
    mask = method.mask(batch)[0, 0]
    assert 1 <= length <= 8
    assert torch.equal(mask[:, :length], torch.ones(16, length, dtype=torch.bool))
    assert torch.equal(mask[length:, length:], torch.ones(16 - length, 16 - length).tril().bool())
    assert method.labels(batch)[0].tolist() == [IGNORE] * length + list(range(length, 16))
    assert method.targets(batch) == 16 - length

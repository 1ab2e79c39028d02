"""Prefix language modelling: a prefix of random length is seen whole by everyone, and only what follows it is predicted.

Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer" (2020), figure 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lm_core import counter
from lm_core.method import IGNORE, Batch, Loss, Method
from lm_core.models import CausalLoss, load_model
from prefix_lm.config import SIZES, PrefixLMConfig

# B batch, T time


class PrefixLM(Method):
    """A decoder whose attention is causal except inside the prefix."""

    config: PrefixLMConfig

    def build(self) -> nn.Module:
        return CausalLoss(load_model(self.config.model, presets=SIZES, seed=self.config.seed))

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        yield Loss(total=model(batch["input_ids"], self.labels(batch), attention_mask=self.mask(batch)))

    def targets(self, batch: Batch) -> int:
        return int((self.labels(batch) != IGNORE).sum())

    def labels(self, batch: Batch) -> Tensor:
        """Labels (B x T) of what follows the prefix."""
        return batch["labels"].masked_fill(self.in_prefix(batch), IGNORE)

    def mask(self, batch: Batch) -> Tensor:
        """Who sees whom (B x 1 x T x T): the past, the whole prefix, no padding."""
        key_T = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
        seen_BTT = (key_T <= key_T[:, None]) | self.in_prefix(batch)[:, None, :]
        return (seen_BTT & real(batch)[:, None, :])[:, None]

    def in_prefix(self, batch: Batch) -> Tensor:
        """Which positions (B x T, bool) belong to the prefix: at least one, at most the configured fraction of the document."""
        # addressed by sample, so that the same sample has the same prefix on any rank and after a restart
        share_B1 = counter.uniform(self.config.seed, "mask", batch.index, 1) * self.config.prefix
        length_B1 = 1 + (share_B1 * real(batch).sum(1, keepdim=True)).long()
        return torch.arange(batch["input_ids"].shape[1], device=length_B1.device) < length_B1


def real(batch: Batch) -> Tensor:
    """Positions (B x T, bool) that are not padding."""
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"], dtype=torch.bool)

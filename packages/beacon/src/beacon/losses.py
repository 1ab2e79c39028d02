"""Next-token loss of a beacon model, summed over counted targets, without the full logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from beacon.modeling.causal_lm import RatioRule, counted_targets
from lm_core.method import IGNORE
from lm_core.models import CausalLoss, hf_model

# B rows, T columns, N counted tokens, D hidden size


class BeaconLoss(CausalLoss):
    """The model and its loss in one module, so that engines that gather weights inside a forward see one call."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        ratios: RatioRule | None = None,
        engine: str = "auto",
        known: tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss and further sums: the loss by ratio of the last compaction (for the ratios `known`), beacons per raw token."""
        model: Any = hf_model(self.model)
        # one forward per micro-batch in evaluations too: sharded engines need every rank to run the same modules as often
        engine = "parallel" if engine == "auto" else engine
        hidden = model.read(input_ids, attention_mask, doc_ids, None, ratios, engine=engine, limited=False)
        targets = counted_targets(labels, hidden.counts_BT).flatten()
        states, ratio = hidden.states_BTD.flatten(0, 1), hidden.ratio_BT.flatten()
        # rows without a single beacon still have a graph, with zero gradient
        total = model.model.beacon_embed_tokens.weight.sum().to(states.dtype) * 0.0
        metrics = {}
        # every rank reports the same metrics, whatever its rows were given
        for value in sorted({*known, *ratio.unique().tolist()}):
            rows = ((targets != IGNORE) & (ratio == value)).nonzero()[:, 0]
            part = self._sum(model.lm_head, states[rows], targets[rows]) if len(rows) else total.detach() * 0
            total = total + part
            if value in known:
                metrics[f"loss_ratio/{value}"] = torch.stack([part.detach().double(), part.new_tensor(float(len(rows))).double()])
        tokens = input_ids.numel() if attention_mask is None else int((attention_mask != 0).sum())
        metrics["beacon/share"] = total.new_tensor([hidden.beacons, tokens]).double()
        metrics["beacon/over_capacity"] = total.new_tensor([hidden.over_capacity, len(input_ids)]).double()
        return total, metrics

    def _sum(self, head: Any, states_ND: Tensor, targets_N: Tensor) -> Tensor:
        if self.fused:
            out: Tensor = head(states_ND, targets_N)
            return out
        logits = head(states_ND)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_N, reduction="sum")

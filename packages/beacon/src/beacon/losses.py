"""Next-token loss of a beacon model, summed over counted targets, without the full logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from beacon.modeling.causal_lm import RatioRule, counted_targets
from beacon.modeling.walk import spans_of
from kernels_cuda.head import linear_kl
from lm_core.method import IGNORE
from lm_core.models import CausalLoss, hf_model

# B rows, T columns, N counted tokens, D hidden size


class BeaconLoss(CausalLoss):
    """The model and its loss in one module, so that engines that gather weights inside a forward see one call.

    With `distill` (weight, temperature T), training adds weight * T^2 * KL(softmax(z / T), softmax(y / T)) per counted target, where z are
    the logits of the same model without beacons and y its own; rows longer than the positions of the model have no such z.
    """

    distill: tuple[float, float] | None = None

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
        if self.distill is not None and self.training:
            kl, count = self._divergence(
                model, hidden.states_BTD, hidden.counts_BT & (labels != IGNORE).roll(-1, 1), input_ids, attention_mask, doc_ids
            )
            metrics["distill_kl"] = torch.stack([kl.detach().double(), kl.new_tensor(float(count)).double()])
            total = total + self.distill[0] * kl
        return total, metrics

    def _divergence(
        self, model: Any, states_BTD: Tensor, counts_BT: Tensor, input_ids: Tensor, attention_mask: Tensor | None, doc_ids: Tensor | None
    ) -> tuple[Tensor, int]:
        """T^2 KL from the model without beacons, summed over counted targets, and their number."""
        assert self.distill is not None
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        if doc_ids is not None:
            # documents are told apart by positions that start again, which a mask would overrule
            index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
            begins = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
            inputs = {"position_ids": index - index.where(begins, 0).cummax(1).values}
        fits = [last - first <= model.positions for first, last in spans_of(attention_mask, *input_ids.shape)]
        rows = (counts_BT & torch.tensor(fits, device=counts_BT.device)[:, None]).flatten().nonzero()[:, 0]
        with torch.no_grad():
            teacher_BTD = model.model(input_ids, use_cache=False, **inputs).last_hidden_state
        head = model.lm_head.weight
        student, teacher = states_BTD.flatten(0, 1)[rows], teacher_BTD.flatten(0, 1)[rows]
        mean, _, _ = linear_kl(student, head, (teacher.to(student.dtype), head), tau=self.distill[1])
        return mean * len(rows), len(rows)

    def _sum(self, head: Any, states_ND: Tensor, targets_N: Tensor) -> Tensor:
        if self.fused:
            out: Tensor = head(states_ND, targets_N)
            return out
        logits = head(states_ND)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_N, reduction="sum")

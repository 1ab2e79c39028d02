"""Losses of masked sequences and estimates of the likelihood bound.

R sequences, B of them in a batch, S positions, M masked positions of a batch.

For a fixed predictor the bound is the same number in four forms: the integral over t of (1/t) E[sum of masked CE]; the sum
over all non-empty masks M of B(|M|, S - |M| + 1) times the CE in M; S times the mean CE of a uniform count and subset;
the mean chain-rule NLL over all orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mdm_scaling.noise import Noise, levels, masks

Estimator = Literal["stratified", "shift", "iid", "fixed-count", "exact", "chain"]
SAMPLED = ("stratified", "shift", "iid", "fixed-count")
EXACT_POSITIONS = 14
# predictor: (input ids B x S, targets M, rows M, weights M or None, reduction=...) -> the sum, or each one
Predictor = Callable[..., Tensor]


def masked_total(predict: Predictor, ids_BS: Tensor, masked_BS: Tensor, weight_B: Tensor, mask_id: int, **inputs: Any) -> Tensor:
    """Sum over masked positions of weight x CE, with its graph; 0 where nothing is masked."""
    noisy = ids_BS.masked_fill(masked_BS, mask_id)
    rows = _rows(masked_BS)
    weights = weight_B[:, None].expand_as(ids_BS).flatten()[rows]
    return predict(noisy, ids_BS.flatten()[rows], rows, weights, **inputs)


def masked_each(predict: Predictor, ids_BS: Tensor, masked_BS: Tensor, weight_B: Tensor, mask_id: int, **inputs: Any) -> Tensor:
    """`masked_total` by sequence (B)."""
    rows = _rows(masked_BS)
    weights = weight_B[:, None].expand_as(ids_BS).flatten()[rows]
    nll = predict(ids_BS.masked_fill(masked_BS, mask_id), ids_BS.flatten()[rows], rows, weights, reduction="none", **inputs)
    return torch.zeros(len(ids_BS), dtype=nll.dtype, device=nll.device).index_add(0, rows // ids_BS.shape[1], nll)


def _rows(masked_BS: Tensor) -> Tensor:
    if masked_BS.is_meta:
        # how many there are depends on values; all is the most
        return torch.arange(masked_BS.numel(), device="meta")
    return masked_BS.flatten().nonzero()[:, 0]


def sums(predict: Predictor, noisy_BS: Tensor, ids_BS: Tensor, scored_BS: Tensor, **inputs: Any) -> Tensor:
    """Per sequence the CE summed over the scored positions (B, float64), without a graph."""
    rows = scored_BS.flatten().nonzero()[:, 0]
    total = torch.zeros(len(ids_BS), dtype=torch.float64, device=ids_BS.device)
    if len(rows):
        nll = predict(noisy_BS, ids_BS.flatten()[rows], rows, reduction="none", **inputs)
        total.index_add_(0, rows // ids_BS.shape[1], nll.double())
    return total


@torch.no_grad()
def bounds(
    predict: Predictor, ids_RS: Tensor, estimator: Estimator, *, num_mc: int, seed: int, noise: Noise, mask_id: int, micro_batch: int = 8
) -> Tensor:
    """Bound on the negative log-likelihood of every sequence (R, float64, in nats for all of its S tokens).

    `chain` is no bound of the mean over orders but the NLL of the order from left to right. Draws of `num_mc` masks per
    sequence come from the stream eval, and levels are spread over all sequences and draws.
    """
    num, size = ids_RS.shape
    if estimator == "exact":
        assert size <= EXACT_POSITIONS
        sets = torch.tensor(list(itertools.product((False, True), repeat=size))[1:])
        weights = torch.tensor([math.exp(_log_beta(int(k), size)) for k in sets.sum(1)], dtype=torch.float64)
        return _enumerated(predict, ids_RS, sets, sets, weights, mask_id, micro_batch)
    if estimator == "chain":
        hidden = torch.ones(size, size, dtype=torch.bool).triu()
        return _enumerated(predict, ids_RS, hidden, torch.eye(size, dtype=torch.bool), torch.ones(size).double(), mask_id, micro_batch)
    slots = torch.arange(num * num_mc)
    how: Any = "stratified" if estimator == "fixed-count" else estimator
    t = levels(how, seed, "eval", 0, slots, slots, num * num_mc)
    total = torch.zeros(num, dtype=torch.float64)
    for first in range(0, num * num_mc, micro_batch):
        slot = slots[first : first + micro_batch]
        ids = ids_RS[slot // num_mc]
        masked, weight = masks(noise, t[slot], torch.ones_like(ids, dtype=torch.bool), seed, "eval", slot)
        nll = sums(predict, ids.masked_fill(masked, mask_id), ids, masked)
        total.index_add_(0, slot // num_mc, nll * weight.double())
    return total / num_mc


def _enumerated(
    predict: Predictor, ids_RS: Tensor, hidden_KS: Tensor, scored_KS: Tensor, weight_K: Tensor, mask_id: int, micro_batch: int
) -> Tensor:
    """Sum over K patterns of weight x CE at the scored positions, given a sequence without its hidden ones."""
    out = torch.zeros(len(ids_RS), dtype=torch.float64)
    for row, ids_S in enumerate(ids_RS):
        for first in range(0, len(hidden_KS), micro_batch):
            part = slice(first, first + micro_batch)
            ids = ids_S.expand(len(hidden_KS[part]), -1)
            nll = sums(predict, ids.masked_fill(hidden_KS[part], mask_id), ids, scored_KS[part])
            out[row] += (nll * weight_K[part]).sum()
    return out


def _log_beta(k: int, size: int) -> float:
    """log B(k, S - k + 1)."""
    return math.lgamma(k) + math.lgamma(size - k + 1) - math.lgamma(size + 1)

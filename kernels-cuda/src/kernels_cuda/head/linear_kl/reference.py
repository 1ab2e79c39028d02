"""The definition of the op, in plain PyTorch: all logits at once, gradients by autograd.

N rows, V vocabulary, K ids of a cached teacher, B buckets: those ids and one for all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
# a head set has half of the teacher's mass, up to rounding
HALF = 0.5 * (1 - 2**-20)


def linear_kl(
    h_s: Tensor,
    W_s: Tensor,
    teacher: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    tau: float = 1.0,
    direction: str = "forward",
    kl_w: float = 1.0,
    ce_w: float = 0.0,
    chunk: int = 256,
    *,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the public function of the same name; logits have the dtype of the inputs, everything after them is float32 or wider."""
    given = [value.detach() for value in ([teacher] if isinstance(teacher, Tensor) else teacher)]
    V = num_columns(W_s, given, vocabulary)
    wide = torch.promote_types(h_s.dtype, torch.float32)
    counts_N = torch.ones(len(h_s), dtype=torch.bool, device=h_s.device) if mask is None else mask.bool()
    labels_N = torch.full_like(counts_N, IGNORED, dtype=torch.int64) if labels is None else labels.long()
    labelled_N = labels_N != IGNORED

    logits_NV = F.linear(h_s[counts_N], W_s[:V]).to(wide)
    log_q_NV = F.log_softmax(logits_NV / tau, dim=-1)
    if is_cache(given):
        ids_NK, logp_NK, rest_N = (value[counts_N] for value in given)
        log_p_NB = with_rest(logp_NK.to(wide), rest_N.to(wide), V)
        kl_N = divergence(log_p_NB, in_buckets(ids_NK.long(), log_q_NV), direction)
    else:
        teacher_NV = (given[0][counts_N] if len(given) == 1 else F.linear(given[0][counts_N], given[1][:V]))[:, :V]
        kl_N = divergence(F.log_softmax(teacher_NV.to(wide) / tau, dim=-1), log_q_NV, direction)
    kl = tau**2 * kl_N.sum() / max(int(counts_N.sum()), 1)
    labelled_logits = F.linear(h_s[labelled_N], W_s[:V]).to(wide)
    ce = F.cross_entropy(labelled_logits, labels_N[labelled_N], reduction="sum") / max(int(labelled_N.sum()), 1)
    return kl_w * kl + ce_w * ce, kl.detach(), ce.detach()


def is_cache(teacher: Sequence[Tensor]) -> bool:
    """(ids, logp, rest), not (h_t, W_t) or logits."""
    return len(teacher) == 3


def num_columns(W_s: Tensor, teacher: Sequence[Tensor], vocabulary: int | None) -> int:
    """Of the logits that both sides have, at most `vocabulary`."""
    both = W_s.shape[0] if is_cache(teacher) else min(W_s.shape[0], teacher[0].shape[1] if len(teacher) == 1 else teacher[1].shape[0])
    return both if vocabulary is None else min(both, vocabulary)


def with_rest(logp_NK: Tensor, rest_N: Tensor, num_columns: int) -> Tensor:
    """The teacher's log-probabilities by bucket; they were rounded when they were stored, so they are made to sum to one again."""
    if logp_NK.shape[1] < num_columns:
        logp_NK = torch.cat([logp_NK, rest_N[:, None]], dim=1)
    return logp_NK.log_softmax(dim=-1)


def in_buckets(ids_NK: Tensor, log_q_NV: Tensor) -> Tensor:
    """The student's log-probabilities by bucket."""
    log_q_NK = log_q_NV.gather(1, ids_NK)
    if ids_NK.shape[1] == log_q_NV.shape[1]:
        return log_q_NK
    others_N = log_q_NV.scatter(1, ids_NK, -torch.inf).logsumexp(dim=1)
    return torch.cat([log_q_NK, others_N[:, None]], dim=1)


def divergence(log_p_NV: Tensor, log_q_NV: Tensor, direction: str) -> Tensor:
    """One number per row; what has no probability adds nothing."""
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    difference_NV = log_p_NV - log_q_NV
    forward_N = (p_NV * difference_NV).where(p_NV > 0, 0).sum(-1)
    if direction == "forward":
        return forward_N
    reverse_N = -(q_NV * difference_NV).where(q_NV > 0, 0).sum(-1)
    if direction == "reverse":
        return reverse_N
    weight_N = adaptive_weight(p_NV, q_NV.detach())
    return weight_N * forward_N + (1 - weight_N) * reverse_N


def adaptive_weight(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """Of the forward divergence: the part of the gaps |p - q| that lies in the head set, the shortest prefix of p sorted descending
    (of equal values the first first) with half of the mass."""
    sorted_NV, order_NV = p_NV.sort(dim=-1, descending=True, stable=True)
    before_NV = sorted_NV.double().cumsum(-1) - sorted_NV
    gap_NV = (p_NV - q_NV).abs().gather(-1, order_NV)
    in_head_NV = before_NV < HALF
    head_N, tail_N = gap_NV.where(in_head_NV, 0).sum(-1), gap_NV.where(~in_head_NV, 0).sum(-1)
    return torch.where(head_N + tail_N == 0, 0.5, head_N / (head_N + tail_N).clamp_min(torch.finfo(p_NV.dtype).tiny))
